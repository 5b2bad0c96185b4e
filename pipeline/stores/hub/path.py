"""Places on the Hugging Face Hub, and the Hub that they are on."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from urllib.parse import quote, unquote

from huggingface_hub import constants

from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.urls import check_endpoint

_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
_TRUE = ("1", "ON", "YES", "TRUE")


@dataclass(frozen=True, slots=True)
class HubPath:
    """A place in a model repository: `hf://org/name[@revision][/path]`."""

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

    @property
    def root(self) -> HubPath:
        """The whole repository, at the same revision."""
        return replace(self, path="")

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
    if parts[0] in ("datasets", "spaces", "kernels"):
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
