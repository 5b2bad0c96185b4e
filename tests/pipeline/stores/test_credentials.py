"""Credentials of AWS that end soon."""

from __future__ import annotations

import sys
import textwrap
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import botocore.credentials
import pytest

from raymerge.pipeline.errors import FetchError
from raymerge.pipeline.stores.objects.aws import AwsAccount
from raymerge.pipeline.stores.objects.errors import ObjectError
from raymerge.pipeline.stores.open import Stores
from tests.servers.s3 import S3Server

PROGRAM = """
import json, pathlib, sys
from datetime import UTC, datetime, timedelta

state = pathlib.Path(__file__).parent
if (state / "broken").exists():
    sys.exit("the broker is gone")
with (state / "calls").open("a") as calls:
    calls.write(".")
seconds = float((state / "seconds").read_text())
ends_at = (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()
print(json.dumps({{"Version": 1, "AccessKeyId": "{key}", "SecretAccessKey": "{secret}", "Expiration": ends_at}}))
"""


@pytest.fixture
def broker(tmp_path: Path, bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a credential_process: it gives credentials that last for as long as `seconds` says."""
    environment = s3_server.environment()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    program = tmp_path / "program.py"
    key, secret = environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"]
    program.write_text(textwrap.dedent(PROGRAM).format(key=key, secret=secret))
    (tmp_path / "seconds").write_text("60")
    (tmp_path / "config").write_text(f"[default]\ncredential_process = {sys.executable} {program}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    return tmp_path


def test_credentials_are_not_kept_for_longer_than_they_last(broker: Path, bucket: str, stores: Stores) -> None:
    expires_at = AwsAccount().give_credentials()["expires_at"]
    assert expires_at is not None
    assert expires_at <= datetime.now(UTC) + timedelta(seconds=60)
    (broker / "seconds").write_text("7200")
    expires_at = AwsAccount().give_credentials()["expires_at"]
    assert expires_at is not None
    assert expires_at <= datetime.now(UTC) + timedelta(minutes=10)
    (broker / "seconds").write_text("2")
    url = f"s3://{bucket}/a"
    stores.at(url).write(url, b"1234")
    before = (broker / "calls").stat().st_size
    time.sleep(1)
    assert stores.at(url).read(url, 4) == b"1234"
    assert (broker / "calls").stat().st_size > before  # half of their life is over


def test_credentials_that_cannot_be_renewed(broker: Path, bucket: str, stores: Stores) -> None:
    (broker / "seconds").write_text("2")
    url = f"s3://{bucket}/a"
    stores.at(url).write(url, b"1234")
    (broker / "broken").touch()
    time.sleep(1)
    with pytest.raises(FetchError, match=rf"{url}: .*no credentials: .*the broker is gone; check AWS_PROFILE"):
        stores.at(url).read(url, 4)
    (broker / "broken").unlink()
    assert stores.at(url).read(url, 4) == b"1234"


def test_credentials_that_have_ended_when_they_are_given(broker: Path, bucket: str, stores: Stores) -> None:
    (broker / "seconds").write_text("-5")
    with pytest.raises(FetchError, match=r"s3: no credentials: .*expired"):
        stores.at(f"s3://{bucket}/a").read(f"s3://{bucket}/a", 4)


def test_credentials_that_end_before_an_object_is_looked_at(
    broker: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = AwsAccount()

    def end(credentials: object) -> None:
        raise RuntimeError("Credentials were refreshed, but the refreshed credentials are still expired.")

    monkeypatch.setattr(botocore.credentials.RefreshableCredentials, "get_frozen_credentials", end)
    with pytest.raises(ObjectError, match="credentials have ended") as caught:
        account.read_crc64nvme(bucket, "a", "us-east-1")
    assert caught.value.as_fault() is None
    assert "aws sso login" in account.trouble
    account.abort_uploads(bucket, "a", "us-east-1")
    account.close()
