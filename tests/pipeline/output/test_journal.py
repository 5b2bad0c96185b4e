"""The journal of an output: what a rerun finds in it, and what it does not believe."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raymerge.pipeline.errors import OutputError
from raymerge.pipeline.output.journal import DIRECTORY, LOCK, Begun, Journal, read_begun
from raymerge.pipeline.plan.results import ShardFile
from raymerge.pipeline.plan.types import ShardOutput
from raymerge.pipeline.stores.open import Stores, open_stores
from raymerge.pipeline.stores.seam import Storage
from tests.servers.faults import FaultProxy, Request
from tests.servers.s3 import S3Server

FINGERPRINT = "f00d"
CONTENT = bytes(range(100))
OUTPUTS = [ShardOutput(f"model-{k}.safetensors", b"", len(CONTENT)) for k in range(3)]


@pytest.fixture
def stores() -> Iterator[Stores]:
    with open_stores() as stores:
        yield stores


@pytest.fixture(params=["disk", "memory"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An output on a disk, or in a store that hides nothing and has no directories."""
    return str(tmp_path / "out") if request.param == "disk" else f"memory://{tmp_path.name}/out"


@pytest.fixture
def storage(stores: Stores, out: str) -> Storage:
    return stores.at(out)


@pytest.fixture
def journal(stores: Stores, out: str) -> Journal:
    return Journal(stores, out, FINGERPRINT)


def finish(journal: Journal, output: ShardOutput) -> ShardFile:
    """Make a shard and record it."""
    writer = journal.open_shard(output)
    writer.write(CONTENT)
    file = ShardFile(output.file, output.nbytes, "ab12", writer.commit().etag, ("w",), {"w": {"norm": 1.5}})
    journal.record(file)
    return file


def test_finished_shards_are_found_again(journal: Journal) -> None:
    made = [finish(journal, output) for output in OUTPUTS[:2]]
    found = journal.read_records(OUTPUTS)
    assert found == {file.file: file for file in made}
    assert [found[file.file].figures for file in made] == [file.figures for file in made]
    assert journal.read_records(OUTPUTS[1:]) == {made[1].file: made[1]}


def test_another_process_finds_them(journal: Journal) -> None:
    travelled: Journal = pickle.loads(pickle.dumps(journal))
    made = finish(travelled, OUTPUTS[0])
    assert journal.read_records(OUTPUTS) == {made.file: made}


def test_records_of_another_plan_do_not_count(journal: Journal) -> None:
    finish(journal, OUTPUTS[0])
    assert replace(journal, fingerprint="beef").read_records(OUTPUTS) == {}


DEEP = b"[" * 10_000


def record_path(journal: Journal) -> str:
    return f"{journal.out}/{DIRECTORY}/{OUTPUTS[0].file}.json"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"{}",
        b'{"fingerprint": "f00d"}',
        b"\xff\xfe",
        b'{"fingerprint": "f00d", "x": 1}',
        DEEP,
    ],
    ids=lambda content: str(content[:40]),
)
def test_a_damaged_record_means_that_the_shard_is_made_again(
    journal: Journal, storage: Storage, content: bytes
) -> None:
    finish(journal, OUTPUTS[0])
    kept = finish(journal, OUTPUTS[1])
    storage.write(record_path(journal), content)
    assert journal.read_records(OUTPUTS) == {kept.file: kept}


@pytest.mark.parametrize(
    "change", [{"nbytes": 99}, {"file": OUTPUTS[1].file}, {"nonfinite": 5}, {"sha256": None}], ids=str
)
def test_a_record_that_does_not_fit(journal: Journal, storage: Storage, change: dict[str, Any]) -> None:
    finish(journal, OUTPUTS[0])
    record = json.loads(storage.read(record_path(journal), 10_000))
    storage.write(record_path(journal), json.dumps(record | change).encode())
    assert journal.read_records(OUTPUTS) == {}


def test_a_shard_that_is_gone_or_of_another_size(journal: Journal, storage: Storage) -> None:
    for output in OUTPUTS:
        finish(journal, output)
    storage.delete(f"{journal.out}/{OUTPUTS[0].file}")
    storage.write(f"{journal.out}/{OUTPUTS[1].file}", CONTENT[:-1])
    assert journal.read_records(OUTPUTS).keys() == {OUTPUTS[2].file}
    assert journal.read_records([replace(output, nbytes=101) for output in OUTPUTS]) == {}


