"""The calls of one merge, in their order: what is read and written when, and who is told."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from raymerge import ConfigError, Event, OutputError, Planned, Progressed, Resumed, ShardResult, merge, plan
from raymerge.pipeline.driver import check_output, merge_variants
from raymerge.pipeline.stores.files import Buffer, ByteRange
from raymerge.pipeline.stores.local.storage import LocalStorage
from tests.checkpoints import INDEX, read_files, write_config, write_family, write_llama
from tests.watchers import list_recorded, stop_after

Config = dict[str, Any]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    return write_family(tmp_path_factory.mktemp("family"), 1, num_shards=2, dtype=torch.bfloat16, vocab=500)


@pytest.fixture
def config(family: tuple[Path, ...]) -> Config:
    models = [{"model": str(model), "parameters": {"weight": 0.5}} for model in family]
    return {"merge_method": "linear", "models": models}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[ByteRange]:
    """Every range of a tensor file that is read."""
    found: list[ByteRange] = []
    read_into = LocalStorage.read_into

    def read(storage: LocalStorage, ranges: Sequence[ByteRange], buffers: Sequence[Buffer]) -> None:
        found.extend(piece for piece in ranges if piece.file.url.endswith(".safetensors"))
        read_into(storage, ranges, buffers)

    monkeypatch.setattr(LocalStorage, "read_into", read)
    return found


@pytest.mark.parametrize("doubt", ["stale index", "head", "layers"])
def test_strict_refuses_what_is_doubtful_in_models(doubt: str, tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model", seed=1, tie_word_embeddings=doubt == "head", global_attn_every_n_layers=3)
    layers = [{"sources": [{"model": str(model), "layer_range": [k, 2]}]} for k in (0, 1)]
    config: Config = {"merge_method": "passthrough", "models": [{"model": str(model)}]}
    if doubt == "layers":
        config = {"merge_method": "passthrough", "slices": layers}
    if doubt == "stale index":
        (model / INDEX).write_text('{"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}')
    (warning,) = plan(config).warnings
    for call in (plan, partial(merge, out=tmp_path / "out")):
        with pytest.raises(ConfigError) as caught:
            call(config, strict=True)
        assert str(caught.value) == f"refused because of strict:\n  {warning}\nput these right, or leave strict out"
    assert not (tmp_path / "out").exists()


def header_nbytes(path: str) -> int:
    with Path(path).open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def test_a_plan_reads_headers_and_writes_nothing(
    config: Config, family: tuple[Path, ...], reads: list[ByteRange], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = [read_files(model) for model in family]
    the_plan = plan(config, out=tmp_path / "out")
    assert {piece.file.url for piece in reads} == {str(p) for m in family for p in m.glob("*.safetensors")}
    # The first read takes some kilobytes, which may be more than the header.
    assert all(piece.stop <= max(header_nbytes(piece.file.url), 2**17) for piece in reads)
    assert the_plan.total_nbytes > sum(piece.nbytes for piece in reads) / 4
    assert list(tmp_path.iterdir()) == []
    assert [read_files(model) for model in family] == before


def test_every_way_to_give_a_config_is_one_merge(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_config(tmp_path / "merge.yml", config)
    ways: list[Path | str | Config] = [config, path, str(path), "merge.yml", path.read_text()]
    assert len({plan(way).fingerprint for way in ways}) == 1
    for number, way in enumerate(ways):
        merge(way, f"out{number}")
        assert read_files(tmp_path / f"out{number}") == read_files(tmp_path / "out0")


@pytest.mark.parametrize("workers", [1, 2])
def test_events_come_in_order_and_in_the_callers_thread(config: Config, workers: int, tmp_path: Path) -> None:
    out = tmp_path / "out"
    events: list[Event] = []

    def note(event: Event) -> None:
        assert threading.get_ident() == caller
        if isinstance(event, Planned):
            assert not out.exists()
        if isinstance(event, ShardResult):
            assert (out / event.file).stat().st_size == event.nbytes
            assert not (out / "config.json").exists()
        if not isinstance(event, Progressed):
            events.append(event)

    caller = threading.get_ident()
    report = merge(config, out, on_event=note, workers=workers, shard_size="10kB")
    planned, resumed, *shards, last = events
    assert isinstance(planned, Planned)
    assert planned.plan is not None
    assert resumed == Resumed(0, 0)
    files = [task.file for task in planned.plan.tasks]
    assert len(files) > 2
    assert sorted(shard.file for shard in shards if isinstance(shard, ShardResult)) == files
    assert len(shards) == len(files)
    assert last == report
    assert (report.num_shards, report.num_resumed, report.was_complete) == (len(files), 0, False)
    assert report.num_tensors == len(planned.plan.weight_map)
    assert report.written_nbytes >= planned.plan.total_nbytes


def test_a_complete_output_is_not_touched(config: Config, reads: list[ByteRange], tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(config, out)
    before = look_at(out)
    reads.clear()
    report = merge(config, out)
    assert report.was_complete
    assert all(piece.stop <= max(header_nbytes(piece.file.url), 2**17) for piece in reads)
    assert look_at(out) == before


def look_at(directory: Path) -> dict[str, tuple[int, int, int]]:
    """Return what a write to a file would change."""
    found = {path: path.stat() for path in directory.rglob("*")}
    return {str(path): (info.st_ino, info.st_size, info.st_mtime_ns) for path, info in found.items()}


def test_check_output_writes_nothing(
    config: Config, family: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    the_plan = plan(config)
    assert check_output(the_plan, "./out/") == str(tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match=r"not empty \(thesis\.txt\)"):
        check_output(the_plan, tmp_path / "other")
    with pytest.raises(OutputError, match="does not look like a model"):
        check_output(the_plan, tmp_path / "other", overwrite=True)
    with pytest.raises(ConfigError, match="overlap"):
        check_output(the_plan, family[0] / "out")
    assert read_files(tmp_path) == {"other/thesis.txt": b"years of work"}


def test_nothing_stays_open_after_a_merge_that_failed(config: Config, tmp_path: Path) -> None:
    def list_open() -> list[str]:
        links = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
        return [link for link in links if str(tmp_path) in link]

    threads = set(threading.enumerate())
    with pytest.raises(RuntimeError):
        merge(config, tmp_path / "out", workers=1, shard_size="10kB", on_event=stop_after(1))
    assert list_open() == []
    assert set(threading.enumerate()) <= threads
    made = len(list_recorded(tmp_path / "out"))
    assert merge(config, tmp_path / "out", workers=1, shard_size="10kB").num_resumed == made >= 1


@pytest.mark.parametrize(
    ("num_configs", "outs", "says"),
    [
        (0, [], "0 configs and 0 outputs"),
        (2, ["a"], "2 configs and 1 output"),
        (1, ["a", "b"], "1 config and 2 outputs"),
        (2, ["a", "a"], "a is given twice"),
        (2, ["a", "b/../a/"], "b/../a/ is given twice"),
    ],
)
def test_one_output_for_each_config(
    num_configs: int, outs: list[str], says: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=says):
        merge_variants([config] * num_configs, outs)
    assert list(tmp_path.iterdir()) == []
