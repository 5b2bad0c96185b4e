"""What a merge finds in its output directory, and what it makes of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raymerge import Planned, merge, plan
from raymerge.pipeline.errors import ConfigError, OutputError
from tests.checkpoints import read_files, write_config, write_llama
from tests.commands import Cli
from tests.watchers import on, stop_after


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    models = [write_llama(tmp_path / "in" / f"m{k}", k) for k in range(2)]
    for k, model in enumerate(models):
        (model / "sub").mkdir()
        (model / "sub" / f"only-in-{k}.txt").write_text("text")
        (model / f"top-{k}.txt").write_text("text")
        (model / "processor_config.json").write_text(json.dumps([f"sub/only-in-{k}.txt", f"top-{k}.txt"]))
    return models


def make_config(models: list[Path]) -> dict[str, Any]:
    return {
        "merge_method": "linear",
        "models": [{"model": str(model)} for model in models],
        "parameters": {"weight": 1},
    }


def test_overwriting_a_model_leaves_nothing_of_it(models: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "a" / "merged"
    merge(make_config(models), out, shard_size=3000)
    assert "sub/only-in-0.txt" in read_files(out)
    with pytest.raises(OutputError, match=r"is not empty \(README.md, .*--overwrite"):
        merge(make_config(models[::-1]), out)
    merge(make_config(models[::-1]), out, overwrite=True)
    merge(make_config(models[::-1]), tmp_path / "b" / "merged")
    assert read_files(out) == read_files(tmp_path / "b" / "merged")


def test_overwriting_the_same_model_makes_it_again(models: list[Path], tmp_path: Path) -> None:
    merge(make_config(models), tmp_path / "merged")
    before = (tmp_path / "merged" / "model.safetensors").stat().st_mtime_ns
    report = merge(make_config(models), tmp_path / "merged", overwrite=True)
    assert (report.num_resumed, report.num_shards) == (0, 1)
    assert report.written_nbytes
    assert (tmp_path / "merged" / "model.safetensors").stat().st_mtime_ns != before


def test_overwriting_what_another_tool_made(models: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "merged"
    write_llama(out, 7, num_shards=3)
    names = ("pytorch_model.bin", "pytorch_model.bin.index.json", "LICENSE", "README.md", "modeling_x.py", "vocab.txt")
    for name in names:
        (out / name).write_bytes(b"of an earlier model")
    (out / ".git").mkdir()
    (out / ".git" / "HEAD").write_text("kept")
    merge(make_config(models), out, overwrite=True)
    merge(make_config(models), tmp_path / "fresh" / "merged")
    assert read_files(out) == read_files(tmp_path / "fresh" / "merged") | {".git/HEAD": b"kept"}


def test_a_killed_overwrite_can_be_repeated(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many files it had deleted: the rest counts as half a model, and nothing of it is left at the end."""
    fresh = tmp_path / "fresh" / "merged"
    merge(make_config(models[::-1]), fresh)
    unlink = Path.unlink
    for number in (0, 1, 4, 11):
        out = tmp_path / f"{number}" / "merged"
        merge(make_config(models), out, shard_size=3000)
        left = number

        def break_down(self: Path, missing_ok: bool = False) -> None:
            nonlocal left
            if self.name != "lock" and not self.name.endswith(".partial"):
                if not left:
                    raise RuntimeError("killed")
                left -= 1
            unlink(self, missing_ok)

        monkeypatch.setattr(Path, "unlink", break_down)
        with pytest.raises(RuntimeError, match="killed"):
            merge(make_config(models[::-1]), out, overwrite=True)
        monkeypatch.undo()
        assert number == 0 or not (out / "config.json").exists()
        with pytest.raises(OutputError, match="--overwrite"):
            merge(make_config(models[::-1]), out)
        merge(make_config(models[::-1]), out, overwrite=True)
        assert read_files(out) == read_files(fresh)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "files",
    [
        ["notes.txt"],
        ["config.json", "src/main.py"],
        [".git/HEAD"],
        ["models/one/model.safetensors", "models/one/config.json", "README.md"],
        ["model.safetensors", "config.json", "checkpoint-5/model.safetensors"],
        ["firmware.bin", "thesis.txt"],
        ["model.safetensors", "config.json", "train.py"],
        ["model.safetensors", "config.json", "notes.md"],
        ["model-00001-of-00002.safetensors", "config.json", "optimizer.pt"],
        ["model.safetensors", "config.json", "results.json", "other.safetensors"],
        ["embeddings.safetensors", "notes.txt"],
    ],
    ids="+".join,
)
def test_what_is_no_model_is_left_alone(
    files: list[str], overwrite: bool, models: list[Path], tmp_path: Path, cli: Cli
) -> None:
    out = tmp_path / "out"
    for name in files:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(name)
    before = read_files(out)
    config = write_config(tmp_path / "merge.yml", make_config(models))
    outcome = cli("merge", config, out, "-q", *(["--overwrite"] if overwrite else []))
    assert outcome.code == 2
    assert outcome.err.startswith(f"Error: {out} ")
    assert ("nothing was deleted" in outcome.err) is overwrite
    assert overwrite or "--overwrite" not in outcome.err, "advice that would be refused"
    assert read_files(out) == before