def test_an_unfinished_shard_is_in_no_sight(journal: Journal, storage: Storage) -> None:
    writer = journal.open_file("assets/a.bin", len(CONTENT))
    writer.write(CONTENT)
    assert "assets/a.bin" not in storage.list(journal.out)
    writer.abort()
    assert dict(storage.list(journal.out)) == {}
    writer = journal.open_file("assets/a.bin", len(CONTENT))
    writer.write(CONTENT)
    writer.commit()
    assert list(storage.list(journal.out)) == ["assets/a.bin"]
    again = journal.open_file("assets/a.bin", 1, exclusive=True)
    again.write(b"x")
    with pytest.raises(FileExistsError):
        again.commit()
    assert storage.read(f"{journal.out}/assets/a.bin", 1000) == CONTENT


def test_what_was_begun(journal: Journal, stores: Stores, storage: Storage) -> None:
    assert read_begun(stores, journal.out) is None
    journal.begin(["config.json", "ä.safetensors"])
    assert read_begun(stores, journal.out) == Begun(FINGERPRINT, frozenset({"config.json", "ä.safetensors"}))
    replace(journal, fingerprint="beef").begin([])
    assert read_begun(stores, journal.out) == Begun("beef", frozenset())


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"fingerprint": "f00d"}', b'{"fingerprint": 1, "files": 2}', DEEP]
)
def test_a_damaged_note_is_of_no_plan(journal: Journal, stores: Stores, storage: Storage, content: bytes) -> None:
    journal.begin([])
    (name,) = storage.list(f"{journal.out}/{DIRECTORY}")
    storage.write(f"{journal.out}/{DIRECTORY}/{name}", content)
    assert read_begun(stores, journal.out) == Begun("", frozenset())


def test_the_end_leaves_the_output_and_the_lock(journal: Journal, stores: Stores, storage: Storage) -> None:
    journal.begin(["a"])
    finish(journal, OUTPUTS[0])
    storage.write(f"{journal.out}/{LOCK}", b"mine")
    journal.end()
    assert set(storage.list(journal.out)) == {LOCK, OUTPUTS[0].file}
    assert read_begun(stores, journal.out) is None


def test_the_end_forgets_first_that_something_is_unfinished(
    journal: Journal, stores: Stores, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.begin(["a"])
    finish(journal, OUTPUTS[0])
    delete = storage.delete
    deleted: list[str] = []

    def delete_once(url: str) -> None:
        if deleted:
            raise OutputError("the store went down")
        deleted.append(url)
        delete(url)

    monkeypatch.setattr(storage, "delete", delete_once)
    with pytest.raises(OutputError):
        journal.end()
    assert read_begun(stores, journal.out) is None


def test_the_lock_must_still_be_ours(journal: Journal, storage: Storage) -> None:
    held = replace(journal, token="token-1")
    storage.write(f"{journal.out}/{LOCK}", b'{"token": "token-1"}')
    held.check_held()
    storage.write(f"{journal.out}/{LOCK}", b'{"token": "token-2"}')
    with pytest.raises(OutputError, match="another run has taken the lock"):
        held.check_held()
    storage.delete(f"{journal.out}/{LOCK}")
    with pytest.raises(OutputError, match="the lock of this run is gone"):
        held.check_held()
    journal.check_held()  # a lock that ends with its process cannot be taken


def test_a_lock_that_is_renewed_while_it_is_read_is_still_held(
    s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, writes = f"s3://{bucket}/out", iter(range(3))
    with FaultProxy(s3_server.endpoint) as proxy, open_stores() as stores, open_stores() as holder:
        holder.at(out).write(f"{out}/{LOCK}", b"token 0")
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)

        def renew(request: Request) -> None:
            if request.operation == "GetObject" and (number := next(writes, None)) is not None:
                holder.at(out).write(f"{out}/{LOCK}", f"token {number + 1}".encode())

        proxy.rule = renew
        Journal(stores, out, "", "token").check_held()
        assert next(writes, None) is None
