"""Names, paths and streams as few users have them: one line on stderr and exit code 2, no traceback, no long wait."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from raymerge import RaymergeError, merge, plan, verify
from tests.checkpoints import MANIFEST, write_config, write_family
from tests.commands import Cli, Outcome, run_command


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    return write_family(tmp_path_factory.mktemp("family"), 1)


@pytest.fixture
def config(family: tuple[Path, ...], tmp_path: Path) -> Path:
    return config_of(tmp_path, *map(str, family))


def config_of(directory: Path, *models: str) -> Path:
    listed = [{"model": model, "parameters": {"weight": 0.5}} for model in models]
    return write_config(directory / "merge.yml", {"merge_method": "linear", "models": listed})


def assert_told(outcome: Outcome, *says: str) -> None:
    assert outcome.code == 2, outcome.err
    assert "Traceback" not in outcome.err
    for text in says:
        assert text in outcome.err


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("x" * 300, "File name too long"),
        ("http://[::1", "http://[::1: not a URL"),
        ("/", "no model; give the directory"),
    ],
    ids=["long", "web", "root"],
)
def test_names_that_no_place_has(config: Path, tmp_path: Path, cli: Cli, name: str, says: str) -> None:
    for arguments in (("plan", config_of(tmp_path / "..", name)), ("inspect", name), ("verify", name)):
        assert_told(cli(*arguments), name[:200])
    assert_told(cli("inspect", name), says)
    assert_told(cli("merge", config, name), name[:200])


@pytest.mark.parametrize("name", ["x" * 300, "y/" * 3000, "a\0b", "a\ud83d", "loop", "loop/x"])
def test_callers_from_python_get_an_error_of_ours(
    family: tuple[Path, ...], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    config = {"merge_method": "passthrough", "models": [{"model": str(family[0])}]}
    for call in (
        lambda: plan({"merge_method": "passthrough", "models": [{"model": name}]}),
        lambda: plan(Path(name)),
        lambda: merge(config, name),
        lambda: verify(name),
    ):
        with pytest.raises(RaymergeError):
            call()
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


def test_a_directory_of_far_more_than_a_model(
    config: Path, family: tuple[Path, ...], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raymerge.pipeline.stores.local.storage._MAX_FILES", 2)
    assert_told(cli("plan", config), f"{family[0]}: more than 2 files, which are no model")


def test_pairs_of_surrogates(tmp_path: Path, cli: Cli) -> None:
    head = "merge_method: linear\nmodels:\n  - parameters: {weight: 1}\n    model: "
    (tmp_path / "a.yml").write_text(head + '"./a\\ud83d\\ude00b"\n')
    assert_told(cli("plan", tmp_path / "a.yml"), "./a\U0001f600b: no such directory")
    (tmp_path / "b.yml").write_text(head + '"a\\ud83db"\n')
    assert_told(cli("plan", tmp_path / "b.yml"), "b.yml:4: 'a\\ud83db' is not text: half of a pair")
    (tmp_path / "c.yml").write_text(head + '"a\\0b"\n')
    assert_told(cli("plan", tmp_path / "c.yml"), "c.yml:4: 'a\\x00b' has a character that no name may have")


def test_a_regular_expression_that_would_take_for_ever(family: tuple[Path, ...], tmp_path: Path, cli: Cli) -> None:
    rules = [{"filter": "regex:((([a-z0-9_.]+)+)+)+$X", "value": 2}, {"value": 1}]
    models = [{"model": str(family[0]), "parameters": {"weight": rules}}]
    assert cli("plan", write_config(tmp_path / "m.yml", {"merge_method": "linear", "models": models})).code == 0


def test_layer_types_that_are_no_names(family: tuple[Path, ...], config: Path, cli: Cli) -> None:
    path = family[1] / "config.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"layer_types": [[]]}))
    try:
        outcome = cli("plan", config)
        assert (outcome.code, "layer_types [[]]" in outcome.err) == (0, True), outcome.err
    finally:
        path.write_text(before)


def test_a_config_that_is_a_directory(tmp_path: Path, cli: Cli) -> None:
    base, tuned = write_family(tmp_path, 1)
    (tuned / "config.json").unlink()
    (tuned / "config.json").mkdir()
    (tuned / "config.json/x").touch()
    assert_told(cli("plan", config_of(tmp_path, str(base), str(tuned))), f"{tuned}: no config.json")
    (base / "config.json").rename(base / "c")
    (base / "config.json").mkdir()
    assert_told(cli("plan", config_of(tmp_path, str(base), str(tuned))), f"{base}: no config.json")


@pytest.mark.parametrize(
    "change",
    [{"files": [1]}, {"files": {"a": 3}}, {"fingerprint": 3}, {"nonfinite": [3]}, {"models": 3}, {"raymerge": []}],
    ids=str,
)
def test_manifests_with_values_of_other_types(
    config: Path, tmp_path: Path, cli: Cli, change: dict[str, object]
) -> None:
    out = tmp_path / "out"
    assert cli("merge", config, out).code == 0
    (out / MANIFEST).write_text(json.dumps(json.loads((out / MANIFEST).read_text()) | change))
    for command in (("verify", out), ("inspect", out), ("merge", config, out)):
        outcome = cli(*command)
        assert outcome.code in (0, 2)
        assert "Traceback" not in outcome.err
    assert cli("merge", config, out, "--overwrite").code == 0


@pytest.mark.parametrize("command", ["--help", "plan", "inspect", "methods"])
def test_a_full_disk_under_stdout(config: Path, family: tuple[Path, ...], command: str) -> None:
    about = {"plan": [str(config), "--json"], "inspect": [str(family[0])]}.get(command, [])
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "raymerge", command, *about],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    what = "" if command == "--help" else "standard output cannot be written: "
    assert (done.returncode, done.stderr) == (2, f"Error: {what}No space left on device\n")


def test_a_closed_stdout(tmp_path: Path) -> None:
    shell = ["sh", "-c", 'exec "$@" >&-', "sh"]
    done = run_command("inspect", tmp_path / "none", prefix=shell)
    assert done.code == 2
    assert done.err.startswith("Error: ")
    assert "Traceback" not in done.err


def test_a_working_directory_that_was_deleted(config: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    for arguments in (["inspect", "x"], ["merge", str(config), "out"]):
        gone.mkdir()
        command = [sys.executable, "-m", "raymerge", *arguments]
        shell = ["sh", "-c", 'rmdir "$PWD" && exec "$@"', "sh"]
        done = subprocess.run([*shell, *command], cwd=gone, capture_output=True, text=True, check=False)
        said = "Error: the working directory was deleted; change to a directory that is there\n"
        assert (done.returncode, done.stderr) == (2, said)


@pytest.mark.parametrize("escape", ["\x1b[", "\x9b"])
def test_escapes_in_names(tmp_path: Path, cli: Cli, escape: str) -> None:
    (model,) = write_family(tmp_path / f"a{escape}2Jb", 0)
    config = config_of(tmp_path, str(model))
    for command in (("plan", config), ("plan", config, "--json"), ("inspect", model), ("inspect", model, "--json")):
        outcome = cli(*command)
        assert (outcome.code, escape[0] in outcome.out + outcome.err) == (0, False)
        if "--json" in command:
            assert str(model) in json.dumps(json.loads(outcome.out), ensure_ascii=False).replace("\\u001b", "\x1b")
