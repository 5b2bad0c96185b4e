"""S3 servers that check what clients send: SeaweedFS, and MinIO's front as JuiceFS ships it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import botocore.config
import botocore.exceptions
import botocore.session

from tests.servers import ServerFailedError, ServerProcess, free_ports


@dataclass(frozen=True)
class Keys:
    """What a client signs with."""

    access_key_id: str
    """Public half."""
    secret_access_key: str
    """Secret half."""


class Store:
    """What every S3 server of the tests offers its users."""

    region = "us-east-1"
    admin = Keys("AKADMIN0000000000001", "admin-secret-0000000000000000000000000001")
    """May do everything."""

    endpoint: str
    """`http://ADDRESS:PORT`, for path-style requests."""
    _process: ServerProcess

    def __init__(self) -> None:
        self._clients: dict[tuple[Keys, str], Any] = {}

    def environment(self, keys: Keys | None = None, *, endpoint: str | None = None) -> dict[str, str]:
        """Return the AWS_* variables that lead any client here, and to no file of the user's and no metadata service.

        Args:
            keys: who the client is; the admin when None.
            endpoint: what stands in front of the server, such as a fault proxy; the server itself when None.
        """
        keys = keys or self.admin
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ACCESS_KEY_ID": keys.access_key_id,
            "AWS_SECRET_ACCESS_KEY": keys.secret_access_key,
            "AWS_REGION": self.region,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "NO_PROXY": f"{urlsplit(self.endpoint).hostname},127.0.0.1,localhost",
        }

    def client(self, keys: Keys | None = None, *, endpoint: str | None = None) -> Any:
        """Return a botocore client that never retries, for a test's own requests; it may be used by several threads."""
        keys = keys or self.admin
        address = endpoint or self.endpoint
        if (keys, address) not in self._clients:
            self._clients[keys, address] = make_client(address, keys, region=self.region)
        return self._clients[keys, address]

    def create_bucket(self, name: str) -> str:
        """Make an empty bucket and return its name."""
        self.client().create_bucket(Bucket=name)
        return name

    def keys_of(self, bucket: str) -> list[str]:
        """Return the keys of all objects in a bucket, in order."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return [item["Key"] for page in pages for item in page.get("Contents", ())]

    def uploads_of(self, bucket: str) -> list[str]:
        """Return the keys of all multipart uploads that are under way in a bucket."""
        pages = self.client().get_paginator("list_multipart_uploads").paginate(Bucket=bucket)
        return [item["Key"] for page in pages for item in page.get("Uploads", ())]

    @property
    def pid(self) -> int:
        """The server's process."""
        return self._process.pid

    def cpu_seconds(self) -> float:
        """Return the CPU seconds that the server has used."""
        return self._process.cpu_seconds()

    def stop(self) -> None:
        """End the server, and throw away what it stores."""
        for client in self._clients.values():
            client.close()
        self._clients.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def make_client(endpoint: str, keys: Keys, *, region: str = "us-east-1") -> Any:
    """Return a botocore client for path-style requests that neither retries nor reads the user's AWS configuration."""
    nothing = (None, None, None, None)
    session = botocore.session.Session(
        session_vars={"profile": nothing, "config_file": nothing, "credentials_file": nothing}
    )
    return session.create_client(
        "s3",
        endpoint_url=endpoint,
        region_name=region,
        aws_access_key_id=keys.access_key_id,
        aws_secret_access_key=keys.secret_access_key,
        config=botocore.config.Config(
            retries={"total_max_attempts": 1},
            s3={"addressing_style": "path"},
            proxies={},
            connect_timeout=5,
            read_timeout=30,
        ),
    )


