"""What the Hugging Face Hub is asked: where, as whom, how often; and what its refusals mean to the user."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlencode, urlsplit

from huggingface_hub import __version__ as hub_version
from huggingface_hub import constants, get_token

from raymerge import __version__
from raymerge.pipeline.errors import ConfigError, FetchError
from raymerge.pipeline.stores.remote import REQUEST_SECONDS
from raymerge.pipeline.stores.retry import FaultLog, one_line, retry
from raymerge.pipeline.stores.web.client import Body, Reply, WebClient, origin_of
from raymerge.pipeline.stores.web.errors import BrokenError, RefusalError, classify_web
from raymerge.pipeline.urls import check_endpoint, suggest_directory

_MAX_FILES = 100_000
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
_TRUE = ("1", "ON", "YES", "TRUE")
_BAD_TOKEN = "Invalid credentials"
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True, slots=True)
class HubPath:
    """A place on the Hub: `hf://org/name[@revision][/path]`."""

    repo: str
    """`org/name`."""
    revision: str
    """A branch, tag or commit; slashes in it are plain here, and `%2F` in the URL."""
    path: str
    """Inside the repository; empty for all of it."""

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return _COMMIT.fullmatch(self.revision) is not None

    @property
    def url(self) -> str:
        """The one way to write it."""
        at = "" if self.revision == constants.DEFAULT_REVISION else f"@{quote(self.revision, safe='')}"
        return f"hf://{self.repo}{at}" + (f"/{self.path}" if self.path else "")

    def at(self, revision: str) -> HubPath:
        """Return the same place at another revision."""
        return replace(self, revision=revision)


def parse_hub_url(url: str) -> HubPath:
    """Return the place that a URL means.

    Raises:
        ConfigError: it means none in a model repository.

    >>> parse_hub_url("hf://models/org/name@refs%2Fpr%2F1/sub/").url
    'hf://org/name@refs%2Fpr%2F1/sub'
    """
    parts = url.partition("://")[2].split("/")
    if parts[0] in ("datasets", "spaces", "kernels", "buckets"):
        raise ConfigError(f"{url}: {parts[0]} hold no models to merge; give a model repository, hf://org/name")
    if parts[0] == "models":
        parts = parts[1:]
    name, at, revision = parts[1].partition("@") if len(parts) > 1 else ("", "", "")
    if not (_NAME.fullmatch(parts[0]) and _NAME.fullmatch(name)) or (at and not revision):
        raise ConfigError(
            f"{url}: write it as hf://org/name, hf://org/name@revision or hf://org/name@revision/directory"
        )
    path = "/".join(parts[2:]).rstrip("/")
    return HubPath(f"{parts[0]}/{name}", unquote(revision) or constants.DEFAULT_REVISION, path)


def root_of(place: HubPath) -> HubPath:
    """Return the whole repository, at the same revision."""
    return replace(place, path="")


def find_endpoint() -> str:
    """Return the Hub's address, without a slash at its end.

    Raises:
        FetchError: the environment names one that cannot be.
    """
    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    check_endpoint("HF_ENDPOINT", endpoint)
    return endpoint


def is_offline() -> bool:
    """Tell whether the user has forbidden to ask the Hub."""
    asked = os.environ.get("HF_HUB_OFFLINE")
    return constants.HF_HUB_OFFLINE if asked is None else asked.upper() in _TRUE


class HubApi:
    """Asks the Hub, again where that may help. Endpoint and token are those of the environment at each call."""

    def __init__(self, client: WebClient, faults: FaultLog) -> None:
        self.client = client
        self.faults = faults

    def headers(self, url: str) -> dict[str, str]:
        """Return what to send with a request: the token too, if it is the Hub that it goes to."""
        own = {"User-Agent": f"raymerge/{__version__}; hf_hub/{hub_version}"}
        token = self._find_token() if origin_of(url) == origin_of(find_endpoint()) else None
        return {**own, "Authorization": f"Bearer {token}"} if token else own

    def has_token(self) -> bool:
        """Tell whether there is a token."""
        return self._find_token() is not None

    def _find_token(self) -> str | None:
        return None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()

    def ask(
        self,
        method: str,
        url: str,
        *,
        value: object = None,
        body: Body | None = None,
        headers: Mapping[str, str] | None = None,
        seconds: float = REQUEST_SECONDS,
        redirects: bool = True,
    ) -> Reply:
        """Make a request that may be repeated without harm, and return the answer.

        Args:
            method: such as `GET`.
            url: whole, or what comes after the endpoint.
            value: to be sent as JSON.
            body: to be sent as it is.
            headers: besides the usual ones.
            seconds: that the connection may be silent.
            redirects: whether to follow them.

        Raises:
            RefusalError: the Hub refuses.
            BrokenError: it is down, or cannot be reached.
        """
        if is_offline():
            raise BrokenError("HF_HUB_OFFLINE is set; unset it", None)
        endpoint = find_endpoint()
        target = url if "://" in url else endpoint + url
        sent = {**self.headers(target), **(headers or {})}
        if value is not None:
            body = json.dumps(value).encode()
            sent = {"Content-Type": "application/json", **sent}

        def give_up(error: Exception, summary: str) -> Exception:
            return BrokenError(f"{method} {urlsplit(target).path}: {summary}: {one_line(error)}", None)

        return retry(
            lambda: self.client.ask(method, target, sent, body=body, seconds=seconds, redirects=redirects),
            faults=self.faults,
            store=endpoint,
            operation=method,
            classify=classify_web,
            give_up=give_up,
        )

    def get(self, url: str) -> Any:
        """Return a JSON answer; raises as `ask` does."""
        return parse_json(self.ask("GET", url))

    def post(self, url: str, value: object) -> Any:
        """Send JSON and return a JSON answer; raises as `ask` does."""
        return parse_json(self.ask("POST", url, value=value))

    def find_commit(self, place: HubPath) -> tuple[str, bool]:
        """Return the commit that a revision is now, and whether the repository is gated; raises as `ask` does."""
        model = self.get(f"/api/models/{place.repo}/revision/{quote(place.revision, safe='')}")
        return str(model["sha"]), bool(model.get("gated"))

    def list_tree(self, place: HubPath) -> dict[str, tuple[int, str]]:
        """Return size and etag of each file below a place, by its path in the repository; raises as `ask` does."""
        path = f"/api/models/{place.repo}/tree/{quote(place.revision, safe='')}"
        path += f"/{quote(place.path)}" if place.path else ""
        query = urlencode({"recursive": "true", "expand": "false"})
        found: dict[str, tuple[int, str]] = {}
        asked = set()
        while query:
            asked.add(query)
            reply = self.ask("GET", f"{path}?{query}")
            found.update(_read_entries(parse_json(reply)))
            query = _next_query(reply.headers.get("Link") or "")
            if query in asked or len(found) > _MAX_FILES:
                raise FetchError(f"{place.url}: its listing does not end; {len(found):,} files so far")
        return found

    def find_file(self, place: HubPath) -> tuple[int, str] | None:
        """Return a file's size and etag; None where there is no such file; raises as `ask` does."""
        path = f"/api/models/{place.repo}/paths-info/{quote(place.revision, safe='')}"
        return dict(_read_entries(self.post(path, {"paths": [place.path]}))).get(place.path)

    def explain(self, error: Exception, place: HubPath) -> str:
        """Return what to tell the user about a request that failed for good: what, where, and the next step."""
        endpoint = find_endpoint()
        if not isinstance(error, RefusalError):
            return f"{place.url}: {endpoint}: {one_line(error)}"
        code = error.headers.get("X-Error-Code") or ""
        if code == "GatedRepo":
            get_access = f"open {endpoint}/{place.repo} and accept the terms there"
            return (
                f"{place.url}: a gated repository, and this account has no access yet; {get_access}"
                if self.has_token()
                else f"{place.url}: a gated repository; {get_access}, then {LOG_IN}"
            )
        if code == "RevisionNotFound":
            return f"{place.url}: the repository has no revision {place.revision!r}; see {endpoint}/{place.repo}"
        if code == "EntryNotFound":
            return f"{place.url}: no such file or directory in the repository"
        if error.status == 401 and self.has_token() and code != "RepoNotFound":
            return f"{place.url}: {endpoint} does not accept the token ({one_line(error)}); {LOG_IN}"
        if code == "RepoNotFound" or error.status in (401, 404):
            who = (
                "this account may not read it"
                if self.has_token()
                else f"it is private and you are not logged in: {LOG_IN}"
            )
            directory = Path(place.repo)
            local = f" If a directory was meant, {place.repo} is none either{suggest_directory(directory)}"
            local = "" if directory.exists() else local
            return f"{place.url}: no such repository at {endpoint}, or {who}.{local}"
        if error.status == 403:
            return f"{place.url}: {endpoint} refuses ({one_line(error)}); check what the token may do, or {LOG_IN}"
        return f"{place.url}: {endpoint} refuses: {one_line(error)}"


def is_missing(error: RefusalError) -> bool:
    """Tell whether a refusal says that a repository, a revision or a path is not there, as far as one may know."""
    if error.headers.get("X-Error-Code") in ("RepoNotFound", "RevisionNotFound"):
        return True
    return error.status == 404 or (error.status == 401 and _BAD_TOKEN not in str(error))


def parse_json(reply: Reply) -> Any:
    """Return an answer's JSON.

    Raises:
        BrokenError: it is none.
    """
    try:
        return json.loads(reply.content)
    except ValueError:
        raise BrokenError(
            "the answer is not JSON; is HF_ENDPOINT the address of a Hub, and is no login page in between?", None
        ) from None


def _read_entries(entries: list[dict[str, Any]]) -> Iterator[tuple[str, tuple[int, str]]]:
    for entry in entries:
        if entry["type"] == "file":
            lfs = entry.get("lfs")
            yield entry["path"], (int(entry["size"]), str(lfs["oid"] if lfs else entry["oid"]))


def _next_query(link: str) -> str:
    """Return the query for the next page: its host is not to be believed, as a token goes there."""
    match = re.search(r'<([^>]*)>\s*;\s*rel="next"', link)
    return urlsplit(match[1]).query if match else ""
