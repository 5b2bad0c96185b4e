"""What goes wrong after planning: outputs that cannot be written, and inputs that change meanwhile."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from raymerge import Event, Planned, merge
from raymerge.pipeline.cli.display.merge import Display
from raymerge.pipeline.errors import FetchError
from raymerge.pipeline.plan.results import ShardResult
from raymerge.pipeline.stores.local import writer as local_writer
from raymerge.pipeline.stores.local.storage import LocalStorage
from tests.checkpoints import (
    INDEX,
    llama_config,
    llama_tensors,
    read_files,
    write_checkpoint,
    write_config,
    write_llama,
)
from tests.commands import Cli, Outcome
from tests.watchers import Keep


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [write_llama(tmp_path / f"m{k}", k, 4, num_shards=2) for k in range(2)]


def linear(models: list[Path]) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": str(m)} for m in models], "parameters": {"weight": 1}}


@pytest.fixture
def config(models: list[Path], tmp_path: Path) -> Path:
    return write_config(tmp_path / "merge.yml", linear(models))


def assert_refused(outcome: Outcome, out: Path, *named: str | Path) -> None:
    assert outcome.code == 2, outcome.err
    assert outcome.err.startswith("Error: ")
    assert outcome.err.count("\n") == 1
    for text in named:
        assert str(text) in outcome.err
    assert not (out / "config.json").exists()
    assert not (out / INDEX).exists()


@contextmanager
def mounted(directory: Path, options: str) -> Iterator[None]:
    """Mount an empty file system; skip the test where this is not allowed."""
    mount = shutil.which("mount")
    if os.geteuid() or mount is None:
        pytest.skip("only root can mount")
    directory.mkdir(exist_ok=True)
    done = subprocess.run([mount, "-t", "tmpfs", "-o", options, "tmpfs", directory], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("cannot mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


@pytest.mark.parametrize("below", ["", "/merged", "/deeper/merged"])
def test_output_below_a_file(below: str, config: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "file").write_text("content")
    out = Path(f"{tmp_path}/file{below}")
    outcome = cli("merge", config, out, "-q")
    reason = "a part of the path is a file: choose another directory" if below else "is a file; choose a directory"
    assert_refused(outcome, out, out, reason)
    assert (tmp_path / "file").read_text() == "content"


def test_output_on_a_read_only_file_system(config: Path, tmp_path: Path, cli: Cli) -> None:
    with mounted(tmp_path / "mount", "ro"):
        out = tmp_path / "mount" / "merged"
        assert_refused(cli("merge", config, out, "-q"), out, out, "read-only: choose another directory")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_without_permission(config: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    out = tmp_path / "locked" / "merged"
    assert_refused(cli("merge", config, out, "-q"), out, out, "choose a directory that you may write to")


def reserve_nothing(descriptor: int, nbytes: int) -> None:
    """Stands in for file systems that cannot set room aside: only writing shows that there is none."""


@pytest.mark.parametrize("can_reserve", [True, False])
def test_full_disk(can_reserve: bool, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up while a merge runs; with more room the rest is made, and finished shards are kept."""
    monkeypatch.setattr(LocalStorage, "check_space", lambda self, url, nbytes: None)
    if not can_reserve:
        monkeypatch.setattr(local_writer, "_reserve", reserve_nothing)
    tensors = llama_tensors(0, 4, vocab=20_000)
    model = write_checkpoint(tmp_path / "in", tensors, llama_config(4, vocab_size=20_000))
    config = write_config(tmp_path / "merge.yml", linear([model]))
    with mounted(tmp_path / "mount", "size=1900k"):
        out = tmp_path / "mount" / "merged"
        outcome = cli("merge", config, out, "-q", "--workers", "1", "--shard-size", "20kB")
        assert_refused(outcome, out, "No space left", out, "free in", "free space and run the same command again")
        finished = sorted(path.name for path in out.glob("*.safetensors"))
        assert finished
        assert not list((out / ".raymerge").glob("*.partial"))
        subprocess.run(["mount", "-o", "remount,size=20m", tmp_path / "mount"], check=True)
        before = {name: (out / name).stat().st_mtime_ns for name in finished}
        outcome = cli("merge", config, out, "--workers", "1", "--shard-size", "20kB")
        assert outcome.code == 0, outcome.err
        assert f"{len(finished)} of " in outcome.err
        assert {name: (out / name).stat().st_mtime_ns for name in finished} == before
        merge(config, tmp_path / "merged", shard_size="20kB")
        assert read_files(out) == read_files(tmp_path / "merged")


