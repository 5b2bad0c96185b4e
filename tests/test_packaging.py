"""What is shipped is what is in the tree: the wheel, built from the sdist, outside the repository."""

from __future__ import annotations

import ast
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from raymerge import __version__

ROOT = Path(__file__).resolve().parent.parent
DIST_INFO = f"raymerge-{__version__}.dist-info"


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist from the tree and the wheel from the sdist, with the hatchling that is installed."""
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def wheel(dist: Path) -> dict[str, bytes]:
    """Return the content of every file in the wheel."""
    with zipfile.ZipFile(dist / f"raymerge-{__version__}-py3-none-any.whl") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def read_tree() -> dict[str, bytes]:
    """Return the content of every file that the package consists of, by its name in the wheel."""
    skeleton = ROOT / ".pkg" / "raymerge"
    files = {f"raymerge/{path.name}": path for path in skeleton.iterdir() if path.is_file()}
    for package in ("pipeline", "ops", "cluster"):
        for path in (ROOT / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                files[f"raymerge/{path.relative_to(ROOT).as_posix()}"] = path
    return {name: path.read_bytes() for name, path in files.items()}


def test_the_wheel_is_the_tree(wheel: dict[str, bytes]) -> None:
    packed = {name: content for name, content in wheel.items() if not name.startswith(f"{DIST_INFO}/")}
    tree = read_tree()
    assert packed.keys() == tree.keys()
    assert packed == tree


def test_the_tree_is_not_empty() -> None:
    assert {
        "raymerge/__init__.py",
        "raymerge/__main__.py",
        "raymerge/py.typed",
        "raymerge/pipeline/cli/app.py",
        "raymerge/ops/linear.py",
        "raymerge/cluster/runner.py",
    } <= read_tree().keys()


def test_the_wheel_brings_the_command_and_the_licence(wheel: dict[str, bytes]) -> None:
    assert b"raymerge = raymerge.pipeline.cli.app:main" in wheel[f"{DIST_INFO}/entry_points.txt"]
    assert wheel[f"{DIST_INFO}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()


@pytest.fixture(scope="module")
def needs(wheel: dict[str, bytes]) -> list[Requirement]:
    """Return what `pip install raymerge` brings, extras left out."""
    lines = message_from_bytes(wheel[f"{DIST_INFO}/METADATA"]).get_all("Requires-Dist", [])
    return [need for need in map(Requirement, lines) if need.marker is None or need.marker.evaluate({"extra": ""})]


def test_an_install_brings_what_every_option_needs(needs: list[Requirement]) -> None:
    names = {canonicalize_name(need.name) for need in needs}
    assert {"ray", "torch", "safetensors", "huggingface-hub", "pyarrow", "fsspec", "s3fs"} <= names
    assert next(need for need in needs if need.name == "ray").extras == {"default"}, "for the dashboard, and jobs"


USERS_OF_EXTRAS = {
    "raymerge/pipeline/checkpoint/prompts/hidden_states.py": "moe",
    "raymerge/pipeline/evaluation/generation/transformers_worker.py": "eval",
    "raymerge/pipeline/evaluation/generation/inspect_worker.py": "inspect",
    "raymerge/pipeline/evaluation/generation/lm_eval_worker.py": "lm-eval",
    "raymerge/pipeline/evaluation/generation/vllm_worker.py": "vllm",
    "raymerge/pipeline/search/study.py": "spectrum",
    **{f"raymerge/pipeline/curve/drawing/{name}.py": "spectrum" for name in ("charts", "page", "pictures")},
}
"""The only files that import what an extra brings."""


def test_what_is_imported_is_declared(wheel: dict[str, bytes], needs: list[Requirement]) -> None:
    lines = message_from_bytes(wheel[f"{DIST_INFO}/METADATA"]).get_all("Requires-Dist", [])
    declared = {canonicalize_name(need.name) for need in needs}
    for need in needs:
        for line in requires(need.name) or ():
            part = Requirement(line)
            if part.marker and any(part.marker.evaluate({"extra": extra}) for extra in need.extras):
                declared.add(canonicalize_name(part.name))
    brought_by = packages_distributions()
    for name, content in read_tree().items():
        if name.endswith(".py"):
            extra = {"extra": USERS_OF_EXTRAS.get(name, "")}
            optional = [need for need in map(Requirement, lines) if need.marker and need.marker.evaluate(extra)]
            allowed = declared | {canonicalize_name(need.name) for need in optional}
            for node in ast.walk(ast.parse(content)):
                modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                for module in {module.partition(".")[0] for module in modules} - sys.stdlib_module_names - {"raymerge"}:
                    assert allowed & set(map(canonicalize_name, brought_by.get(module, [module]))), (name, module)


def test_the_constraints_are_within_the_ranges(needs: list[Requirement]) -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    versions = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    for need in needs:
        assert need.specifier.contains(versions[canonicalize_name(need.name)], prereleases=True), need


def test_the_sdist_brings_the_tests(dist: Path) -> None:
    with tarfile.open(dist / f"raymerge-{__version__}.tar.gz") as archive:
        names = set(archive.getnames())
    assert f"raymerge-{__version__}/tests/{Path(__file__).name}" in names
    assert f"raymerge-{__version__}/LICENSE" in names
