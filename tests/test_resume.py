"""Merges that are killed, stopped or run again."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from raymerge import merge, verify
from raymerge.pipeline.errors import OutputError
from raymerge.pipeline.output.verify import check_shard
from raymerge.pipeline.plan.results import ShardFile, ShardResult
from raymerge.pipeline.stores.open import Stores
from tests.checkpoints import INDEX, read_files, write_config, write_family
from tests.commands import PATIENCE_SECONDS, Cli, run_command, start_command
from tests.holding import start_held
from tests.watchers import on, stop_after

JOURNAL = ".raymerge"
MANY = ("--shard-size", "1", "--workers", "2")
"""A file for each tensor: a run that takes a second or more."""


def make_config(family: tuple[Path, ...], **more: Any) -> dict[str, Any]:
    models = [{"model": str(model), "parameters": {"weight": 0.5}} for model in family[1:]]
    return {"merge_method": "dare_ties", "base_model": str(family[0]), "models": models} | {
        "parameters": {"density": 0.5},
        **more,
    }


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    return write_family(tmp_path_factory.mktemp("family"), 2, num_layers=30, dtype=torch.bfloat16, num_shards=2)


@pytest.fixture(scope="module")
def config(family: tuple[Path, ...]) -> Path:
    return write_config(family[0].parent / "merge.yml", make_config(family))


@pytest.fixture(scope="module")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "merged"
    merge(config, out, shard_size=1)
    return read_files(out)


def records(out: Path) -> list[str]:
    """The shards that the journal calls finished."""
    return sorted(path.name.removesuffix(".json") for path in (out / JOURNAL).glob("*.safetensors.json"))


def wait_for_records(process: Popen[str], out: Path, number: int) -> None:
    while process.poll() is None and len(records(out)) < number:
        time.sleep(0.002)


def identities(out: Path, names: list[str]) -> Mapping[str, tuple[int, int]]:
    return {name: ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) for name in names}


def assert_not_loadable(out: Path) -> None:
    assert not (out / INDEX).exists()
    assert not (out / "config.json").exists()
    with pytest.raises(ValueError, match="Unrecognized model"):
        AutoConfig.from_pretrained(out)


@pytest.mark.slow
def test_kill_at_any_moment(config: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "merged"
    num_shards = sum(name.endswith(".safetensors") for name in undisturbed)
    dice = random.Random(1)
    finished: list[str] = []
    for number, target in enumerate((0.02, 0.2, 0.5, 0.8)):
        wanted = int(num_shards * target) + dice.randrange(10)
        process = start_held(tmp_path / str(number), wanted + 30 - len(finished), "merge", config, out, *MANY)
        wait_for_records(process, out, wanted)
        time.sleep(dice.random() * 0.02)
        process.kill()
        process.communicate()
        before = identities(out, finished)
        assert process.returncode == -signal.SIGKILL
        assert_not_loadable(out)
        assert set(finished) <= set(records(out))
        assert identities(out, finished) == before
        finished = records(out)
    assert 0 < len(finished) < num_shards
    before = identities(out, finished)
    report = merge(config, out, shard_size=1)
    assert report.num_resumed == len(finished)
    assert identities(out, finished) == before
    assert read_files(out) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_a_closed_terminal(
    config: Path, undisturbed: dict[str, bytes], tmp_path: Path, cli: Cli, number: signal.Signals
) -> None:
    out = tmp_path / "merged"
    process = start_held(tmp_path / "hold", 40, "merge", config, out, *MANY)
    wait_for_records(process, out, 20)
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "Interrupted. What is finished is kept: run the same command again to go on."
    assert "Traceback" not in err
    num_finished = len(records(out))
    assert 20 <= num_finished < len([name for name in undisturbed if name.endswith(".safetensors")])
    assert not list((out / JOURNAL).glob("*.partial"))
    assert_not_loadable(out)
    outcome = cli("merge", config, out, *MANY)
    assert f"{num_finished} of " in outcome.err
    assert read_files(out) == undisturbed


@pytest.mark.slow
def test_a_closed_terminal_under_nohup(config: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "merged"
    process = start_held(tmp_path / "hold", 40, "merge", config, out, *MANY, prefix=("nohup",))
    wait_for_records(process, out, 20)
    process.send_signal(signal.SIGHUP)
    (tmp_path / "hold" / "go").touch()
    _, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, err
    assert read_files(out) == undisturbed


@pytest.mark.slow
def test_a_killed_worker_costs_its_shard_alone(config: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "merged"
    process = start_held(tmp_path / "hold", 20, "merge", config, out, *MANY)
    wait_for_records(process, out, 20)
    while len(list((tmp_path / "hold").iterdir())) < 22:  # either has a shard in work
        assert process.poll() is None
        time.sleep(0.01)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[0]), signal.SIGKILL)
    (tmp_path / "hold" / "go").touch()
    _, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, err
    assert "retried: workers: shard: its worker process was killed by SIGKILL" in err
    assert read_files(out) == undisturbed


@pytest.fixture
def half(config: Path, tmp_path: Path) -> Path:
    """An output with about half of its shards."""
    out = tmp_path / "merged"
    with pytest.raises(RuntimeError, match="the driver broke"):
        merge(config, out, shard_size=1, workers=1, on_event=stop_after(100))
    assert len(records(out)) >= 100
    assert_not_loadable(out)
    return out


def flip_byte(path: Path, offset: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_damaged_shards_are_made_again(config: Path, half: Path, undisturbed: dict[str, bytes]) -> None:
    names = records(half)
    flip_byte(half / names[0])
    flip_byte(half / names[1], 12)
    (half / names[2]).write_bytes((half / names[2]).read_bytes()[:-1])
    (half / names[3]).unlink()
    flip_byte(half / JOURNAL / f"{names[4]}.json", 0)
    (half / JOURNAL / f"{names[5]}.json").write_bytes(b"\xff\x00")
    (half / JOURNAL / f"{names[6]}.json").write_text("[]")
    (half / JOURNAL / f"{names[7]}.json").unlink()
    (half / JOURNAL / f"{names[8]}.partial").write_bytes(b"half a shard")
    record = json.loads((half / JOURNAL / f"{names[9]}.json").read_text())
    (half / JOURNAL / f"{names[9]}.json").write_text(json.dumps(record | {"fingerprint": "another"}))
    (half / JOURNAL / f"{names[10]}.json").write_text(json.dumps(record))  # another shard's
    sound = [*names[11:], names[8]]
    before = identities(half, sound)
    report = merge(config, half, shard_size=1)
    assert report.num_resumed == len(sound)
    assert identities(half, sound) == before
    assert read_files(half) == undisturbed


def damage_unseen(path: Path) -> None:
    """Change a file's content behind its size and time, as a failing disk does."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read()[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_recheck(config: Path, half: Path, undisturbed: dict[str, bytes], cli: Cli) -> None:
    damaged = records(half)[:2]
    for name in damaged:
        damage_unseen(half / name)
    num_finished = len(records(half))
    report = merge(config, half, shard_size=1, recheck=True)
    assert report.num_resumed == num_finished - len(damaged)
    assert read_files(half) == undisturbed
    damage_unseen(half / damaged[0])
    assert cli("merge", config, half, *MANY).code == 0
    refused = cli("merge", config, half, *MANY, "--recheck")
    assert (refused.code, refused.out) == (2, "")
    assert f"  {damaged[0]}: sha256 is " in refused.err
    assert "give --overwrite to make it again" in refused.err
    assert cli("merge", config, half, *MANY, "--overwrite").code == 0
    assert cli("merge", config, half, *MANY, "--recheck").code == 0


