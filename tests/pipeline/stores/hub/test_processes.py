"""What several processes write to one branch, and models of many files."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd
from hypothesis import given, settings
from hypothesis import strategies as st

from raymerge.pipeline.errors import CorruptedError, OutputError
from raymerge.pipeline.stores.hub.api import HubApi
from raymerge.pipeline.stores.hub.commit import split_changes
from raymerge.pipeline.stores.hub.path import parse_hub_url
from raymerge.pipeline.stores.hub.pending import PendingChanges, PendingFile
from raymerge.pipeline.stores.hub.storage import HubStorage
from raymerge.pipeline.stores.retry import FaultLog
from raymerge.pipeline.stores.web.errors import RefusalError
from tests.pipeline.stores.hub.models import FILES, SHARD, write_model
from tests.servers.hub import HubServer

# processes

_WRITE = """
import sys
from raymerge.pipeline.stores.hub.storage import HubStorage
from raymerge.pipeline.stores.retry import FaultLog
storage = HubStorage(FaultLog(), private=True)
out = sys.argv[1]
with storage.lock(f"{out}/.raymerge/lock") as lock:
    storage.write(f"{out}/.raymerge/plan.json", b"{}")
    print("locked", flush=True)
    for line in sys.stdin:
        number = line.strip()
        storage.write(f"{out}/model-{number}.safetensors", number.encode() * 1000)
        print("written", flush=True)
"""


def start_writer(out: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_WRITE), out],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


def test_a_killed_process_is_taken_up_again(server: HubServer, storage: HubStorage, repo: str) -> None:
    out = f"hf://{repo}"
    process = start_writer(out)
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        print("1", file=process.stdin, flush=True)
        assert process.stdout.readline() == "written\n"
        with pytest.raises(OutputError, match=rf"another raymerge run \(pid {process.pid}.*is writing to {out}"):
            storage.lock(f"{out}/.raymerge/lock").__enter__()
        os.kill(process.pid, signal.SIGKILL)
    server.reset_requests()
    with storage.lock(f"{out}/.raymerge/lock"):
        assert storage.read(f"{out}/.raymerge/plan.json", 10) == b"{}"
        kept = storage.stat(f"{out}/model-1.safetensors")
        assert kept.etag == hashlib.sha256(b"1" * 1000).hexdigest()
        storage.write(f"{out}/model-2.safetensors", b"2" * 1000)
        storage.publish(out, "x")
    assert len(server.storage_requests) == 1
    contents = server.read_files(repo)
    assert {contents[f"model-{number}.safetensors"][:1] for number in (1, 2)} == {b"1", b"2"}


def test_processes_that_write_to_one_branch(server: HubServer, storage: HubStorage, repo: str) -> None:
    code = """
import sys
from raymerge.pipeline.stores.hub.storage import HubStorage
from raymerge.pipeline.stores.retry import FaultLog
storage = HubStorage(FaultLog(), private=True)
for number in range(5):
    storage.write(f"{sys.argv[1]}/{sys.argv[2]}-{number}.safetensors", sys.argv[2].encode() * 100_000)
    storage.write(f"{sys.argv[1]}/same.json", b"{}")
"""
    out = f"hf://{repo}"
    with storage.lock(f"{out}/.raymerge/lock"):
        processes = [subprocess.Popen([sys.executable, "-c", code, out, name]) for name in "abc"]
        assert [process.wait() for process in processes] == [0, 0, 0]
        storage.publish(out, "x")
    contents = server.read_files(repo)
    expected = {f"{name}-{number}.safetensors": name.encode() * 100_000 for name in "abc" for number in range(5)}
    assert {name: contents[name] for name in contents if name != ".gitattributes"} == expected | {"same.json": b"{}"}
    assert not any(Path(os.environ["XDG_STATE_HOME"]).rglob("*.json"))


_PUBLISH = """
import os, signal, sys
from raymerge.pipeline.stores.hub.pending import PendingChanges
from raymerge.pipeline.stores.hub.storage import HubStorage
from raymerge.pipeline.stores.retry import FaultLog
storage = HubStorage(FaultLog(), private=True)
out, dies = sys.argv[1:]
if dies:
    PendingChanges.settle = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
with storage.lock(f"{out}/.raymerge/lock"):
    storage.publish(out, "x", last=["config.json"])