@pytest.mark.parametrize("where", ["in/m0", "in", "in/m0/merged", "link/merged"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_output_and_inputs_may_not_overlap(
    where: str, overwrite: bool, models: list[Path], tmp_path: Path, cli: Cli
) -> None:
    (tmp_path / "link").symlink_to(models[1])
    before = read_files(tmp_path / "in")
    config = write_config(tmp_path / "merge.yml", make_config(models))
    outcome = cli("merge", config, tmp_path / where, "-q", *(["--overwrite"] if overwrite else []))
    assert outcome.code == 2
    assert "overlap; choose another output directory" in outcome.err
    assert str(tmp_path / where) in outcome.err
    assert read_files(tmp_path / "in") == before


def test_inputs_that_give_no_tensors_are_not_overwritten(models: list[Path], tmp_path: Path) -> None:
    """The base gives config.json and the tokenizer, and is in no slice."""
    config = {
        "merge_method": "passthrough",
        "base_model": str(models[0]),
        "slices": [{"sources": [{"model": str(models[1]), "layer_range": [0, 2]}]}],
    }
    before = read_files(tmp_path)
    with pytest.raises(ConfigError, match="overlap"):
        merge(config, models[0], overwrite=True)
    assert read_files(tmp_path) == before


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("where", ["store", "store/deeper"])
def test_files_that_inputs_link_to_are_not_overwritten(
    name: str, where: str, models: list[Path], tmp_path: Path
) -> None:
    out = write_llama(tmp_path / "store", 5)
    (models[0] / "pytorch_model.bin").write_bytes(b"pickled")
    target = tmp_path / where / name
    target.parent.mkdir(exist_ok=True)
    (models[0] / name).replace(target)
    (models[0] / name).symlink_to(target)
    before = read_files(tmp_path)
    with pytest.raises(ConfigError, match=f"m0/{name} overlap"):
        merge(make_config(models), out, overwrite=True)
    assert read_files(tmp_path) == before


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize("name", ["thesis.txt", "pytorch_model.bin", "sub/notes.txt"])
def test_overwriting_deletes_only_what_was_made(
    name: str, is_finished: bool, models: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    if is_finished:
        merge(make_config(models), out, shard_size=3000)
    else:
        with pytest.raises(RuntimeError, match="the driver broke"):
            merge(make_config(models), out, shard_size=3000, on_event=stop_after(1))
    (out / "sub").mkdir(exist_ok=True)
    (out / name).write_text("text")
    before = read_files(out)
    with pytest.raises(OutputError, match=rf"holds more than a model \({name}\); nothing was deleted"):
        merge(make_config(models[::-1]), out, overwrite=True)
    assert read_files(out) == before
    (out / name).unlink()
    merge(make_config(models[::-1]), out, overwrite=True)
    assert not [file for file in read_files(out) if file.startswith(".raymerge")]


def test_what_is_left_of_a_journal_is_in_nobodys_way(models: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "merged"
    (out / ".raymerge").mkdir(parents=True)
    (out / ".raymerge" / "model.safetensors.json").write_text("{}")
    merge(make_config(models), out)
    assert not (out / ".raymerge").exists()


def test_room_is_compared_before_any_work(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "merged"
    config = make_config(models)
    the_plan = plan(config, shard_size=3000)
    needed = sum(task.nbytes for task in the_plan.tasks) + sum(file.nbytes for file in the_plan.outputs[0].side_files)

    def pretend(free_nbytes: int) -> None:
        status = SimpleNamespace(f_blocks=9, f_frsize=1, f_bavail=free_nbytes, f_bfree=free_nbytes)
        monkeypatch.setattr(os, "statvfs", lambda path: status)

    pretend(needed - 1)
    with pytest.raises(OutputError, match=rf"{needed:,} bytes are still .* {needed - 1:,} are free in {tmp_path};"):
        merge(config, out, shard_size=3000)
    assert not out.exists()
    pretend(needed)
    with pytest.raises(RuntimeError, match="the driver broke"):
        merge(config, out, shard_size=3000, workers=1, on_event=stop_after(1))
    pretend(needed - the_plan.tasks[0].nbytes)  # some of it is there by now
    merge(config, out, shard_size=3000)
    pretend(5000)
    merge(config, out, shard_size=3000, overwrite=True)


def test_urls(models: list[Path], tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path / "merge.yml", make_config(models))
    before = read_files(tmp_path)
    for arguments in (("merge", config, "s3:/bucket/merged", "-q"), ("verify", "s3:/bucket/merged")):
        outcome = cli(*arguments)
        assert outcome.code == 2
        assert "did you mean s3://bucket/merged?" in outcome.err
    assert read_files(tmp_path) == before
    url = f"file://{tmp_path}/my%20model"
    assert cli("merge", config, url, "-q").code == 0
    assert cli("verify", url).code == 0
    assert (tmp_path / "my model" / "config.json").exists()


def test_directories_side_by_side_do_not_overlap(models: list[Path], tmp_path: Path) -> None:
    merge(make_config(models), tmp_path / "in" / "m0-merged")
    assert (tmp_path / "in" / "m0-merged" / "config.json").exists()


def test_another_tokenizer_is_another_merge(models: list[Path], tmp_path: Path) -> None:
    """The tensors are the same, and would be reused; the model is not."""
    merge(make_config(models), tmp_path / "merged")
    (models[0] / "tokenizer_config.json").write_text('{"other": true}')
    with pytest.raises(OutputError, match="--overwrite"):
        merge(make_config(models), tmp_path / "merged")
    merge(make_config(models), tmp_path / "merged", overwrite=True)
    assert (tmp_path / "merged" / "tokenizer_config.json").read_text() == '{"other": true}'


def test_a_donor_that_changes_during_the_merge(models: list[Path], tmp_path: Path) -> None:
    path = models[0] / "tokenizer_config.json"
    change = on(Planned, lambda _: path.write_text("{}".ljust(path.stat().st_size)))
    with pytest.raises(OSError, match=r"tokenizer_config\.json: changed since the plan was made"):
        merge(make_config(models), tmp_path / "merged", on_event=change)
    assert not (tmp_path / "merged" / "config.json").exists()


def test_overwrite_where_there_is_nothing(models: list[Path], tmp_path: Path, cli: Cli) -> None:
    config = write_config(tmp_path / "merge.yml", make_config(models))
    assert cli("merge", config, tmp_path / "new", "-q", "--overwrite").code == 0
    assert cli("verify", tmp_path / "new").code == 0


def test_a_file_in_the_output_s_place_is_told_by_plan_and_merge(models: list[Path], tmp_path: Path, cli: Cli) -> None:
    config, out = write_config(tmp_path / "merge.yml", make_config(models)), tmp_path / "taken"
    out.write_text("mine")
    planned, merged = cli("plan", config, out), cli("merge", config, out)
    assert (planned.code, merged.code) == (0, 2)
    assert f"warning: `raymerge merge` refuses this output: {out} is a file; choose a directory" in planned.err
    assert merged.err.splitlines() == [f"Error: {out} is a file; choose a directory"]
    assert out.read_text() == "mine"


def test_a_mistyped_directory_is_suggested_where_the_hub_cannot_be_asked(
    models: list[Path], tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://no-such-host.invalid")
    monkeypatch.chdir(tmp_path)
    outcome = cli("inspect", "in/m0x")
    assert outcome.code == 2
    assert "no such directory; did you mean" in outcome.err
    assert "there is no host no-such-host.invalid" in outcome.err
