"""What is shipped is what is in the tree: the wheel, built from the sdist, outside the repository."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

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


def test_the_sdist_brings_the_tests(dist: Path) -> None:
    with tarfile.open(dist / f"raymerge-{__version__}.tar.gz") as archive:
        names = set(archive.getnames())
    assert f"raymerge-{__version__}/tests/{Path(__file__).name}" in names
    assert f"raymerge-{__version__}/LICENSE" in names