"""


def publish_elsewhere(out: str, *, dies: bool = False) -> int:
    """Publish in a process of its own, which may be killed right after its first commit; return how it ended."""
    return subprocess.run([sys.executable, "-c", _PUBLISH, out, "x" if dies else ""], timeout=60).returncode


def test_a_shard_is_uploaded_by_one_process_and_committed_by_another(
    server: HubServer, storage: HubStorage, repo: str
) -> None:
    out = f"hf://{repo}"
    process = start_writer(out)
    with process:
        process.communicate("1\n")
    (change,) = PendingChanges(parse_hub_url(out)).read_all().values()
    sha256 = hashlib.sha256(b"1" * 1000).hexdigest()
    assert (change.path, change.nbytes, change.sha256) == ("model-1.safetensors", 1000, sha256)
    server.reset_requests()
    assert publish_elsewhere(out) == 0
    assert server.read_files(repo)["model-1.safetensors"] == b"1" * 1000
    assert not server.storage_requests


def test_a_stale_parent_is_refused(server: HubServer, repo: str) -> None:
    parent = server.get_head(repo)
    head = server.upload(repo, {"other.txt": b"theirs"})
    with pytest.raises(RefusalError, match="412"):
        HubApi(FaultLog()).commit(parse_hub_url(f"hf://{repo}"), [CommitOperationAdd("a.txt", b"ours")], "x", parent)
    assert server.get_head(repo) == head


def test_a_run_that_was_killed_right_after_its_commit(server: HubServer, storage: HubStorage, repo: str) -> None:
    out = f"hf://{repo}"
    write_model(storage, out)
    assert publish_elsewhere(out, dies=True) == -signal.SIGKILL
    head = server.get_head(repo)
    with storage.lock(f"{out}/.raymerge/lock"):
        storage.publish(out, "x")
    assert server.get_head(repo) == head
    assert server.read_files(repo).items() >= FILES.items()
    assert not PendingChanges(parse_hub_url(out)).read_all()


def test_a_shard_is_hashed_once(storage: HubStorage, repo: str) -> None:
    for sha256, is_taken in (("0" * 64, False), (hashlib.sha256(SHARD).hexdigest(), True)):
        writer = storage.open_writer(f"hf://{repo}/model.safetensors", len(SHARD))
        writer.write(SHARD)
        if is_taken:
            assert writer.commit(sha256).etag == sha256
        else:
            with pytest.raises(CorruptedError):  # the Hub's storage hashes what it gets
                writer.commit(sha256)


# many files


def many_changes(num_shards: int, num_deleted: int) -> list[PendingFile]:
    changes = [
        PendingFile(f"model-{number}.safetensors", "uploaded", 1, f"{number:064}") for number in range(num_shards)
    ]
    changes += [PendingFile(f"old-{number}", "delete") for number in range(num_deleted)]
    changes += [PendingFile(name, "kept", 1, "a", "b") for name in ("README.md", "config.json", "index.json")]
    return changes


@settings(deadline=None)
@given(st.integers(0, 420), st.integers(0, 250), st.booleans())
def test_parts_of_fewer_than_100_files(num_shards: int, num_deleted: int, is_replaced: bool) -> None:
    changes = many_changes(num_shards, num_deleted)
    last = {"config.json", "index.json"}
    before = {change.path: (2, "old") for change in changes if change.mode == "delete"}
    if is_replaced:
        before |= {"config.json": (2, "old"), "README.md": (2, "old"), "model-1.safetensors": (2, "old")}
    parts = split_changes(changes, before, last)
    assert max(map(len, parts)) < 100
    wanted = sorted(map(repr, changes))
    made = sorted(repr(change) for part in parts for change in part)
    assert [change for change in made if change in set(wanted)] == wanted
    for part in parts:
        assert len({change.path for change in part}) == len(part)
    assert {change.path for change in parts[-1]} >= last
    assert len(parts) == 1 or not any(change.path in last for part in parts[1:-1] for change in part)
    if len(parts) > 1 and is_replaced:
        assert parts[0][0] == PendingFile("config.json", "delete")


def test_a_model_of_many_files_replaces_another(server: HubServer, storage: HubStorage, model: str) -> None:
    out = f"hf://{model}"
    names = [f"model-{number}.safetensors" for number in range(120)]
    with storage.lock(f"{out}/.raymerge/lock"):
        for name in names:
            storage.write(f"{out}/{name}", name.encode() * 10)
        storage.write(f"{out}/config.json", FILES["config.json"])  # the same as before
        storage.delete(f"{out}/model.safetensors")
        storage.delete(f"{out}/sub/notes.txt")
        storage.publish(out, "x", last=["config.json"])
    commits = list(server.repos[model].get_head("main").iter_history())[:-2]
    assert [commit.title for commit in reversed(commits)] == ["Part 1 of 2: x", "x"]
    assert set(commits[0].files) == {".gitattributes", "config.json", *names}
    assert not {"config.json", "model.safetensors", "sub/notes.txt"} & set(commits[1].files)


def test_a_damaged_note_is_none(storage: HubStorage, repo: str) -> None:
    storage.write(f"hf://{repo}/model.safetensors", SHARD)
    (entry,) = (PendingChanges(parse_hub_url(f"hf://{repo}")).directory / "changes").glob("*.json")
    entry.write_text(json.dumps({"path": "model.safetensors"}))
    assert storage.list(f"hf://{repo}") == {}
    storage.write(f"hf://{repo}/model.safetensors", SHARD)
    assert list(storage.list(f"hf://{repo}")) == ["model.safetensors"]
