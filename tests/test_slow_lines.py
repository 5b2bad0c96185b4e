"""Whole merges over lines of 0.2 MB/s for each worker: they finish with the same bytes, about a minute for each way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from raymerge import FetchError, OutputError, merge
from raymerge.pipeline.stores.settings import Library
from tests.checkpoints import read_files, write_family
from tests.servers.faults import FaultProxy, Request
from tests.servers.s3 import S3Server
from tests.servers.static import NginxServer
from tests.stored_models import download, make_config, upload, without_own

pytestmark = pytest.mark.slow

NUM_WORKERS = 2
SLOW = 0.2e6 * NUM_WORKERS
"""Bytes a second of the line that all workers share."""


@pytest.fixture
def proxy(s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


def write_models(directory: Path, hidden: int) -> list[Path]:
    return list(write_family(directory, 1, num_layers=3, dtype=torch.bfloat16, num_shards=2, vocab=2000, hidden=hidden))


def trickle(proxy: FaultProxy, operation: str) -> None:
    """Let bodies come a byte a second from the first large request on."""

    def watch(request: Request) -> None:
        is_large = request.headers.get("range", "bytes=0-0").partition("-")[2] > "500000"
        if request.operation == operation and (is_large or operation != "GetObject"):
            proxy.is_shared, proxy.nbytes_per_s = False, 1.0

    proxy.rule = watch


@pytest.mark.parametrize("way", ["web", "auto", "fsspec"])
def test_inputs_over_a_slow_line(way: str, proxy: FaultProxy, s3_server: S3Server, bucket: str, tmp_path: Path) -> None:
    models = write_models(tmp_path / "models", 192)
    merge(make_config(list(map(str, models))), tmp_path / "expected", shard_size="1MB")
    if way == "web":
        with NginxServer(tmp_path) as nginx, FaultProxy(nginx.endpoint, is_s3=False) as line:
            line.nbytes_per_s = SLOW
            config = make_config([f"{line.url}/models/{model.name}" for model in models])
            merge(config, tmp_path / "out", workers=NUM_WORKERS, shard_size="1MB")
    else:
        urls = [upload(s3_server, bucket, model.name, model) for model in models]
        proxy.nbytes_per_s = SLOW
        library: Library = "fsspec" if way == "fsspec" else "auto"
        merge(make_config(urls), tmp_path / "out", workers=NUM_WORKERS, shard_size="1MB", storage=library)
        assert proxy.operations["GetObject"] > len(models)
    assert without_own(read_files(tmp_path / "out")) == without_own(read_files(tmp_path / "expected"))


@pytest.mark.parametrize("library", ["auto", "fsspec"])
def test_outputs_over_a_slow_line(library: Library, proxy: FaultProxy, bucket: str, tmp_path: Path) -> None:
    config = make_config(list(map(str, write_models(tmp_path / "models", 640))))
    merge(config, tmp_path / "expected", shard_size="12MB")
    out = f"s3://{bucket}/out"
    proxy.nbytes_per_s = SLOW
    merge(config, out, workers=NUM_WORKERS, shard_size="12MB", storage=library)
    proxy.nbytes_per_s = None
    assert proxy.operations["UploadPart"] >= 2  # files of several parts, and such of one request
    assert without_own(download(out)) == without_own(read_files(tmp_path / "expected"))


@pytest.mark.parametrize("library", ["auto", "fsspec"])
def test_a_byte_a_second_is_given_up_by_workers(
    library: Library, proxy: FaultProxy, s3_server: S3Server, bucket: str, tmp_path: Path
) -> None:
    models = write_models(tmp_path / "models", 192)
    urls = [upload(s3_server, bucket, model.name, model) for model in models]
    trickle(proxy, "GetObject")
    with pytest.raises(FetchError, match=r"gave up after 2 attempts in 4\d s"):
        merge(make_config(urls), tmp_path / "out", workers=NUM_WORKERS, shard_size="1MB", storage=library)
    proxy.nbytes_per_s = None


def test_an_upload_of_a_byte_a_second_is_given_up(proxy: FaultProxy, bucket: str, tmp_path: Path) -> None:
    config = make_config(list(map(str, write_models(tmp_path / "models", 640))))
    trickle(proxy, "UploadPart")
    with pytest.raises(OutputError, match=r"gave up after 2 attempts in 1[89]\d s"):
        merge(config, f"s3://{bucket}/out", workers=NUM_WORKERS, shard_size="12MB", storage="fsspec")
    proxy.nbytes_per_s = None
