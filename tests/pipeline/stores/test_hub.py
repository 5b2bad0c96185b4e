from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, constants, hf_hub_download
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from hypothesis import given, settings
from hypothesis import strategies as st

from raymerge.pipeline.errors import CheckpointError, ConfigError, CorruptedError, FetchError, OutputError
from raymerge.pipeline.stores.files import ByteRange
from raymerge.pipeline.stores.hub.api import HubApi
from raymerge.pipeline.stores.hub.commit import split_changes
from raymerge.pipeline.stores.hub.path import parse_hub_url
from raymerge.pipeline.stores.hub.pending import PendingChanges, PendingFile
from raymerge.pipeline.stores.hub.session import quiet
from raymerge.pipeline.stores.hub.storage import HubStorage
from raymerge.pipeline.stores.retry import FaultLog
from raymerge.pipeline.stores.web.errors import RefusalError
from tests.pipeline.stores.storage_contract import MIB, StorageContract, make_bytes, read_all, read_ranges
from tests.servers.faults import Fault, FaultProxy, is_operation
from tests.servers.hub import HubServer

WRITER, READER = "hf_writerwriterwriter", "hf_readerreaderreader"
_numbers = itertools.count()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        server.add_token(WRITER, user="me", can_write=["me"])
        server.add_token(READER, user="reader")
        yield server


