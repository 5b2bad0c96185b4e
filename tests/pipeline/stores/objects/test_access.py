"""Who may do what in an object store."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from raymerge.pipeline.errors import FetchError, OutputError
from raymerge.pipeline.stores.objects.errors import ObjectError
from raymerge.pipeline.stores.objects.storage import ObjectStorage
from tests.pipeline.stores.objects.uploads import use, write_parts
from tests.pipeline.stores.storage_contract import read_all
from tests.servers.s3 import Keys, S3Server

MAY_NOT = {
    "wrong key": (
        Keys("AKNOBODY000000000001", "x" * 40),
        r"403 InvalidAccessKeyId.*credentials of the environment.*does not know this access key",
    ),
    "wrong secret": (
        Keys(S3Server.admin.access_key_id, "very-secret-" * 3),
        r"403 SignatureDoesNotMatch.*credentials of the environment.*the secret key does not belong",
    ),
    "stranger": (S3Server.stranger, r"403 AccessDenied.*credentials of the environment.*may not read"),
}


@pytest.mark.parametrize("who", MAY_NOT)
def test_credentials_that_are_refused(
    storage: ObjectStorage, bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    s3_server.client().put_object(Bucket=bucket, Key="a", Body=b"1")
    keys, expected = MAY_NOT[who]
    use(monkeypatch, keys)
    for attempt in (lambda: storage.stat(f"s3://{bucket}/a"), lambda: storage.list(f"s3://{bucket}")):
        with pytest.raises(FetchError, match=rf"s3://{bucket}.*{expected}") as caught:
            attempt()
        assert keys.secret_access_key not in str(caught.value)
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__


def test_an_identity_that_may_only_read(
    storage: ObjectStorage, bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{bucket}/a"
    s3_server.client().put_object(Bucket=bucket, Key="a", Body=b"1")
    use(monkeypatch, S3Server.reader)
    assert storage.read(url, 1) == b"1"
    expected = (
        rf"{url}: (PUT|POST|DELETE) failed: 403 AccessDenied.*credentials of the environment.*may not write there"
    )
    with pytest.raises(OutputError, match=expected):
        storage.write(url, b"2")
    with pytest.raises(OutputError, match=expected):
        write_parts(storage, url)
    with pytest.raises(OutputError, match=expected):
        storage.delete(url)
    with pytest.raises(OutputError, match="403 AccessDenied"):
        storage.lock(f"s3://{bucket}/lock").__enter__()


def test_without_credentials_requests_are_anonymous(
    storage: ObjectStorage, bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_server.client().put_object(Bucket=bucket, Key="a", Body=b"1")
    s3_server.client().put_object(Bucket=s3_server.public_bucket, Key="a", Body=b"public")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert storage.read(f"s3://{s3_server.public_bucket}/a", 10) == b"public"
    with pytest.raises(FetchError, match=r"403 AccessDenied.*no credentials were found.*AWS_PROFILE"):
        storage.stat(f"s3://{bucket}/a")


def test_a_bucket_that_does_not_exist(storage: ObjectStorage, bucket: str) -> None:
    expected = "NoSuchBucket.*there is no s3://nowhere: check its spelling, or make it first"
    with pytest.raises(FetchError, match=expected):
        storage.stat("s3://nowhere/a")
    with pytest.raises(FetchError, match=expected):
        storage.list("s3://nowhere/a")
    with pytest.raises(OutputError, match=expected):
        storage.write("s3://nowhere/a", b"1")
    with pytest.raises(OutputError, match=expected):
        storage.lock("s3://nowhere/a")


def test_a_profile_of_the_credentials_file(
    storage: ObjectStorage, bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.delenv(name)
    admin = S3Server.admin
    (tmp_path / "credentials").write_text(
        f"[mine]\naws_access_key_id={admin.access_key_id}\naws_secret_access_key={admin.secret_access_key}\n"
        f"[wrong]\naws_access_key_id={admin.access_key_id}\naws_secret_access_key=not-this-one\n"
    )
    endpoint = f"endpoint_url = {s3_server.endpoint}\n"
    (tmp_path / "config").write_text(f"[profile mine]\n{endpoint}region = eu-central-1\n[profile wrong]\n{endpoint}")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    storage.write(f"s3://{bucket}/a", b"1")
    assert storage.read(f"s3://{bucket}/a", 1) == b"1"
    storage.close()
    monkeypatch.setenv("AWS_PROFILE", "wrong")
    with pytest.raises(FetchError, match=r"SignatureDoesNotMatch.*of profile wrong, from the credentials file"):
        storage.stat(f"s3://{bucket}/a")
    storage.close()
    monkeypatch.setenv("AWS_PROFILE", "missing")
    with pytest.raises(FetchError, match=r"profile \(missing\) could not be found.*check AWS_PROFILE"):
        storage.stat(f"s3://{bucket}/a")


def test_an_endpoint_that_does_not_speak_tls(
    storage: ObjectStorage, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", os.environ["AWS_ENDPOINT_URL"].replace("http:", "https:"))
    start = time.monotonic()
    with pytest.raises(FetchError, match=r"does not speak TLS: write http://"):
        storage.stat(f"s3://{bucket}/a")
    assert time.monotonic() - start < 30  # not the 40 seconds for which it would try again


def test_a_clock_that_is_wrong() -> None:
    """What AWS answers, as its documentation has it: no server here checks the time."""
    from obstore.exceptions import PermissionDeniedError

    from raymerge.pipeline.stores.objects.errors import translated

    with pytest.raises(ObjectError) as caught, translated("GET"):
        raise PermissionDeniedError(
            "Error performing GET http://h/b/k in 1ms - Server returned non-2xx status code: 403 Forbidden: <Error>"
            "<Code>RequestTimeTooSkewed</Code><Message>The difference is too large.</Message>"
            "<RequestTime>20260102T031000Z</RequestTime><ServerTime>2026-01-02T03:00:00Z</ServerTime></Error>"
        )
    assert (caught.value.status, caught.value.code, caught.value.skew) == (403, "RequestTimeTooSkewed", 600)


def test_a_read_that_is_refused_names_the_caller(
    storage: ObjectStorage, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write(f"s3://{bucket}/a", b"1")
    file = storage.stat(f"s3://{bucket}/a")
    storage.close()
    use(monkeypatch, S3Server.stranger)
    with pytest.raises(
        FetchError, match=rf"s3://{bucket}/a: GET failed: 403 AccessDenied.*of the environment.*may not read"
    ):
        read_all(storage, file)