def test_a_finished_shard_that_disappears_while_it_is_looked_at(half: Path, stores: Stores) -> None:
    gone = ShardFile(records(half)[0], 1, "", "", (), {})
    (half / gone.file).unlink()
    found = check_shard(stores, (0, gone), lambda progress: None, outs=[str(half)], recheck=False)
    assert found is None


def test_what_another_plan_has_left_is_not_reused(
    family: tuple[Path, ...], half: Path, tmp_path: Path, cli: Cli
) -> None:
    other = write_config(tmp_path / "other.yml", make_config(family, parameters={"density": 0.6}))
    same = family[0].parent / "merge.yml"
    shutil.copytree(family[0], tmp_path / "copy")
    moved = write_config(tmp_path / "moved.yml", make_config((tmp_path / "copy", *family[1:])))
    before = read_files(half)
    for arguments in (
        (other, half, *MANY),
        (same, half, *MANY, "--seed", "1"),
        (same, half, "--shard-size", "5kB"),
        (moved, half, *MANY),
    ):
        outcome = cli("merge", *arguments)
        assert outcome.code == 2
        assert (
            "unfinished merge of another config, seed, --shard-size, set of inputs, file of --ops or version"
            in outcome.err
        )
        assert "--overwrite" in outcome.err
    assert read_files(half) == before
    outcome = cli("merge", same, half, *MANY, "--seed", "1", "--overwrite")
    assert outcome.code == 0, outcome.err
    assert "finished and sound" not in outcome.err
    merge(same, tmp_path / "fresh" / "merged", shard_size=1, seed=1)
    assert read_files(half) == read_files(tmp_path / "fresh" / "merged")


