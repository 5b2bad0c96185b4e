"""Completing an output: nothing of a model loads before all of it is there, and nobody else's model is touched."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from raymerge import plan
from raymerge.pipeline.checkpoint.manifest import FIGURES, MANIFEST, parse_manifest
from raymerge.pipeline.errors import FetchError, OutputError
from raymerge.pipeline.output.journal import LOCK, Journal
from raymerge.pipeline.output.stitch import check_shards, copy_side_files, find_nonfinite, list_outputs, stitch
from raymerge.pipeline.plan.results import ShardFile
from raymerge.pipeline.plan.types import MergePlan, PlannedOutput
from raymerge.pipeline.runners import run_shard
from raymerge.pipeline.stores.open import open_stores
from tests.checkpoints import INDEX, read_files, read_tensors, write_family

LAST = {"config.json", INDEX}
"""Without these nothing loads."""


@dataclass
class Finished:
    """A merge of which all shards are there."""

    plan: MergePlan
    shards: list[ShardFile]
    journal: Journal

    @property
    def output(self) -> PlannedOutput:
        return self.plan.outputs[0]

    @property
    def directory(self) -> Path:
        return Path(self.journal.out)

    def stitch(self, output: PlannedOutput | None = None, shards: Sequence[ShardFile] | None = None) -> None:
        shards = self.shards if shards is None else shards
        check_shards(self.plan, shards, self.journal)
        (copied,) = copy_side_files(self.plan, [self.journal])
        stitch(self.plan, output or self.output, shards, self.journal, copied)

    def loadable(self) -> set[str]:
        return LAST & read_files(self.directory).keys()


@pytest.fixture
def finished(tmp_path: Path) -> Iterator[Finished]:
    models = write_family(tmp_path / "in", 1, num_shards=2)
    (models[0] / "vocab.txt").write_text("as the donor has them")
    config = {"merge_method": "linear", "models": [{"model": str(m), "parameters": {"weight": 1}} for m in models]}
    the_plan = plan(config, shard_size="10kB")
    with open_stores() as stores:
        journal = Journal(stores, str(tmp_path / "out"), the_plan.fingerprint, "token-1")
        stores.at(journal.out).write(f"{journal.out}/{LOCK}", b"token-1")
        results = [run_shard(stores, task, lambda progress: None, journals=[journal]) for task in the_plan.tasks]
        shards = [file for result in results for file in result.files]
        assert len(shards) > 2
        yield Finished(the_plan, shards, journal)


def test_all_files_are_there_and_the_manifest_knows_them(finished: Finished) -> None:
    finished.stitch()
    finished.journal.end()
    files = read_files(finished.directory)
    del files[LOCK]
    assert files.keys() == set(list_outputs(finished.plan))
    assert len(list_outputs(finished.plan)) == len(files)
    manifest = parse_manifest(files.pop(MANIFEST))
    assert {name: (file.nbytes, file.sha256) for name, file in manifest.files.items()} == {
        name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in files.items()
    }
    assert manifest.fingerprint == finished.output.fingerprint
    assert files["vocab.txt"] == b"as the donor has them"


def test_figures_have_a_row_for_each_tensor(finished: Finished) -> None:
    finished.stitch()
    rows = pq.read_table(finished.directory / FIGURES).to_pylist()
    assert {row["name"]: row["file"] for row in rows} == finished.plan.weight_map
    norms = {name: float(x.double().norm()) for name, x in read_tensors(finished.directory).items()}
    assert {row["name"]: row["norm"] for row in rows} == pytest.approx(norms, rel=1e-4)


@pytest.mark.parametrize("damage", ["gone", "cut", "another"])
def test_a_shard_that_is_no_longer_what_was_written(finished: Finished, damage: str) -> None:
    path = finished.directory / finished.shards[1].file
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[:-1] if damage == "cut" else content[:-1] + b"x")
    before = read_files(finished.directory).keys()
    with pytest.raises(OutputError, match=rf"{path.name}.* (no longer what was written|is gone)"):
        finished.stitch()
    assert read_files(finished.directory).keys() == before


def test_a_donor_that_has_changed(finished: Finished, tmp_path: Path) -> None:
    (tmp_path / "in" / "base" / "vocab.txt").write_text("as somebody has changed them")
    with pytest.raises(FetchError, match=r"vocab\.txt"):
        finished.stitch()
    assert finished.loadable() == set()
    assert "vocab.txt" not in read_files(finished.directory)


def test_a_lock_that_is_lost_on_the_way(finished: Finished) -> None:
    (finished.directory / LOCK).write_text("token-2")
    with pytest.raises(OutputError, match="another run has taken the lock"):
        finished.stitch()
    assert INDEX not in finished.loadable()


def test_a_second_try_at_the_same_plan(finished: Finished) -> None:
    finished.stitch()
    first = read_files(finished.directory)
    finished.stitch()
    assert read_files(finished.directory) == first


@pytest.mark.parametrize("name", [MANIFEST, INDEX])
def test_another_run_has_finished_a_different_model(finished: Finished, name: str) -> None:
    finished.stitch()
    theirs = read_files(finished.directory)
    if name == MANIFEST:
        content = json.loads(theirs[MANIFEST])
        theirs[MANIFEST] = json.dumps(content | {"fingerprint": "theirs"}).encode()
    else:
        (finished.directory / MANIFEST).unlink()
        theirs[INDEX] = b"{}"
    (finished.directory / name).write_bytes(theirs[name])
    with pytest.raises(OutputError, match=rf"{name}: another run has finished a different model"):
        finished.stitch()
    assert (finished.directory / name).read_bytes() == theirs[name]


def test_a_damaged_manifest_is_nobodys(finished: Finished) -> None:
    (finished.directory / MANIFEST).write_bytes(b"{")
    with pytest.raises(OutputError, match="another run has finished a different model"):
        finished.stitch()
    assert finished.loadable() == set()


def test_credentials_are_written_nowhere(finished: Finished) -> None:
    text = f"# https://me:hunter2secret@host/{'a' * 8}\n{finished.output.config_text}"
    output = replace(finished.output, config_text=text, warnings=("https://me:hunter2secret@host",))
    finished.stitch(output)
    files = read_files(finished.directory)
    assert b"//***@host" in files["mergekit_config.yml"]
    assert not [name for name, content in files.items() if b"hunter2secret" in content]


def test_nonfinite_tensors_are_named_once_and_in_order(finished: Finished) -> None:
    shards = [
        replace(shard, nonfinite=(f"b{k}.weight", f"a{k}.weight")) for k, shard in enumerate(reversed(finished.shards))
    ]
    expected = tuple(sorted(name for shard in shards for name in shard.nonfinite))
    assert find_nonfinite(shards) == expected
    finished.stitch(shards=shards)
    assert tuple(parse_manifest((finished.directory / MANIFEST).read_bytes()).nonfinite) == expected
