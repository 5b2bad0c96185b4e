"""What every store promises, kept by S3 and Azure."""

from __future__ import annotations

import base64
import hmac
import os
import shutil
from collections.abc import Iterator
from email.utils import formatdate
from http.client import HTTPConnection
from pathlib import Path

import pytest

from raymerge.pipeline.stores.buffers import BufferPool
from raymerge.pipeline.stores.objects.storage import ObjectStorage
from raymerge.pipeline.stores.retry import FaultLog
from tests.pipeline.stores.storage_contract import StorageContract
from tests.servers import ServerProcess, free_ports

_AZURE_ACCOUNT = "devstoreaccount1"
_AZURE_KEY = base64.b64encode(b"not a secret: the emulator is told to take it").decode()


@pytest.fixture(scope="module")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of an Azure emulator, with a container `models`."""
    program = shutil.which("azurite-blob")
    if program is None:
        pytest.skip("needs Azurite: npm install -g azurite")
    (port,) = free_ports(1)
    server = ServerProcess(
        [program, "--blobPort", str(port), "--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry"],
        directory=tmp_path_factory.mktemp("azurite"),
        environment={"PATH": os.environ["PATH"], "AZURITE_ACCOUNTS": f"{_AZURE_ACCOUNT}:{_AZURE_KEY}"},
    )
    endpoint = f"http://127.0.0.1:{port}/{_AZURE_ACCOUNT}"
    server.wait_until(lambda: make_container(endpoint, "models"))
    yield endpoint
    server.stop()


def make_container(endpoint: str, name: str) -> bool:
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-12-02"}
    signed = "\n".join(["PUT", *[""] * 11, *(f"{key}:{value}" for key, value in sorted(headers.items()))])
    signed += f"\n/{_AZURE_ACCOUNT}/{_AZURE_ACCOUNT}/{name}\nrestype:container"
    digest = hmac.digest(base64.b64decode(_AZURE_KEY), signed.encode(), "sha256")
    headers["Authorization"] = f"SharedKey {_AZURE_ACCOUNT}:{base64.b64encode(digest).decode()}"
    connection = HTTPConnection(endpoint.split("/")[2], timeout=5)
    try:
        connection.request("PUT", f"/{_AZURE_ACCOUNT}/{name}?restype=container", headers=headers)
        return connection.getresponse().status == 201
    except OSError:
        return False
    finally:
        connection.close()


@pytest.mark.slow
class TestAzure(StorageContract):
    @pytest.fixture
    def storage(self, azurite: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStorage]:
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", _AZURE_ACCOUNT)
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", _AZURE_KEY)
        monkeypatch.setenv("AZURE_ENDPOINT", azurite)
        storage = ObjectStorage("az", FaultLog(), BufferPool())
        yield storage
        storage.close()

    @pytest.fixture
    def root(self, tmp_path: Path) -> str:
        return f"az://models/{tmp_path.name}/root dir"


class TestS3(StorageContract):
    @pytest.fixture
    def storage(self) -> Iterator[ObjectStorage]:
        storage = ObjectStorage("s3", FaultLog(), BufferPool())
        yield storage
        storage.close()

    @pytest.fixture
    def root(self, bucket: str) -> str:
        return f"s3://{bucket}/models/root dir"
