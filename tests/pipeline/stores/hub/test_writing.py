"""Writing to the Hub: commits, access and faults."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from raymerge.pipeline.errors import CorruptedError, OutputError
from raymerge.pipeline.stores.hub.storage import HubStorage
from raymerge.pipeline.stores.retry import FaultLog
from tests.pipeline.stores.hub.models import FILES, READER, SHARD, WRITER, new_name, proxies, write_model
from tests.pipeline.stores.storage_contract import MIB, make_bytes, read_all
from tests.servers.faults import Fault, is_operation
from tests.servers.hub import HubServer


def test_one_commit(server: HubServer, storage: HubStorage) -> None:
    repo = new_name("new")
    out = f"hf://{repo}"
    assert storage.list(out) == {}
    assert repo not in server.repos
    with storage.lock(f"{out}/.raymerge/lock"):
        before = server.get_head(repo)
        assert server.repos[repo].private
        write_model(storage, out)
        assert server.get_head(repo) == before
        pendingd = {name: storage.stat(f"{out}/{name}") for name in FILES}
        storage.publish(out, "linear of a, b")
        assert {name: storage.stat(f"{out}/{name}") for name in FILES} == pendingd
        storage.delete(f"{out}/.raymerge/plan.json")
    commit = server.repos[repo].get_head("main")
    assert commit.parent is not None
    assert (commit.parent.oid, commit.title) == (before, "linear of a, b")
    contents = server.read_files(repo)
    assert {name: contents[name] for name in FILES} == FILES
    assert set(contents) - set(FILES) == {".gitattributes"}
    assert list(storage.list(out)) == list(FILES)
    storage.publish(out, "nothing new")
    assert server.get_head(repo) == commit.oid
    assert {name: read_all(storage, file) for name, file in storage.list(out).items()} == FILES


def test_public_if_asked_for(server: HubServer) -> None:
    repo = new_name("new")
    storage = HubStorage(FaultLog(), private=False)
    with storage.lock(f"hf://{repo}/.raymerge/lock"):
        assert not server.repos[repo].private
    storage.close()


def test_a_branch_is_made(server: HubServer, storage: HubStorage, repo: str) -> None:
    out = f"hf://{repo}@exp%2F2"
    with storage.lock(f"{out}/.raymerge/lock"):
        write_model(storage, out)
        storage.publish(out, "x")
    assert server.read_files(repo, "exp/2").keys() >= FILES.keys()
    assert list(server.read_files(repo)) == [".gitattributes"]
    assert {name: read_all(storage, file) for name, file in storage.list(storage.pin(out, None)).items()} == FILES


def test_files_are_replaced_and_deleted_in_one_commit(server: HubServer, storage: HubStorage, model: str) -> None:
    out = f"hf://{model}"
    before = server.get_head(model)
    with storage.lock(f"{out}/.raymerge/lock"):
        storage.delete(f"{out}/sub/notes.txt")
        storage.delete(f"{out}/config.json")
        storage.write(f"{out}/config.json", b"new")
        storage.write(f"{out}/added.safetensors", b"1234")
        storage.delete(f"{out}/added.safetensors")
        assert list(storage.list(out)) == [".raymerge/lock", "config.json", "model.safetensors"]
        assert server.get_head(model) == before
        storage.publish(out, "x")
    contents = server.read_files(model)
    assert {name: contents[name] for name in contents if name != ".gitattributes"} == {
        "config.json": b"new",
        "model.safetensors": SHARD,
    }


@pytest.mark.parametrize(
    ("token", "name", "message"),
    [
        (READER, "me/model-of-mine", "check what the token may do"),
        (WRITER, "other-org/model", "rights to create.*check what the token may do"),
        (None, "me/model-of-mine", "only who is logged in.*hf auth login"),
    ],
)
def test_no_write_access_is_said_before_anything_is_made(
    server: HubServer, storage: HubStorage, monkeypatch: pytest.MonkeyPatch, token: str | None, name: str, message: str
) -> None:
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(OutputError, match=message):
        storage.lock(f"hf://{name}/.raymerge/lock").__enter__()
    assert name not in server.repos


def test_a_public_repository_of_somebody_else(storage: HubStorage, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(OutputError, match=f"hf://{model}.*write access.*check what the token may do"):
        storage.lock(f"hf://{model}/.raymerge/lock").__enter__()


def test_a_commit_cannot_be_written_to(storage: HubStorage) -> None:
    with pytest.raises(OutputError, match="a commit does not change"):
        storage.lock(f"hf://me/name@{'0' * 40}/.raymerge/lock").__enter__()


def test_somebody_else_commits_meanwhile(server: HubServer, storage: HubStorage, repo: str) -> None:
    out = f"hf://{repo}"
    with storage.lock(f"{out}/.raymerge/lock"):
        parent = server.get_head(repo)
        write_model(storage, out)
        head = server.upload(repo, {"other.txt": b"theirs"})
        with pytest.raises(OutputError, match=f"changed by somebody else.*{head}.*{parent}.*nothing was published"):
            storage.publish(out, "x")
    assert server.get_head(repo) == head
    with pytest.raises(OutputError, match=r"changed by somebody else.*--overwrite"):
        storage.lock(f"{out}/.raymerge/lock").__enter__()
    assert set(server.read_files(repo)) == {".gitattributes", "other.txt"}


@pytest.mark.parametrize("fault", [Fault.LOST_RESPONSE, Fault.SLOW_DOWN, Fault.RESET, Fault.TOO_MANY])
def test_faults_while_publishing(
    server: HubServer, storage: HubStorage, repo: str, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    with proxies(server, monkeypatch) as (proxy, _):
        out = f"hf://{repo}"
        with storage.lock(f"{out}/.raymerge/lock"):
            write_model(storage, out)
            proxy.script([fault], only=is_operation("Commit"))
            storage.publish(out, "x")
            assert proxy.injected[fault] == 1
        storage.close()
    contents = server.read_files(repo)
    assert {name: contents[name] for name in FILES} == FILES
    assert len(list(server.repos[repo].get_head("main").iter_history())) == 2


@pytest.mark.parametrize("part_nbytes", [None, MIB])
@pytest.mark.parametrize(
    "fault", [Fault.FLIPPED_BYTE, Fault.LOST_RESPONSE, Fault.SERVER_ERROR, Fault.RESET, Fault.STALL]
)
def test_faults_while_uploading(
    server: HubServer,
    storage: HubStorage,
    repo: str,
    fault: Fault,
    part_nbytes: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server.part_nbytes = part_nbytes
    with proxies(server, monkeypatch) as (_, cdn):
        cdn.script([fault], only=lambda request: request.method == "PUT")
        storage.write(f"hf://{repo}/model.safetensors", SHARD)
        storage.publish(f"hf://{repo}", "x")
        assert cdn.injected[fault] == 1
        storage.close()
    assert server.read_files(repo)["model.safetensors"] == SHARD
    assert storage.faults.drain()


@pytest.mark.slow
@pytest.mark.parametrize("part_nbytes", [None, MIB])
def test_all_faults_at_once(
    server: HubServer, storage: HubStorage, part_nbytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.part_nbytes = part_nbytes
    num_injected = 0
    for seed in range(4):
        shards = {f"model-{number}.safetensors": make_bytes(3 * MIB, 100 * seed + number) for number in range(4)}
        out = f"hf://{new_name('new')}"
        with proxies(server, monkeypatch, seed) as (hub, cdn):
            for each in (hub, cdn):
                each.faults = dict.fromkeys(Fault, 0.02)
            with storage.lock(f"{out}/.raymerge/lock"):
                for name, content in shards.items():
                    storage.write(f"{out}/{name}", content)
                storage.publish(out, "x")
            url = storage.pin(out, None)
            assert {name: read_all(storage, file) for name, file in storage.list(url).items()} == shards
            num_injected += sum(hub.injected.values()) + sum(cdn.injected.values())
            storage.close()
        assert len(list(server.repos[out.removeprefix("hf://")].get_head("main").iter_history())) == 2
    assert num_injected > 20


def test_bytes_that_never_arrive_as_they_are(
    server: HubServer, storage: HubStorage, repo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with proxies(server, monkeypatch) as (_, cdn):
        cdn.faults = {Fault.FLIPPED_BYTE: 1.0}
        with pytest.raises(CorruptedError, match=f"{repo}/model.safetensors: sent 4 times"):
            storage.write(f"hf://{repo}/model.safetensors", SHARD)
        assert storage.list(f"hf://{repo}") == {}
        storage.close()


def test_nothing_is_sent_twice(server: HubServer, storage: HubStorage, repo: str) -> None:
    storage.write(f"hf://{repo}/model.safetensors", SHARD)
    storage.delete(f"hf://{repo}/model.safetensors")
    server.reset_requests()
    storage.write(f"hf://{repo}/again.safetensors", SHARD)
    assert not server.storage_requests
    assert storage.stat(f"hf://{repo}/again.safetensors").nbytes == len(SHARD)


def test_uploads_that_the_hub_has_thrown_away(server: HubServer, storage: HubStorage, repo: str) -> None:
    out = f"hf://{repo}"
    with storage.lock(f"{out}/.raymerge/lock"):
        write_model(storage, out)
        server.repos[repo].lfs_objects.clear()
        with pytest.raises(OutputError, match=r"no longer has model\.safetensors.*run the same command again"):
            storage.publish(out, "x")
        assert list(server.read_files(repo)) == [".gitattributes"]
        with pytest.raises(FileNotFoundError):
            storage.stat(f"{out}/model.safetensors")
        storage.write(f"{out}/model.safetensors", SHARD)
        storage.publish(out, "x")
    assert server.read_files(repo)["model.safetensors"] == SHARD


def test_no_room_for_the_spool(storage: HubStorage, repo: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(OutputError, match=rf"{tmp_path}.*1,125,899,906,842,624 bytes are needed.*TMPDIR"):
        storage.open_writer(f"hf://{repo}/model.safetensors", 2**50)


def test_two_directories_of_one_branch(server: HubServer, storage: HubStorage, repo: str) -> None:
    for name in ("one", "two"):
        storage.write(f"hf://{repo}/{name}/config.json", name.encode())
    storage.publish(f"hf://{repo}/one", "x")
    assert set(server.read_files(repo)) == {".gitattributes", "one/config.json"}
    assert list(storage.list(f"hf://{repo}")) == ["one/config.json", "two/config.json"]
