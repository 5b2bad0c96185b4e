"""AWS configuration and credentials as AWS tools find them, and the few requests that obstore does not make."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Lock as ThreadLock
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import botocore.session
from botocore import UNSIGNED
from botocore.config import Config
from botocore.configprovider import ConfiguredEndpointProvider
from botocore.credentials import Credentials, ReadOnlyCredentials, RefreshableCredentials
from botocore.exceptions import BotoCoreError, ClientError, ProxyConnectionError

from raymerge.pipeline.errors import FetchError
from raymerge.pipeline.stores.abilities import requester_pays
from raymerge.pipeline.stores.objects.errors import ObjectError
from raymerge.pipeline.stores.retry import one_line
from raymerge.pipeline.urls import check_endpoint

if TYPE_CHECKING:
    from obstore.store import S3Credential

DEFAULT_REGION = "us-east-1"

_CREDENTIAL_MINUTES = 10
"""Time for which renewed credentials may be kept: botocore renews them so much before they expire, if it can."""

_MAX_SWEEPS = 4

_NO_CREDENTIALS = (BotoCoreError, RuntimeError)
"""Errors of botocore for credentials that cannot be had; RuntimeError for some that have ended when they are given."""

_METHODS = {
    "env": "the environment",
    "shared-credentials-file": "the credentials file",
    "config-file": "the config file",
    "custom-process": "credential_process",
    "iam-role": "the role of this machine",
    "container-role": "the role of this container",
}


class AwsAccount:
    """Credentials, region and endpoint as the AWS tools would take them, from the environment and from ~/.aws.

    Raises:
        FetchError: there is no such profile, the credentials that it speaks of cannot be had, or the endpoint is none.
    """

    def __init__(self) -> None:
        try:
            self._session = botocore.session.Session()
            self._scoped: Mapping[str, Any] = self._session.get_scoped_config()
            self._credentials = self._session.get_credentials()
            if self._credentials is not None:
                self._credentials.get_frozen_credentials()
        except _NO_CREDENTIALS as error:
            raise FetchError(f"s3: {_explain_missing(error)}") from None
        self.trouble = ""
        """The reason why there are no credentials any more, where they could not be renewed."""
        self.endpoint: str | None = ConfiguredEndpointProvider(
            full_config=self._session.full_config, scoped_config=self._scoped, client_name="s3"
        ).provide()
        if self.endpoint:
            check_endpoint("the endpoint (AWS_ENDPOINT_URL, or endpoint_url in ~/.aws/config)", self.endpoint)
        self._client_lock = ThreadLock()
        self._clients: dict[str, Any] = {}

    @property
    def region(self) -> str | None:
        """The region that is configured; the CLI's AWS_REGION comes before what botocore knows."""
        region: str | None = os.environ.get("AWS_REGION") or self._session.get_config_variable("region")
        return region or (DEFAULT_REGION if self.endpoint else None)

    @property
    def is_anonymous(self) -> bool:
        """Whether no credentials were found; requests are not signed then."""
        return self._credentials is None

    @property
    def is_virtual(self) -> bool:
        """Whether the config file wants the bucket in the host name."""
        section = self._scoped.get("s3")
        return isinstance(section, Mapping) and section.get("addressing_style") == "virtual"

    @property
    def checksum_algorithm(self) -> str | None:
        """The checksum that writes are sent with; None where the AWS tools are told to send none."""
        setting = self._session.get_config_variable("request_checksum_calculation")
        is_off = str(setting).lower() == "when_required"
        return os.environ.get("AWS_CHECKSUM_ALGORITHM") or (None if is_off else "crc64nvme")

    def describe(self) -> str:
        """Return where the credentials come from, for messages."""
        if self._credentials is None:
            return "no credentials were found, so the request was anonymous"
        method = _METHODS.get(self._credentials.method, self._credentials.method)
        profile = self._session.get_config_variable("profile")
        return f"credentials of {f'profile {profile}, from ' if profile else ''}{method}"

    def give_credentials(self) -> S3Credential:
        """Return credentials that are good for a while."""
        if self._credentials is None:
            raise ValueError("no credentials")
        frozen = self._freeze(self._credentials)
        expires_at = None
        if isinstance(self._credentials, RefreshableCredentials):
            now, keep = datetime.now(UTC), timedelta(minutes=_CREDENTIAL_MINUTES)
            if ends_at := self._credentials._expiry_time:  # some last for less than the time to renew them in
                keep = min(keep, (ends_at.astimezone(UTC) - now) / 2)
            expires_at = now + keep
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": expires_at,
        }

    def _freeze(self, credentials: Credentials) -> ReadOnlyCredentials:
        """Return credentials as they are now, renewed where they end soon."""
        try:
            frozen = credentials.get_frozen_credentials()
        except _NO_CREDENTIALS as error:
            self.trouble = _explain_missing(error)
            raise
        self.trouble = ""
        return frozen

    def read_ca_bundle(self) -> str | None:
        """Return the certificates that the user wants trusted besides the usual ones, if any.

        Raises:
            FetchError: there are none in the file that is named.
        """
        path = self._session.get_config_variable("ca_bundle")
        if not path:
            return None
        try:
            text = Path(path).read_text()
        except (OSError, ValueError) as error:
            raise FetchError(f"AWS_CA_BUNDLE, or ca_bundle in ~/.aws/config: cannot read {path}: {error}") from None
        if "-----BEGIN CERTIFICATE-----" not in text:
            raise FetchError(f"AWS_CA_BUNDLE, or ca_bundle in ~/.aws/config: no certificate (PEM) is in {path}")
        return text

    def endpoint_of(self, bucket: str) -> str | None:
        """Return the endpoint for requests to one bucket, where it is not AWS itself."""
        if self.endpoint is None or not self.is_virtual:
            return self.endpoint
        parts = urlsplit(self.endpoint)
        return parts._replace(netloc=f"{bucket}.{parts.netloc}").geturl()

    def find_region(self, bucket: str) -> str | None:
        """Ask AWS where a bucket is; it tells anybody."""
        try:
            answer = self.client(DEFAULT_REGION, is_signed=False).head_bucket(Bucket=bucket)
        except ClientError as error:
            answer = error.response
        except BotoCoreError:
            return None
        region: str | None = answer["ResponseMetadata"].get("HTTPHeaders", {}).get("x-amz-bucket-region")
        return region

    def read_crc64nvme(self, bucket: str, key: str, region: str) -> tuple[int, str, int | None]:
        """Return an object's size, etag, and the checksum of all its bytes where the store has one.

        Raises:
            ObjectError: the store refuses, or cannot be reached, or there are no credentials any more.
        """
        try:
            if self._credentials is not None:
                self._freeze(self._credentials)
        except _NO_CREDENTIALS:
            raise ObjectError("HEAD", 0, "", "the credentials have ended") from None
        try:
            answer = self.client(region).head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED", **_payer())
        except ClientError as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            raise ObjectError("HEAD", status, "", "") from None
        except _NO_CREDENTIALS as error:
            raise ObjectError("HEAD", 0, "", "", f"broken connection ({type(error).__name__})") from None
        checksum = answer.get("ChecksumCRC64NVME")
        value = None
        if checksum and answer.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT":
            value = int.from_bytes(base64.b64decode(checksum), "big")
        return int(answer["ContentLength"]), str(answer["ETag"]), value

    def abort_uploads(self, bucket: str, key: str, region: str) -> None:
        """Abort the multipart uploads of exactly this key; gives up soon where that fails or is not allowed."""
        client = self.client(region)
        for _ in range(_MAX_SWEEPS):
            try:
                answer = client.list_multipart_uploads(
                    Bucket=bucket, Prefix=key, **_payer()
                )  # the key itself comes first
                for upload in answer.get("Uploads", ()):
                    if upload["Key"] == key:
                        client.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload["UploadId"], **_payer())
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] in (400, 401, 403, 405, 501):
                    return
            except _NO_CREDENTIALS:
                continue
            else:
                return

    def client(self, region: str, *, is_signed: bool = True) -> Any:
        """Return a client that tries once, for a few seconds."""
        name = f"{region} {is_signed}"
        with self._client_lock:
            if name not in self._clients:
                style = "path" if self.endpoint and not self.is_virtual else "auto"
                config = Config(
                    connect_timeout=5,
                    read_timeout=5,
                    retries={"total_max_attempts": 1},
                    s3={"addressing_style": style},
                    signature_version=UNSIGNED if self.is_anonymous or not is_signed else None,
                )
                self._clients[name] = self._session.create_client(
                    "s3", region_name=region, endpoint_url=self.endpoint, config=config
                )
            return self._clients[name]

    def close(self) -> None:
        """Close connections."""
        with self._client_lock:
            for client in self._clients.values():
                client.close()
            self._clients.clear()


def _explain_missing(error: Exception) -> str:
    advice = "check AWS_PROFILE and the files in ~/.aws, or log in with `aws sso login`"
    if isinstance(error, ProxyConnectionError):
        advice = "check the proxy (http_proxy, https_proxy), or exempt hosts from it with no_proxy"
    return f"no credentials: {one_line(error)}; {advice}"


def _payer() -> dict[str, str]:
    return {"RequestPayer": "requester"} if requester_pays() else {}
