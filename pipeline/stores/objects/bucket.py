"""One bucket or container: how it is reached, who we are there, and what its refusals mean."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from secrets import token_hex
from threading import Lock as ThreadLock
from typing import TYPE_CHECKING, TypeVar

import obstore
from obstore.store import AzureStore, GCSStore, S3Store

from raymerge.pipeline.errors import FetchError, OutputError
from raymerge.pipeline.stores import retry as retrying
from raymerge.pipeline.stores.abilities import Abilities, find_abilities, is_aws
from raymerge.pipeline.stores.objects.advice import FOUND_BY, advise
from raymerge.pipeline.stores.objects.aws import DEFAULT_REGION, AwsAccount
from raymerge.pipeline.stores.objects.errors import NO_STORE, ObjectError, classify_fault, translated
from raymerge.pipeline.stores.objects.probe import AnyStore, is_unsupported, write_probe
from raymerge.pipeline.stores.remote import REQUEST_SECONDS
from raymerge.pipeline.stores.retry import Fault, FaultLog, one_line, retry

if TYPE_CHECKING:
    from obstore import PutMode
    from obstore.store import AzureConfig, ClientConfig, RetryConfig, S3Config

T = TypeVar("T")

_CONNECT_SECONDS = 5
_UPLOAD_SECONDS = 240.0
"""For one part; a slow line has several on their way at once: enough for 0.15 MB/s of each worker."""
_PUT_SECONDS = 90.0
"""For one object of up to 8 MiB in one request: enough for 0.15 MB/s, also if lines are shared unevenly."""
_MAX_UNKNOWN_NAME = 5
"""Failures to find the host at first, before its name counts as misspelt."""

_ONCE: RetryConfig = {"max_retries": 0}

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
    """A bucket, with stores for requests that we repeat ourselves, and one for uploads, which obstore repeats.

    Attributes:
        url: such as `s3://bucket`.
        reads: makes each request once.
        puts: makes each request once, with time for one that sends an object of some MiB.
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
        self._retries: RetryConfig = {
            "max_retries": 1000,
            # An upload that fails is aborted, which may take as long again.
            "retry_timeout": timedelta(seconds=retrying.PATIENCE_SECONDS / 2),
            "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=8), "base": 2},
        }
        self.abilities = Abilities(has_checksums=aws is not None and aws.checksum_algorithm is not None)
        try:
            self.reads, self.puts, self.writes = self._build_all(self.abilities)
        except (ObjectError, ValueError) as error:
            hint = "" if aws else f"; credentials are taken as {FOUND_BY[scheme]}"
            raise FetchError(f"{self.url}: the settings cannot be used: {one_line(error)}{hint}") from None
        self._is_there = False
        self._is_store = False
        self._is_probed = is_aws(self.endpoint)
        self._probe_lock = ThreadLock()

    def _build_all(self, abilities: Abilities) -> tuple[AnyStore, AnyStore, AnyStore]:
        return (
            self._build(_ONCE, REQUEST_SECONDS, abilities),
            self._build(_ONCE, _PUT_SECONDS, abilities),
            self._build(self._retries, _UPLOAD_SECONDS, abilities),
        )

    def _build(self, retry_config: RetryConfig, seconds: float, abilities: Abilities) -> AnyStore:
        client: ClientConfig = {
            "timeout": timedelta(seconds=seconds),
            "connect_timeout": timedelta(seconds=_CONNECT_SECONDS),
        }
        with translated("connect"):
            if self.aws is not None:
                return self._build_s3(self.aws, client, retry_config, abilities)
            if self.url.startswith("gs://"):
                return GCSStore(self.name, client_options=client, retry_config=retry_config)
            config: AzureConfig = {}
            endpoint = os.environ.get("AZURE_ENDPOINT", os.environ.get("AZURE_STORAGE_ENDPOINT", ""))
            client["allow_http"] = endpoint.startswith("http://") or "AZURE_STORAGE_USE_EMULATOR" in os.environ
            if shutil.which("az") and not any(name in os.environ for name in _AZURE_CREDENTIALS):
                config["use_azure_cli"] = True
            return AzureStore(self.name, config=config, client_options=client, retry_config=retry_config)

    def _build_s3(
        self, aws: AwsAccount, client: ClientConfig, retry_config: RetryConfig, abilities: Abilities
    ) -> S3Store:
        config: S3Config = {
            "region": self.region,
            "unsigned_payload": True,
            "disable_bulk_delete": True,
        }
        if abilities.has_checksums and aws.checksum_algorithm:
            config["checksum_algorithm"] = aws.checksum_algorithm
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

    def probe(self, key: str) -> None:
        """Find out, once, what the store refuses of writes, and do without it from then on.

        Args:
            key: of an object that will be written; the probe is beside it, for a moment.

        Raises:
            OutputError: the store refuses any write, or is down.
        """
        with self._probe_lock:
            if self._is_probed:
                return
            directory = f"/{key}".rpartition("/")[0].removesuffix("/.raymerge").strip("/")
            most, probe = self.abilities, f"{directory}/.raymerge/probe.{token_hex(8)}".lstrip("/")
            url, operation = f"{self.url}/{key}", "PUT"

            def attempt(abilities: Abilities) -> None:
                is_as_usual = abilities.has_checksums == most.has_checksums
                store = self.reads if is_as_usual else self._build(_ONCE, REQUEST_SECONDS, abilities)
                write = partial(write_probe, store, probe, has_conditions=abilities.has_conditions)
                self._retry(write, operation, classify_fault, self._give_up(url, operation))

            try:
                found = find_abilities(
                    attempt, most=most, is_unsupported=is_unsupported, faults=self.faults, store=self.url
                )
            except (ObjectError, FetchError) as error:
                raise OutputError(self.explain(error, url) if isinstance(error, ObjectError) else str(error)) from None
            with suppress(ObjectError), translated("DELETE"):
                obstore.delete(self.reads, probe)
            if found.has_checksums != most.has_checksums:
                self.reads, self.puts, self.writes = self._build_all(found)
            self.abilities, self._is_probed = found, True

    def put(self, store: AnyStore, key: str, data: bytes, mode: PutMode) -> str:
        """Write an object in one request and return its etag; where the store knows no conditions, look first.

        Raises:
            ObjectError: the store refuses, or the condition does not hold.
        """
        with translated("PUT"):
            if mode != "overwrite" and not self.abilities.has_conditions:
                wanted = mode["e_tag"] if isinstance(mode, dict) else None
                if self._find_etag(key) != wanted:
                    raise ObjectError("PUT", 412, "PreconditionFailed", "")
                mode = "overwrite"
            return obstore.put(store, key, data, mode=mode, use_multipart=False)["e_tag"] or ""

    def _find_etag(self, key: str) -> str | None:
        try:
            return obstore.head(self.reads, key)["e_tag"]
        except FileNotFoundError:
            return None

    def is_stalled(self, error: ObjectError) -> bool:
        """Tell whether an upload has failed because it took longer than any may."""
        return not error.status and error.seconds >= _UPLOAD_SECONDS

    def answers(self, key: str) -> bool:
        """Tell whether the store can be reached; one request."""
        try:
            with translated("HEAD"):
                obstore.head(self.reads, key)
        except ObjectError as error:
            return 0 < error.status < 500
        return True

    def write(self, operation: str, url: str, function: Callable[[], T], *, least_tries: int = 1) -> T:
        """Carry out a request that changes something, and may be repeated without harm.

        Args:
            operation: such as PUT.
            url: of the object, for messages.
            function: makes the request.
            least_tries: how often it is tried at least, however long that takes.

        Raises:
            OutputError: the store refuses or is down.
        """
        give_up = self._give_up(url, operation)
        try:
            return self._retry(function, operation, classify_fault, give_up, least_tries)
        except (ObjectError, FetchError) as error:
            raise OutputError(self.explain(error, url) if isinstance(error, ObjectError) else str(error)) from None

    def _retry(
        self,
        function: Callable[[], T],
        operation: str,
        classify: Callable[[Exception], Fault | None],
        give_up: Callable[[Exception, str], Exception],
        least_tries: int = 1,
    ) -> T:
        return retry(
            function,
            faults=self.faults,
            store=self.url,
            operation=operation,
            classify=classify,
            give_up=give_up,
            least_tries=least_tries,
        )

    def _give_up(self, url: str, operation: str = "list") -> Callable[[Exception, str], Exception]:
        def give_up(error: Exception, summary: str) -> Exception:
            hint = ""
            if self.endpoint.startswith("http://") and "connection reset" in str(error):
                hint = "; if it speaks TLS, write https:// in the endpoint"
            return FetchError(f"{self.url}: {operation} of {url}: {summary}: {one_line(error)}{self._at}{hint}")

        return give_up

    @property
    def endpoint(self) -> str:
        """The endpoint that the user has given; empty where there is none."""
        return (self.aws.endpoint if self.aws else None) or ""

    @property
    def _at(self) -> str:
        return f" (at {self.endpoint})" if self.endpoint else ""

    def explain(self, error: ObjectError, url: str) -> str:
        """Return the message for a refusal: the request, where, and the next step."""
        key = url.removeprefix(self.url).strip("/")
        if error.status == 403 and not error.code:
            error = self._ask_why(error, key)
        times = f" after {error.num_attempts} attempts" if error.num_attempts > 1 else ""
        return f"{url}: {error.method} failed{times}: {error}{self._at}{advise(error, self)}"

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
