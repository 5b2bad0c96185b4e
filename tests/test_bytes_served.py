"""What servers send of the weights: every byte once, and headers; counted by the servers."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from raymerge import merge, plan
from raymerge.pipeline.checkpoint.header import FIRST_READ_NBYTES
from tests.checkpoints import read_files, write_family
from tests.servers.faults import FaultProxy, Request
from tests.servers.hub import HubServer
from tests.servers.s3 import S3Server
from tests.servers.static import NginxServer
from tests.stored_models import make_config, upload
from tests.tokenized_models import TEXTS, byte_level, write_tokenized

Served = Callable[[], Counter[str]]
"""Returns the bytes of weights that were sent of each model."""


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """Models of 2 MB in two files."""
    return write_family(
        tmp_path_factory.mktemp("family"), 2, num_layers=6, dtype=torch.bfloat16, num_shards=2, hidden=128
    )


@pytest.fixture
def s3(family: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[str], Served]]:
    with NginxServer(family[0].parent) as server:
        for name, value in {
            "AWS_ENDPOINT_URL": server.endpoint,
            "AWS_ACCESS_KEY_ID": "any",
            "AWS_SECRET_ACCESS_KEY": "any",
            "AWS_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "NO_PROXY": "127.0.0.1",
        }.items():
            monkeypatch.setenv(name, value)

        def count() -> Counter[str]:
            found: Counter[str] = Counter()
            for request in server.requests():
                if request.method == "GET" and request.path.endswith(".safetensors"):
                    found[request.path.split("/")[1]] += request.nbytes
            return found

        yield [f"s3://{path.name}" for path in family], count


@pytest.fixture
def hub(
    family: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[list[str], Served]]:
    """A Hub, whose storage is asked for the weights."""
    with HubServer(tmp_path / "hub") as server:
        server.add_token("hf_writer", user="me", can_write=["org"])
        for path in family:
            server.create_repo(f"org/{path.name}")
            server.upload(f"org/{path.name}", dict(read_files(path)))
        for name, value in server.environment(tmp_path).items():
            monkeypatch.setenv(name, value)
        server.reset_requests()

        def count() -> Counter[str]:
            total = sum(request.nbytes for request in server.storage_requests if request.method == "GET")
            return Counter({"all": total})

        yield [f"hf://org/{path.name}" for path in family], count


@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "dare_ties"])
@pytest.mark.parametrize("store", ["s3", "hub"])
def test_every_byte_is_served_once(
    family: tuple[Path, ...], tmp_path: Path, request: pytest.FixtureRequest, store: str, method: str
) -> None:
    models, count = request.getfixturevalue(store)
    used = family[:2] if method == "slerp" else family
    config: dict[str, Any] = {"merge_method": method, "base_model": models[0], "parameters": {"t": 0.4}}
    if method != "slerp":
        config["parameters"] = {"weight": 0.4} if method == "linear" else {"weight": 0.4, "density": 0.5}
    config["models"] = [{"model": model} for model in models[: len(used)]]
    merge(config, tmp_path / "merged", workers=1)
    wanted = {path.name: sum(map(_served_of, path.glob("*.safetensors"))) for path in used}
    if store == "hub":
        wanted = {"all": sum(wanted.values())}
    give_up = time.monotonic() + 60
    while sum(count().values()) < sum(wanted.values()) and time.monotonic() < give_up:
        time.sleep(0.01)  # nginx notes an answer after its last byte
    assert count() == wanted
    stored = sum(file.stat().st_size for path in used for file in path.glob("*.safetensors"))
    assert sum(wanted.values()) < 1.01 * stored


def _served_of(file: Path) -> int:
    """Return the bytes of a file that are read: its values once, and before that the header with what follows it."""
    with file.open("rb") as opened:
        data_start = 8 + int.from_bytes(opened.read(8), "little")
    return file.stat().st_size - data_start + max(data_start, FIRST_READ_NBYTES)


def test_tokenizers_are_read_once_to_be_compared(
    s3_server: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [write_tokenized(tmp_path / str(k), k, byte_level(text, 280)) for k, text in enumerate(TEXTS)]
    served: Counter[str] = Counter()

    def note(request: Request) -> None:
        if request.operation == "GetObject" and request.path.endswith("/tokenizer.json"):
            served[request.path] += 1

    with FaultProxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        proxy.rule = note
        config = make_config([upload(s3_server, bucket, model.name, model) for model in models])
        assert any("tokenizer_source" in warning for warning in plan(config).warnings)
    assert list(served.values()) == [1, 1, 1]


@pytest.mark.slow
def test_scattered_rows_that_do_not_fit_in_memory_take_few_requests(
    s3_server: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request for each row would be 40,000; bytes between rows are read along, and the plan counts them."""
    models = []
    for k in range(2):
        words = [f"t{number}" for number in range(40_000)]
        random.Random(k).shuffle(words)
        tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="t0"))
        models.append(write_tokenized(tmp_path / str(k), k, tokenizer, tied=True, width=32))
    served: list[int] = []

    def note(request: Request) -> None:
        if request.operation == "GetObject" and request.path.endswith(".safetensors"):
            start, _, last = request.headers["range"].removeprefix("bytes=").partition("-")
            served.append(int(last) + 1 - int(start))

    options: dict[str, Any] = {"memory": "44MiB", "workers": 1}
    config = linear([str(model) for model in models])
    merge(config, tmp_path / "here")
    with FaultProxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        config = linear([upload(s3_server, bucket, model.name, model) for model in models])
        planned = plan(config, out=tmp_path / "there", **options)
        proxy.rule = note
        merge(config, tmp_path / "there", **options)
    assert (tmp_path / "there/model.safetensors").read_bytes() == (tmp_path / "here/model.safetensors").read_bytes()
    stored = sum((model / "model.safetensors").stat().st_size for model in models)
    read = sum(task.read_nbytes for task in planned.tasks)
    assert 0.9 * read < sum(served) <= read + 2 * FIRST_READ_NBYTES
    assert 1.5 * stored < read
    assert len(served) < 100


def linear(models: list[str]) -> dict[str, Any]:
    """Return a merge of models in the vocabulary of the first."""
    entries = [{"model": model, "parameters": {"weight": 0.5}} for model in models]
    return {"merge_method": "linear", "models": entries, "tokenizer_source": models[0]}