@pytest.fixture(autouse=True)
def _environment(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    server.reset_requests()
    server.part_nbytes = None
    server.redirect_regular = False
    yield
    assert not server.leaked_tokens
    assert not any(WRITER in path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())


@pytest.fixture
def storage() -> Iterator[HubStorage]:
    storage = HubStorage(FaultLog(), private=True)
    yield storage
    storage.close()


@pytest.fixture
def repo(server: HubServer) -> str:
    name = f"me/model-{next(_numbers)}"
    server.create_repo(name)
    return name


SHARD = make_bytes(3 * MIB + 17)
FILES = {"config.json": b'{"a": 1}', "model.safetensors": SHARD, "sub/notes.txt": b"some text"}


@pytest.fixture
def model(server: HubServer, repo: str) -> str:
    """A repository with a model in it."""
    server.upload(repo, FILES)
    return repo


@contextmanager
def proxies(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, seed: int = 0
) -> Iterator[tuple[FaultProxy, FaultProxy]]:
    """Put one in front of the Hub and one in front of its storage, and have everything go through them."""
    with FaultProxy(server.storage.url, seed=seed, is_s3=False, stall_s=0.2) as cdn:
        rewrites = {server.storage.url: cdn.url.replace("127.0.0.1", "localhost")}
        with FaultProxy(server.url, seed=seed + 1, is_s3=False, rewrites=rewrites) as hub:
            hub._rewrites[server.url.encode()] = hub.url.encode()
            monkeypatch.setenv("HF_ENDPOINT", hub.url)
            yield hub, cdn


class TestHub(StorageContract):
    """What is written shows before it is published, to whoever writes it."""

    @pytest.fixture
    def storage(self) -> Iterator[HubStorage]:
        storage = HubStorage(FaultLog(), private=True)
        yield storage
        storage.close()

    @pytest.fixture
    def root(self, server: HubServer, repo: str) -> Iterator[str]:
        before = server.get_head(repo)
        yield f"hf://{repo}"
        assert server.get_head(repo) == before

    def test_only_the_hub_has_revisions(self, storage: HubStorage, root: str) -> None:  # type: ignore[override]
        assert storage.pin(root, "main") == storage.pin(root, None)


class TestHubWithOtherFiles(TestHub):
    """On top of a branch that has other files already: they are replaced and deleted, and show as they will be."""

    @pytest.fixture
    def root(self, server: HubServer, repo: str) -> str:
        server.upload(repo, {f"dir/{name}": b"\0old" for name in ("a", "b", "dir/b")})
        server.upload(repo, {"other/a": b"old"})
        return f"hf://{repo}/dir/below"


# reading


def test_progress_bars_stay_off_while_any_thread_uploads() -> None:
    enable_progress_bars()
    first, second = quiet(), quiet()
    with first:
        second.__enter__()
    assert are_progress_bars_disabled()
    second.__exit__(None, None, None)
    assert not are_progress_bars_disabled()
    disable_progress_bars()
    with quiet():
        pass
    assert are_progress_bars_disabled(), "as the user's program wants it"
    enable_progress_bars()


def test_pin_takes_one_request(server: HubServer, storage: HubStorage, model: str) -> None:
    commit = server.get_head(model)
    for url, revision in [(f"hf://{model}", None), (f"hf://models/{model}/", "main"), (f"hf://{model}@{commit}", None)]:
        server.reset_requests()
        assert storage.pin(url, revision) == f"hf://{model}@{commit}"
        assert len(server.requests) == 1


def test_pin_of_a_directory_and_of_a_branch_with_a_slash(server: HubServer, storage: HubStorage, model: str) -> None:
    commit = server.get_head(model)
    server.move_branch(model, "exp/1", commit)
    server.upload(model, {"config.json": b"new"})
    assert storage.pin(f"hf://{model}@exp%2F1/sub", None) == f"hf://{model}@{commit}/sub"
    assert storage.pin(f"hf://{model}", "exp/1") == f"hf://{model}@{commit}"
    assert storage.pin(f"hf://{model}", "main/sub") == f"hf://{model}@{server.get_head(model)}/sub"
    assert list(storage.list(f"hf://{model}@{commit}/sub")) == ["notes.txt"]


@pytest.mark.parametrize("redirect", [False, True])
def test_read(server: HubServer, storage: HubStorage, model: str, redirect: bool) -> None:
    server.redirect_regular = redirect
    url = storage.pin(f"hf://{model}", None)
    files = storage.list(url)
    assert {name: read_all(storage, file) for name, file in files.items()} == FILES
    assert files["model.safetensors"].etag == hashlib.sha256(SHARD).hexdigest()
    assert storage.stat(f"{url}/sub/notes.txt") == files["sub/notes.txt"]
    with pytest.raises(FileNotFoundError):
        storage.stat(f"{url}/missing")


def test_listing_of_many_pages(
    server: HubServer, storage: HubStorage, repo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "page_length", 7)
    names = [f"{number:03d}/file {number}" for number in range(30)]
    server.upload(repo, dict.fromkeys(names, b"text"))
    assert list(storage.list(storage.pin(f"hf://{repo}", None))) == names


def test_few_requests_to_the_hub(server: HubServer, storage: HubStorage, model: str) -> None:
    url = storage.pin(f"hf://{model}", None)
    files = storage.list(url)
    for name in files:
        storage.stat(f"{url}/{name}")
    server.reset_requests()
    file = files["model.safetensors"]
    for _ in range(3):
        ranges = [ByteRange(file, start, start + 1000) for start in range(0, 3 * MIB, 300_000)]
        assert read_ranges(storage, ranges) == [SHARD[item.start : item.stop] for item in ranges]
        storage.check_unchanged(file)
    assert [(request.method, "/resolve/" in request.path) for request in server.requests] == [("HEAD", True)]
    assert len(server.storage_requests) >= 3


def test_a_branch_that_moves(server: HubServer, storage: HubStorage, model: str) -> None:
    url = storage.pin(f"hf://{model}", None)
    pinned, moving = storage.stat(f"{url}/model.safetensors"), storage.stat(f"hf://{model}/model.safetensors")
    small = storage.stat(f"hf://{model}/config.json")
    server.upload(model, {"model.safetensors": SHARD[::-1], "config.json": b'{"a": 2}'})
    assert read_all(storage, pinned) == SHARD
    storage.check_unchanged(pinned)
    for file in (moving, small):
        with pytest.raises(FetchError, match="changed"):
            storage.check_unchanged(file)
        with pytest.raises(FetchError, match="changed"):
            read_all(storage, file)


def test_expired_urls_are_asked_for_again(server: HubServer, storage: HubStorage, model: str) -> None:
    file = storage.stat(f"{storage.pin(f'hf://{model}', None)}/model.safetensors")
    assert read_all(storage, file) == SHARD
    server.reset_requests()
    server.expire_urls()
    assert read_ranges(storage, [ByteRange(file, 0, 10), ByteRange(file, 2 * MIB, 2 * MIB + 9)])[0] == SHARD[:10]
    assert sum("/resolve/" in request.path for request in server.requests) == 1
    assert any("403 expired" in what for what, _ in storage.faults.drain())


def test_urls_that_never_work(
    server: HubServer, storage: HubStorage, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "signature_seconds", -1)
    file = storage.stat(f"{storage.pin(f'hf://{model}', None)}/model.safetensors")
    with pytest.raises(FetchError, match=f"{model}.*403"):
        read_all(storage, file)
    assert sum("/resolve/" in request.path for request in server.requests) < 10


def test_rate_limit(server: HubServer, storage: HubStorage, model: str) -> None:
    server.limit_rate(after=1, retry_after=2)
    start = time.monotonic()
    assert list(storage.list(storage.pin(f"hf://{model}", None))) == list(FILES)
    assert time.monotonic() - start > 1.5
    assert sum(request.status == 429 for request in server.requests) <= 2


@pytest.mark.parametrize(
    "fault", [Fault.SLOW_DOWN, Fault.SERVER_ERROR, Fault.TOO_MANY, Fault.RESET, Fault.RESET_IN_BODY, Fault.SHORT_BODY]
)
def test_faults_while_reading(
    server: HubServer, model: str, fault: Fault, storage: HubStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    with proxies(server, monkeypatch) as (hub, cdn):
        for each in (hub, cdn):
            each.script([fault])
        url = storage.pin(f"hf://{model}", None)
        assert {name: read_all(storage, file) for name, file in storage.list(url).items()} == FILES
        assert hub.injected[fault] + cdn.injected[fault] == 2
        storage.close()


def test_a_hub_that_is_down(
    storage: HubStorage, model: str, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raymerge.pipeline.stores.retry.PATIENCE_SECONDS", 1.0)
    with FaultProxy(server.url, is_s3=False) as proxy:
        monkeypatch.setenv("HF_ENDPOINT", proxy.url)
        proxy.down = True
        with pytest.raises(FetchError, match=rf"{model}.*{proxy.url}.*gave up after \d+ attempts"):
            storage.pin(f"hf://{model}", None)


# names and access


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("hf://gpt2", "hf://org/name"),
        ("hf://org/na me", "hf://org/name"),
        ("hf://org/name@", "hf://org/name"),
        ("hf://datasets/org/name", "datasets hold no models"),
    ],
)
def test_malformed(storage: HubStorage, url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        storage.pin(url, None)


def test_no_such_repository(storage: HubStorage) -> None:
    with pytest.raises(CheckpointError, match=r"hf://me/typo: no such repository.*this account.*a directory was meant"):
        storage.pin("hf://me/typo", None)


def test_no_such_revision(storage: HubStorage, model: str) -> None:
    for revision in ("v2", "v2/sub", "0" * 40):
        with pytest.raises(CheckpointError, match=f"no revision '{revision}'"):
            storage.pin(f"hf://{model}", revision)
    with pytest.raises(CheckpointError, match="in the URL already"):
        storage.pin(f"hf://{model}@main", "main")


def test_private(server: HubServer, storage: HubStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"me/private-{next(_numbers)}"
    server.create_repo(name, private=True)
    assert storage.pin(f"hf://{name}", None)
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(CheckpointError, match=r"no such repository.*this account may not read it"):
        storage.pin(f"hf://{name}", None)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(CheckpointError, match=r"private and you are not logged in: .*hf auth login.*HF_TOKEN"):
        storage.pin(f"hf://{name}", None)
    Path(constants.HF_TOKEN_PATH).write_text(WRITER)
    assert storage.pin(f"hf://{name}", None)
    Path(constants.HF_TOKEN_PATH).unlink()


def test_gated(server: HubServer, storage: HubStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"me/gated-{next(_numbers)}"
    server.create_repo(name, gated=True)
    assert storage.pin(f"hf://{name}", None)
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(CheckpointError, match=f"gated.*{server.url}/{name} and accept the terms"):
        storage.pin(f"hf://{name}", None)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(CheckpointError, match=f"gated.*{server.url}/{name} and accept the terms.*hf auth login"):
        storage.pin(f"hf://{name}", None)


def test_a_token_that_is_not_one(storage: HubStorage, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrong")
    with pytest.raises(CheckpointError, match="does not accept the token") as caught:
        storage.pin(f"hf://{model}", None)
    assert "wrongwrong" not in str(caught.value)
    assert caught.value.__cause__ is None


# the cache of huggingface_hub


def test_what_is_in_the_cache_is_not_read_from_the_hub(
    server: HubServer, storage: HubStorage, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = server.get_head(model)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    for name in ("config.json", "model.safetensors"):
        hf_hub_download(
            model, name, endpoint=server.url, token=WRITER, cache_dir=tmp_path / "elsewhere", revision="main"
        )
    url = storage.pin(f"hf://{model}", None)
    files = storage.list(url)
    server.reset_requests()
    assert {name: read_all(storage, files[name]) for name in ("config.json", "model.safetensors")} == {
        name: FILES[name] for name in ("config.json", "model.safetensors")
    }
    assert not server.requests
    assert not server.storage_requests
    assert read_all(storage, files["sub/notes.txt"]) == FILES["sub/notes.txt"]

    offline = HubStorage(FaultLog(), private=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    server.reset_requests()
    assert offline.pin(f"hf://{model}", None) == f"hf://{model}@{commit}"
    found = offline.list(url)
    assert found == {name: files[name] for name in ("config.json", "model.safetensors")}
    assert read_all(offline, found["model.safetensors"]) == SHARD
    with pytest.raises(FetchError, match=r"HF_HUB_OFFLINE is set.*not in .*elsewhere"):
        read_all(offline, files["sub/notes.txt"])
    with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE is set.*hf download me/other"):
        offline.pin("hf://me/other", None)
    with pytest.raises(CheckpointError, match=rf"has main, {commit} of this .*hf download {model} --revision dev"):
        offline.pin(f"hf://{model}", "dev")
    assert "has config.json, model.safetensors of this revision" in offline.advise_download(url)
    with pytest.raises(OutputError, match="HF_HUB_OFFLINE is set"):
        offline.lock(f"hf://{model}/.raymerge/lock").__enter__()
    assert not server.requests


# writing


def write_model(storage: HubStorage, out: str) -> None:
    storage.write(f"{out}/.raymerge/plan.json", b"{}")
    for name, content in FILES.items():
        storage.write(f"{out}/{name}", content)


def test_one_commit(server: HubServer, storage: HubStorage) -> None:
    repo = f"me/new-{next(_numbers)}"
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
    repo = f"me/new-{next(_numbers)}"
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
        out = f"hf://me/new-{next(_numbers)}"
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
