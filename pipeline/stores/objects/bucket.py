"""One bucket or container: how it is reached, who we are there, and what its refusals mean."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import obstore
from obstore.store import AzureStore, GCSStore, S3Store

from raymerge.pipeline.errors import FetchError, OutputError
from raymerge.pipeline.stores import retry as retrying
from raymerge.pipeline.stores.objects.aws import DEFAULT_REGION, AwsAccount
from raymerge.pipeline.stores.objects.errors import NO_STORE, ObjectError, classify_fault, translated
from raymerge.pipeline.stores.remote import REQUEST_SECONDS
from raymerge.pipeline.stores.retry import Fault, FaultLog, one_line, retry

if TYPE_CHECKING:
    from obstore.store import AzureConfig, ClientConfig, RetryConfig, S3Config

T = TypeVar("T")
AnyStore = S3Store | GCSStore | AzureStore

_CONNECT_SECONDS = 5
_UPLOAD_SECONDS = 300.0
"""For one part; a slow line has several on their way at once: enough for 0.15 MB/s of each worker."""
_MAX_UNKNOWN_NAME = 5
"""Failures to find the host at first, before its name counts as misspelt."""

_NO_PREFIX = ".raymerge-none"
"""Nothing begins with this."""

_UNKNOWN_CALLER = (
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "RequestTimeTooSkewed",
)
"""With these, anything else would be refused too; with other refusals, only listing may be."""

_AZURE_CREDENTIALS = (
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_ACCESS_KEY",
    "AZURE_STORAGE_SAS_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_STORAGE_TOKEN",
    "AZURE_STORAGE_CLIENT_SECRET",
    "AZURE_CLIENT_SECRET",
    "AZURE_FEDERATED_TOKEN_FILE",
    "AZURE_USE_AZURE_CLI",
    "AZURE_SKIP_SIGNATURE",
    "AZURE_STORAGE_USE_EMULATOR",
)


class Bucket:
    """A bucket, with a store for requests that we repeat ourselves, and one for uploads, which obstore repeats.

    Attributes:
        url: such as `s3://bucket`.
        reads: makes each request once.
        writes: repeats requests.
        aws: what is known from AWS tools; None in other stores.
        faults: where what goes wrong is noted.
        region: in S3.

    Raises:
        FetchError: settings or credentials are such that no store can be reached with them.
    """

    def __init__(self, scheme: str, name: str, aws: AwsAccount | None, faults: FaultLog) -> None:
        self.url = f"{scheme}://{name}"
        self.name = name
        self.aws = aws
        self.faults = faults
        self.region = ""
        if aws is not None:
            self.region = aws.region or aws.find_region(name) or DEFAULT_REGION
            if not re.fullmatch(r"[\w-]+", self.region, re.ASCII):
                raise FetchError(f"{self.url}: {self.region!r} is no region; set AWS_REGION, as in {DEFAULT_REGION}")
        retries: RetryConfig = {
            "max_retries": 1000,
            # An upload that fails is aborted, which may take as long again.
            "retry_timeout": timedelta(seconds=retrying.PATIENCE_SECONDS / 2),
            "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=8), "base": 2},
        }
        try:
            self.reads = self._build({"max_retries": 0}, REQUEST_SECONDS)
            self.writes = self._build(retries, _UPLOAD_SECONDS)
        except (ObjectError, ValueError) as error:
            hint = "" if aws else f"; credentials are taken as {_FOUND_BY[scheme]}"
            raise FetchError(f"{self.url}: the settings cannot be used: {one_line(error)}{hint}") from None
        self._is_there = False
        self._is_store = False

    def _build(self, retry_config: RetryConfig, seconds: float) -> AnyStore:
        client: ClientConfig = {
            "timeout": timedelta(seconds=seconds),
            "connect_timeout": timedelta(seconds=_CONNECT_SECONDS),
        }
        with translated("connect"):
            if self.aws is not None:
                return self._build_s3(self.aws, client, retry_config)
            if self.url.startswith("gs://"):
                return GCSStore(self.name, client_options=client, retry_config=retry_config)
            config: AzureConfig = {}
            endpoint = os.environ.get("AZURE_ENDPOINT", os.environ.get("AZURE_STORAGE_ENDPOINT", ""))
            client["allow_http"] = endpoint.startswith("http://") or "AZURE_STORAGE_USE_EMULATOR" in os.environ
            if shutil.which("az") and not any(name in os.environ for name in _AZURE_CREDENTIALS):
                config["use_azure_cli"] = True
            return AzureStore(self.name, config=config, client_options=client, retry_config=retry_config)

    def _build_s3(self, aws: AwsAccount, client: ClientConfig, retry_config: RetryConfig) -> S3Store:
        config: S3Config = {
            "region": self.region,
            "unsigned_payload": True,
            "checksum_algorithm": "crc64nvme",
            "disable_bulk_delete": True,
        }
        if endpoint := aws.endpoint_of(self.name):
            config["endpoint"] = config["aws_endpoint_url_s3"] = endpoint
            config["virtual_hosted_style_request"] = aws.is_virtual
            client["allow_http"] = endpoint.startswith("http://")
        if authorities := aws.read_ca_bundle():
            client["root_certificate"] = authorities
        if aws.is_anonymous:
            config["skip_signature"] = True
        return S3Store(
            self.name,
            config=config,
            client_options=client,
            retry_config=retry_config,
            credential_provider=None if aws.is_anonymous else aws.give_credentials,
        )

    def connect(self) -> None:
        """Make sure, once, that there is such a bucket, as far as that may be known.

        Raises:
            FetchError: there is none, or the store is down or refuses.
        """
        if self._is_there:
            return
        num_unknown = 0

        def classify(error: Exception) -> Fault | None:
            nonlocal num_unknown
            num_unknown += isinstance(error, ObjectError) and error.trouble == "name not found"
            return classify_fault(error) if num_unknown < _MAX_UNKNOWN_NAME else None

        def list_nothing() -> None:
            try:
                with translated("list"):
                    next(iter(obstore.list(self.reads, _NO_PREFIX)), None)
            except ObjectError as error:
                if error.status not in (401, 403) or error.code in _UNKNOWN_CALLER:
                    raise

        try:
            self._retry(list_nothing, "list", classify, self._give_up(self.url))
        except ObjectError as error:
            raise FetchError(self.explain(error, self.url)) from None
        self._is_there = True

    def check_is_store(self) -> None:
        """Make sure, once, that what lists nothing is not a login page or a proxy, which answers anything with a page.

        Raises:
            FetchError: it has an object of a name that nothing has.
        """
        if self._is_store:
            return
        with suppress(ObjectError):
            with translated("HEAD"):
                obstore.head(self.reads, _NO_PREFIX)
            error = ObjectError("list", 0, "", "", NO_STORE)
            raise FetchError(self.explain(error, self.url))
        self._is_store = True

    def answers(self, key: str) -> bool:
        """Tell whether the store can be reached; one request."""
        try:
            with translated("HEAD"):
                obstore.head(self.reads, key)
        except ObjectError as error:
            return 0 < error.status < 500
        return True

    def write(self, operation: str, url: str, function: Callable[[], T]) -> T:
        """Carry out a request that changes something, and may be repeated without harm.

        Raises:
            OutputError: the store refuses or is down.
        """
        give_up = self._give_up(url, operation)
        try:
            return self._retry(function, operation, classify_fault, give_up)
        except (ObjectError, FetchError) as error:
            raise OutputError(self.explain(error, url) if isinstance(error, ObjectError) else str(error)) from None

    def _retry(
        self,
        function: Callable[[], T],
        operation: str,
        classify: Callable[[Exception], Fault | None],
        give_up: Callable[[Exception, str], Exception],
    ) -> T:
        return retry(
            function, faults=self.faults, store=self.url, operation=operation, classify=classify, give_up=give_up
        )

    def _give_up(self, url: str, operation: str = "list") -> Callable[[Exception, str], Exception]:
        def give_up(error: Exception, summary: str) -> Exception:
            hint = ""
            if self._endpoint.startswith("http://") and "connection reset" in str(error):
                hint = "; if it speaks TLS, write https:// in the endpoint"
            return FetchError(f"{self.url}: {operation} of {url}: {summary}: {one_line(error)}{self._at}{hint}")

        return give_up

    @property
    def _endpoint(self) -> str:
        """The endpoint that the user has given; empty where there is none."""
        return (self.aws.endpoint if self.aws else None) or ""

    @property
    def _at(self) -> str:
        return f" (at {self._endpoint})" if self._endpoint else ""

    def explain(self, error: ObjectError, url: str) -> str:
        """Return the message for a refusal: the request, where, and the next step."""
        key = url.removeprefix(self.url).strip("/")
        if error.status == 403 and not error.code:
            error = self._ask_why(error, key)
        times = f" after {error.num_attempts} attempts" if error.num_attempts > 1 else ""
        return f"{url}: {error.method} failed{times}: {error}{self._at}{self._advise(error)}"

    def _ask_why(self, error: ObjectError, key: str) -> ObjectError:
        """Repeat a HEAD, whose answer has no body that could say why it was refused, as a GET."""
        try:
            with translated("GET"):
                obstore.get(self.reads, key, options={"range": (0, 1)})
        except ObjectError as found:
            if found.code:
                found.method = error.method
                return found
        return error

    def _advise(self, error: ObjectError) -> str:
        who = self.aws.describe() if self.aws else f"credentials as {_FOUND_BY[self.url[:2]]}"
        if error.trouble == "TLS":
            return (
                "; the certificate is not a trusted one; if an authority of your own has signed it,"
                " name a file with that authority's certificate in AWS_CA_BUNDLE"
            )
        if error.trouble == "not TLS":
            return "; the server does not speak TLS: write http:// in the endpoint, not https://"
        is_bare = error.status in (400, 404, 405, 501) and not error.code
        if error.trouble == NO_STORE or (is_bare and self._endpoint):
            return "; is this the address of an object store, and is no login page or proxy on the way to it?"
        if error.trouble == "unusable name":
            return "; rename or delete it"
        if error.trouble == "name not found":
            return "; check the spelling of the endpoint" if self._endpoint else self._check_network()
        if error.code in ("NoSuchBucket", "ContainerNotFound", "InvalidBucketName"):
            lower = (
                f" (names of buckets are in lower case: {self.url.lower()}?)" if self.name != self.name.lower() else ""
            )
            return f"; there is no {self.url}: check its spelling{lower}, or make it first"
        if error.status in (301, 307) or error.code in ("AuthorizationHeaderMalformed", "PermanentRedirect"):
            asked = self.aws.find_region(self.name) if self.aws else None
            region = error.region or asked or "another"
            return f"; {self.url} is in region {region}, and {self.region} was asked: set AWS_REGION"
        if error.code == "RequestTimeTooSkewed":
            ahead = error.skew
            by = f" by {abs(ahead):.0f} s, {'ahead' if ahead > 0 else 'behind'}" if ahead else ""
            return f"; the clock of this machine is wrong{by}: set it right"
        if error.code in ("ExpiredToken", "TokenRefreshRequired", "ExpiredTokenException"):
            return f" ({who}); the session has ended: log in again (`aws sso login`), or set a new AWS_SESSION_TOKEN"
        if error.code == "SignatureDoesNotMatch":
            return f" ({who}); the secret key does not belong to the access key: check both"
        if error.code in ("InvalidAccessKeyId", "InvalidToken"):
            return f" ({who}); the store does not know this access key: check it, and the endpoint"
        if error.status in (401, 403):
            if self.aws and self.aws.is_anonymous:
                return f" ({who}); set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            may = "read" if error.method in ("GET", "HEAD", "list") else "write"
            return f" ({who}); these may not {may} there: use others, or have them allowed to"
        return ""

    def _check_network(self) -> str:
        return f"; check the network, and the region {self.region!r}" if self.region else "; check the network"


_FOUND_BY = {
    "gs": "Google's tools find them (GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth application-default login`)",
    "az": "Azure's tools find them (AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, `az login`)",
}