def test_two_runs_at_once(config: Path, tmp_path: Path) -> None:
    refusals: list[str] = []

    def run_again(_: ShardResult) -> None:
        if not refusals:
            with pytest.raises(OutputError) as caught:
                merge(config, tmp_path / "merged")
            refusals.append(str(caught.value))

    merge(config, tmp_path / "merged", on_event=on(ShardResult, run_again))
    assert "another raymerge run (pid " in refusals[0]
    assert "choose another directory" in refusals[0]
    merge(config, tmp_path / "alone" / "merged")
    assert read_files(tmp_path / "merged") == read_files(tmp_path / "alone" / "merged")


def test_a_second_run_that_waits(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    second: list[Popen[str]] = []

    def run_again(_: ShardResult) -> None:
        if not second:
            second.append(start_command("merge", config, out, "--wait"))
            assert second[0].stderr
            for line in second[0].stderr:
                if line.startswith("waiting: another raymerge run (pid "):
                    return
            raise AssertionError("the second run has ended")

    merge(config, out, on_event=on(ShardResult, run_again))
    printed, _ = second[0].communicate(timeout=PATIENCE_SECONDS)
    assert second[0].returncode == 0
    assert "was complete already" in printed


def test_finished_already(config: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "merged"
    merge(config, out)
    names = list(read_files(out))
    before = identities(out, names)
    outcome = run_command("merge", config, out, "--memory", "64MiB", "--workers", "1")
    assert outcome.code == 0
    assert "was complete already" in outcome.out
    assert identities(out, names) == before
    assert not (out / JOURNAL).exists()
    report = merge(config, out)
    assert (report.was_complete, report.num_resumed, report.written_nbytes) == (True, report.num_shards, 0)
    shard = next(out.glob("*.safetensors"))
    nbytes = shard.stat().st_size
    os.truncate(shard, 100)
    outcome = cli("merge", config, out)
    assert outcome.code == 2
    assert f"{shard.name} has 100 bytes instead of {nbytes:,}; give --overwrite to make it again" in outcome.err
    (out / "tokenizer_config.json").unlink()
    outcome = cli("merge", config, out)
    assert outcome.code == 2
    assert "tokenizer_config.json is missing; give --overwrite to make it again" in outcome.err


def test_killed_before_the_rest_is_written(
    config: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All shards are finished: the next run writes what is missing, and says so."""
    out = tmp_path / "merged"
    replace = Path.replace

    def break_down(self: Path, target: Path) -> Path:
        if target.name == "tokenizer_config.json":
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", break_down)
        with pytest.raises(KeyboardInterrupt):
            merge(config, out)
    assert_not_loadable(out)
    assert {path.name for path in out.iterdir() if path.suffix == ".partial"} == set()
    outcome = cli("merge", config, out)
    assert outcome.code == 0
    assert "was complete already" not in outcome.out
    assert not [name for name in read_files(out) if name.endswith(".partial")]
    assert verify(out).num_tensors == 273


@pytest.mark.parametrize("num_deleted", range(4))
def test_killed_while_the_journal_is_deleted(
    num_deleted: int, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is complete by then; nothing is made again."""
    out = tmp_path / "merged"
    unlink = Path.unlink
    left = num_deleted

    def break_down(self: Path, missing_ok: bool = False) -> None:
        nonlocal left
        if self.parent.name == JOURNAL and self.suffix == ".json":
            if not left:
                raise RuntimeError("killed")
            left -= 1
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", break_down)
    with pytest.raises(RuntimeError, match="killed"):
        merge(config, out, shard_size="20kB")
    monkeypatch.undo()
    files = read_files(out)
    shards = [name for name in files if name.endswith(".safetensors")]
    before = identities(out, shards)
    assert verify(out).num_tensors == 273
    report = merge(config, out, shard_size="20kB")
    assert (report.num_resumed, report.num_shards) == (len(shards), len(shards))
    assert identities(out, shards) == before
    assert read_files(out) == {name: content for name, content in files.items() if not name.startswith(JOURNAL)}
