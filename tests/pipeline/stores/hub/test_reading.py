"""Reading from the Hub: requests, faults, access and the cache."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from raymerge.pipeline.errors import CheckpointError, ConfigError, FetchError, OutputError
from raymerge.pipeline.stores.files import ByteRange
from raymerge.pipeline.stores.hub.session import quiet
from raymerge.pipeline.stores.hub.storage import HubStorage
from raymerge.pipeline.stores.retry import FaultLog
from tests.pipeline.stores.hub.models import FILES, READER, SHARD, WRITER, new_name, proxies
from tests.pipeline.stores.storage_contract import MIB, read_all, read_ranges
from tests.servers.faults import Fault, FaultProxy
from tests.servers.hub import HubServer

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
    name = new_name("private")
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
    name = new_name("gated")
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