class S3Server(Store):
    """A SeaweedFS of its own, in a new directory under the temporary directory. Up in a second or two.

    It listens on one address of this machine.
    """

    reader = Keys("AKREADER000000000001", "reader-secret-000000000000000000000000001")
    """May read and list every bucket, and write to none."""
    stranger = Keys("AKSTRANGER0000000001", "stranger-secret-0000000000000000000000001")
    """Is known to the server, and may neither read nor write."""
    public_bucket = "public"
    """What anybody may read and list without a signature. It exists from the start, and is empty."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        super().__init__()
        self._host = host
        self._directory = Path(tempfile.mkdtemp(prefix="weed-", dir="/tmp"))  # short, for the sockets in it
        identities = [
            {"name": "admin", "actions": ["Admin", "Read", "List", "Tagging", "Write"], **_credentials(self.admin)},
            {"name": "reader", "actions": ["Read", "List"], **_credentials(self.reader)},
            {"name": "stranger", "actions": [], **_credentials(self.stranger)},
            {"name": "anonymous", "actions": [f"Read:{self.public_bucket}", f"List:{self.public_bucket}"]},
        ]
        (self._directory / "s3.json").write_text(json.dumps({"identities": identities}))
        try:
            self._start()
        except ServerFailedError:  # someone took one of the ports in the meantime
            self._start()

    def stop(self) -> None:
        """End the server, and throw away what it stores."""
        super().stop()
        self._process.stop()
        for file in self.socket_files():
            file.unlink(missing_ok=True)
        shutil.rmtree(self._directory, ignore_errors=True)

    def socket_files(self) -> list[Path]:
        """Return what the server leaves outside its directory when it is killed; `stop` removes it."""
        return [file for port in self._grpc_ports for file in Path("/tmp").glob(f"seaweedfs-*-grpc-{port}.sock")]

    def _start(self) -> None:
        s3, master, volume, filer, *grpc = free_ports(8)
        admin = _free_admin_port()
        self._grpc_ports = [*grpc, admin + _ADMIN_GRPC_OFFSET]
        data = self._directory / f"data-{s3}"
        data.mkdir()
        self._process = ServerProcess(
            [
                Path(sys.executable).with_name("weed"),
                "-logtostderr=true",
                "mini",
                f"-dir={data}",
                f"-ip={self._host}",
                f"-ip.bind={self._host}",
                f"-s3.config={self._directory / 's3.json'}",
                f"-s3.port={s3}",
                f"-master.port={master}",
                f"-volume.port={volume}",
                f"-filer.port={filer}",
                f"-admin.port={admin}",
                *(f"-{part}.port.grpc={port}" for part, port in zip(_GRPC_PARTS, grpc, strict=True)),
                f"-admin.port.grpc={admin + _ADMIN_GRPC_OFFSET}",
                "-s3.autoCreateBucket=false",  # else an admin's PUT to a bucket that does not exist makes the bucket
                "-s3.port.iceberg=0",
                "-s3.port.lance=0",
                f"-s3.localSocket={data / 's3.sock'}",
                f"-filer.localSocket={data / 'filer.sock'}",
                "-admin.ui=false",
                "-webdav=false",
                "-master.telemetry=false",  # else it reports to its makers
                "-master.volumeSizeLimitMB=256",
                "-volume.max=5000",  # every bucket takes a few; else as many as fit on the disk
            ],
            directory=self._directory,
            environment={"WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"},  # not 7 new files at the first write to a bucket
        )
        self.endpoint = f"http://{self._host}:{s3}"
        self._process.wait_until(self._is_ready)

    def _is_ready(self) -> bool:
        try:
            with contextlib.suppress(self.client().exceptions.BucketAlreadyOwnedByYou):
                self.create_bucket(self.public_bucket)
            self.client().put_object(Bucket=self.public_bucket, Key="ready", Body=b"1")
            self.client().delete_object(Bucket=self.public_bucket, Key="ready")
        except _NOT_YET:
            return False
        return True


class JuiceServer(Store):
    """A JuiceFS gateway of its own over a SQLite file: MinIO's S3 front, as a second opinion.

    It checks signatures, Content-MD5 and If-Match on reads, and ignores what came to S3 later: other checksums, and
    conditions on writes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._directory = Path(tempfile.mkdtemp(prefix="juicefs-"))
        juicefs: list[str | Path] = [Path(sys.executable).with_name("juicefs"), "--no-agent"]
        self._meta = f"sqlite3://{self._directory / 'meta.db'}"
        subprocess.run(
            [*juicefs, "format", "--storage=file", f"--bucket={self._directory / 'blobs'}/", self._meta, "tests"],
            check=True,
            capture_output=True,
            env={"PATH": os.defpath, "HOME": str(self._directory)},
        )
        try:
            self._start(juicefs)
        except ServerFailedError:  # someone took one of the ports in the meantime
            self._start(juicefs)

    def stop(self) -> None:
        """End the server, and throw away what it stores."""
        super().stop()
        self._process.stop()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _start(self, juicefs: list[str | Path]) -> None:
        s3, metrics = free_ports(2)
        self._process = ServerProcess(
            [
                *juicefs,
                "gateway",
                "--multi-buckets",
                "--keep-etag",
                "--no-usage-report",  # else it reports to its makers
                "--backup-meta=0",
                f"--cache-dir={self._directory / 'cache'}",
                f"--log={self._directory / 'gateway.log'}",
                f"--metrics=127.0.0.1:{metrics}",
                self._meta,
                f"127.0.0.1:{s3}",
            ],
            directory=self._directory,
            environment={
                "MINIO_ROOT_USER": self.admin.access_key_id,
                "MINIO_ROOT_PASSWORD": self.admin.secret_access_key,
            },
        )
        self.endpoint = f"http://127.0.0.1:{s3}"
        self._process.wait_until(self._is_ready)

    def _is_ready(self) -> bool:
        try:
            self.client().list_buckets()
        except _NOT_YET:
            return False
        return True


_NOT_YET = (
    botocore.exceptions.ClientError,
    botocore.exceptions.ConnectionError,
    botocore.exceptions.HTTPClientError,
)
_GRPC_PARTS = ("s3", "master", "volume", "filer")
_ADMIN_GRPC_OFFSET = 10_000
"""Its own worker looks for the admin at this distance, whatever `-admin.port.grpc` says."""


def _free_admin_port() -> int:
    while True:
        (port,) = free_ports(1)
        with socket.socket() as other, contextlib.suppress(OSError, OverflowError):
            other.bind(("127.0.0.1", port + _ADMIN_GRPC_OFFSET))
            return port


def _credentials(keys: Keys) -> dict[str, list[dict[str, str]]]:
    return {"credentials": [{"accessKey": keys.access_key_id, "secretKey": keys.secret_access_key}]}