LIMITED = """
import resource, sys
from raymerge.pipeline.stores.local import writer as local_writer
from raymerge.pipeline.cli.app import main
resource.setrlimit(resource.RLIMIT_FSIZE, (%d, resource.RLIM_INFINITY))
local_writer._reserve = lambda descriptor, nbytes: None
sys.argv = ["raymerge", "merge", *sys.argv[1:]]
main()
"""


def test_limit_on_file_sizes(tmp_path: Path) -> None:
    """Stands in for a disk that fills up, where nobody may mount one: a write fails in the middle of a shard."""
    tensors = llama_tensors(0, 2, vocab=200_000)
    model = write_checkpoint(tmp_path / "in", tensors, llama_config(vocab_size=200_000))
    config, out = write_config(tmp_path / "merge.yml", linear([model])), tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", LIMITED % 5_000_000, config, out, "-q"], capture_output=True, text=True, check=False
    )
    outcome = Outcome(done.returncode, done.stdout, done.stderr)
    assert_refused(outcome, out, out / "model.safetensors", "smaller --shard-size")
    assert not list(out.rglob("*.partial"))
    merge(config, out)
    assert (out / "config.json").exists()


def rewrite(path: Path) -> None:
    """Write a file again, as a training run would that saves to the same place: same size, other values."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def replace(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes())
    other.replace(path)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("change", [rewrite, replace, shorten, remove])
def test_input_that_changes_after_planning(
    change: Callable[[Path], None],
    config: Path,
    models: list[Path],
    tmp_path: Path,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    victim = models[1] / "model-00002-of-00002.safetensors"
    show = Display.show

    def show_and_change(self: Display, event: Event) -> None:
        show(self, event)
        if isinstance(event, Planned):
            change(victim)

    monkeypatch.setattr(Display, "show", show_and_change)
    outcome = cli("merge", config, tmp_path / "out", "-q")
    assert_refused(outcome, tmp_path / "out", victim)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_input_that_changes_during_the_merge(models: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    victim = models[0] / "model-00001-of-00002.safetensors"
    keep = Keep()

    def change(event: Event) -> None:
        keep(event)
        if isinstance(event, ShardResult):
            rewrite(victim)

    with pytest.raises(FetchError, match=r"changed since the plan was made|cut short while it was read"):
        merge(linear(models), out, workers=1, shard_size=1, on_event=change)
    assert 0 < len(keep.list(ShardResult)) < len(keep.plan.tasks)
    assert not (out / "config.json").exists()
    assert not (out / INDEX).exists()
    with pytest.raises(OSError, match="unfinished merge of another config, seed, --shard-size, set of inputs, file of"):
        merge(linear(models), out, shard_size=1)
    merge(linear(models), out, shard_size=1, overwrite=True)
    merge(linear(models), tmp_path / "fresh" / "out", shard_size=1)
    assert read_files(out) == read_files(tmp_path / "fresh" / "out")


@pytest.mark.parametrize("memory", ["1MiB", "0", "-1GiB", "4 potatoes", "1", ""])
def test_memory_that_does_not_do(memory: str, config: Path, tmp_path: Path, cli: Cli) -> None:
    outcome = cli("merge", config, tmp_path / "out", "-q", "--memory", memory)
    assert_refused(outcome, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_smallest_memory_that_is_named_works(config: Path, tmp_path: Path, cli: Cli) -> None:
    outcome = cli("merge", config, tmp_path / "out", "-q", "--memory", "1MiB")
    smallest = outcome.err.split("--memory ")[1].strip()
    assert cli("merge", config, tmp_path / "out", "-q", "--memory", smallest).code == 0
    mebibytes = int(smallest.removesuffix("MiB")) - 1
    assert cli("merge", config, tmp_path / "other", "-q", "--memory", f"{mebibytes}MiB").code == 2
