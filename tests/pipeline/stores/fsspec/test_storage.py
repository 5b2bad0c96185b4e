"""URLs and names that storages behind fsspec serve."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import obstore
import obstore.store
import pytest
from fsspec.registry import _registry

from raymerge.pipeline.errors import ConfigError, FetchError
from raymerge.pipeline.stores.fsspec.s3 import S3fsStorage
from raymerge.pipeline.stores.fsspec.storage import FsspecStorage
from raymerge.pipeline.stores.open import Stores
from raymerge.pipeline.stores.retry import FaultLog
from raymerge.pipeline.stores.seam import Sharing
from raymerge.pipeline.stores.settings import StoreSettings
from tests.pipeline.stores.fsspec.files import NUMBERS, PlainFileSystem, write_parts
from tests.pipeline.stores.storage_contract import MIB, make_bytes
from tests.servers.s3 import S3Server


def test_which_urls_it_serves() -> None:
    memory, ftp = (Stores().at(f"{scheme}://a/b") for scheme in ("memory", "ftp"))
    assert isinstance(memory, FsspecStorage)
    assert isinstance(ftp, FsspecStorage)
    assert (memory.is_remote, memory.sharing) == (False, Sharing.THREADS)
    assert (ftp.is_remote, ftp.sharing) == (True, Sharing.FRESH)
    assert isinstance(Stores(StoreSettings("fsspec")).at("s3a://a/b"), S3fsStorage)


def test_absolute() -> None:
    assert FsspecStorage("memory", FaultLog()).absolute("memory:///a/b/") == "memory://a/b"
    assert S3fsStorage(FaultLog()).absolute("s3a://bucket/a b/") == "s3://bucket/a b"


@pytest.mark.parametrize(
    ("scheme", "hidden", "message"),
    [
        ("gs", "gcsfs", r"^gs://\.\.\. with --storage fsspec needs gcsfs: pip install gcsfs$"),
        ("sftp", "paramiko", r"^sftp://\.\.\. needs paramiko: pip install paramiko$"),
        ("smb", "smbclient", r"^smb://\.\.\. needs smbprotocol: pip install smbprotocol$"),
    ],
)
def test_a_package_that_is_missing(scheme: str, hidden: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, hidden, None)
    monkeypatch.delitem(_registry, scheme, raising=False)
    with pytest.raises(ConfigError, match=message):
        FsspecStorage(scheme, FaultLog())


@pytest.mark.parametrize("kind", ["memory", "plain", "s3"])
def test_names_are_no_patterns(kind: str, request: pytest.FixtureRequest, bucket: str, tmp_path: Path) -> None:
    storage = request.getfixturevalue("s3") if kind == "s3" else FsspecStorage(kind, FaultLog())
    root = {"memory": f"memory://test-{next(NUMBERS)}", "plain": f"plain://{tmp_path}", "s3": f"s3://{bucket}"}[kind]
    for name in ("[ab]", "a", "b", "*", "**", "x*/[a]", "x1/a", "?"):
        storage.write(f"{root}/{name}", name.encode())
    assert [storage.read(f"{root}/{name}", 9) for name in ("[ab]", "*", "?")] == [b"[ab]", b"*", b"?"]
    assert list(storage.list(f"{root}/x*")) == ["[a]"]
    for name in ("[ab]", "*", "**", "x*/[a]", "?"):
        storage.delete(f"{root}/{name}")
    assert list(storage.list(root)) == ["a", "b", "x1/a"]


@pytest.mark.parametrize("url", ["s3://bucket/a?versionId=1", "sftp://host/dir/a?b"])
def test_a_name_that_fsspec_would_cut(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if url.startswith("sftp"):
        monkeypatch.setitem(_registry, "sftp", PlainFileSystem)
        monkeypatch.setattr(PlainFileSystem, "_strip_protocol", lambda path: path.partition("?")[0])
    with pytest.raises(FetchError, match=f"^{re.escape(url)}: fsspec takes a part of this name"):
        Stores(StoreSettings("fsspec")).at(url).stat(url)


def test_directory_markers_are_no_files(s3: S3fsStorage, s3_server: S3Server, bucket: str) -> None:
    for key in ("dir/", "dir/below/"):
        s3_server.client().put_object(Bucket=bucket, Key=key, Body=b"")
    s3.write(f"s3://{bucket}/dir/a", b"")
    assert list(s3.list(f"s3://{bucket}")) == ["dir/a"]
    assert list(s3.list(f"s3://{bucket}/dir/below")) == []
    for name in ("dir", "dir/", "dir/below"):
        with pytest.raises(FileNotFoundError):
            s3.stat(f"s3://{bucket}/{name}")


def test_nothing_is_remembered(s3: S3fsStorage, s3_server: S3Server, bucket: str) -> None:
    client = s3_server.client()
    assert list(s3.list(f"s3://{bucket}/dir")) == []
    for content in (b"1", b"22"):
        client.put_object(Bucket=bucket, Key="dir/a", Body=content)
        assert s3.stat(f"s3://{bucket}/dir/a").nbytes == len(content)
        assert [file.nbytes for file in s3.list(f"s3://{bucket}/dir").values()] == [len(content)]
    client.delete_object(Bucket=bucket, Key="dir/a")
    assert list(s3.list(f"s3://{bucket}/dir")) == []
    with pytest.raises(FileNotFoundError):
        s3.stat(f"s3://{bucket}/dir/a")


def test_etags_are_those_of_obstore(s3: S3fsStorage, s3_server: S3Server, bucket: str) -> None:
    s3.write(f"s3://{bucket}/small", b"1234")
    write_parts(s3, f"s3://{bucket}/large", make_bytes(9 * MIB))
    store = obstore.store.S3Store(
        bucket,
        endpoint=s3_server.endpoint,
        access_key_id=s3_server.admin.access_key_id,
        secret_access_key=s3_server.admin.secret_access_key,
        region=s3_server.region,
        client_options={"allow_http": True},
    )
    for name in ("small", "large"):
        assert s3.stat(f"s3://{bucket}/{name}").etag == (obstore.head(store, name)["e_tag"] or "").strip('"')
