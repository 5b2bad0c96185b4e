"""Models on any web server that serves ranges: listed from its index pages, or found under their usual names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from email.message import Message
from typing import NoReturn
from urllib.parse import quote, urlsplit

from raymerge.pipeline.errors import CheckpointError, ConfigError, FetchError, OutputError
from raymerge.pipeline.stores.files import StoredFile
from raymerge.pipeline.stores.remote import RemoteStorage
from raymerge.pipeline.stores.retry import Fault, FaultLog, one_line
from raymerge.pipeline.stores.seam import Lock, Writer
from raymerge.pipeline.stores.web import reader as web_reader
from raymerge.pipeline.stores.web.client import Answer, WebClient
from raymerge.pipeline.stores.web.connection import basic_credentials
from raymerge.pipeline.stores.web.errors import RefusalError, classify_web
from raymerge.pipeline.stores.web.index import INDEX, USUAL_NAMES, parse_index, parse_weight_names

_MAX_INDEX_NBYTES = 64 * 2**20
_MAX_FILES = 10_000
_MAX_DIRECTORIES = 100
_GONE = (404, 410)
_ABSENT = (401, 403, 404, 405, 410)
"""Statuses of an answer where there is no index; some stores also give them where there might be a file."""


_PAGE = (
    "the server answers with a page, not a file; check the URL,"
    " and whether that page asks for a login, or stands for everything that is not there"
)


@dataclass(frozen=True, slots=True)
class _Source:
    """A URL as it is asked for."""

    url: str
    """Encoded, without credentials."""
    headers: Mapping[str, str]


class WebStorage(RemoteStorage):
    """Reads over HTTP; nothing can be written."""

    def __init__(self, faults: FaultLog) -> None:
        super().__init__(faults)
        self._client = WebClient()

    def absolute(self, url: str) -> str:  # noqa: D102
        parts = urlsplit(url)
        if parts.query or parts.fragment:
            raise ConfigError(f"{url}: a directory is needed, and this has a `?` or `#`; write these as %3F and %23")
        if parts.hostname in ("huggingface.co", "hf.co"):
            name = "/".join(parts.path.strip("/").split("/")[:2])
            raise CheckpointError(f"{url}: a page about a model; the model itself is hf://{name}")
        return url.rstrip("/")

    def stat(self, url: str) -> StoredFile:  # noqa: D102
        headers = self._head(url, _GONE)
        if _is_page(url, headers):
            raise FetchError(f"{url}: {_PAGE}")
        return _make_file(url, headers)

    def list(self, url: str) -> Mapping[str, StoredFile]:
        """Return the files that the server's index pages lead to; where there are none, those of the usual names."""
        names = dict(self._walk(url, "", iter(range(_MAX_DIRECTORIES))))
        if "config.json" not in names:
            names |= {name: f"{url}/{name}" for name in USUAL_NAMES}
        files = self._stat_all(names)
        if not files:
            with suppress(FileNotFoundError):
                self.stat(f"{url}/config.json")  # says so where a page is all that there is
        if INDEX in files:
            weights = parse_weight_names(self.read(files[INDEX].url, _MAX_INDEX_NBYTES))
            files |= self._stat_all({name: f"{url}/{quote(name)}" for name in weights if name not in files})
        self._check_ranges(files.values())
        return dict(sorted(files.items()))

    def check_unchanged(self, file: StoredFile) -> None:  # noqa: D102
        try:
            found = self.stat(file.url)
        except FileNotFoundError:
            raise FetchError(f"{file.url}: was there when the plan was made, and has changed: it is gone") from None
        if found != file:
            raise web_reader.changed(file, found.nbytes, found.etag)

    def open_writer(  # noqa: D102
        self, url: str, nbytes: int, partial_url: str | None = None, *, exclusive: bool = False
    ) -> Writer:
        _refuse(url)

    def delete(self, url: str) -> None:  # noqa: D102
        _refuse(url)

    def check_space(self, url: str, nbytes: int) -> None:  # noqa: D102
        _refuse(url)

    def lock(self, url: str, *, restart: bool = False) -> AbstractContextManager[Lock]:  # noqa: D102
        _refuse(url)

    def close(self) -> None:  # noqa: D102
        super().close()
        self._client.close()

    def store_name(self, url: str) -> str:  # noqa: D102
        parts = urlsplit(url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"

    def classify(self, error: Exception) -> Fault | None:  # noqa: D102
        return classify_web(error)

    def explain(self, error: Exception, url: str) -> FetchError:  # noqa: D102
        hint = ""
        if isinstance(error, RefusalError) and error.status in (401, 403):
            hint = "; if it needs a name and a password, write them into the URL: https://name:password@host/..."
        return FetchError(f"{url}: {one_line(error)}{hint}")

    def open_range(self, file: StoredFile, start: int, stop: int) -> Answer:  # noqa: D102
        source = _source_of(file.url)
        headers = {**source.headers, **_make_condition(file.etag)}

        def check(answered: Message) -> None:
            found = _read_etag(answered)
            if found and found != file.etag:
                raise web_reader.changed(file, file.nbytes, found)

        return web_reader.open_range(self._client, source.url, headers, file, start, stop, check)

    def _head(self, url: str, absent: Sequence[int]) -> Message:
        """Return a file's headers; `absent` are the answers that mean that there is no such file.

        Raises:
            FileNotFoundError: there is no such file.
            FetchError: the server refuses or is down.
        """
        source = _source_of(url)

        def ask() -> Message:
            try:
                return self._client.ask("HEAD", source.url, source.headers, redirects=True).headers
            except RefusalError as error:
                if error.status in absent:
                    raise FileNotFoundError(f"{url}: no such file") from None
                raise

        return self.call("HEAD", url, ask)

    def _stat_all(self, names: Mapping[str, str]) -> dict[str, StoredFile]:
        """Return which of some URLs are files, by name."""

        def find(url: str) -> StoredFile | None:
            name = url.rpartition("/")[2]
            try:
                headers = self._head(url, _ABSENT if name in USUAL_NAMES[1:] else _GONE)
            except FileNotFoundError:
                return None
            return None if _is_page(url, headers) else _make_file(url, headers)

        found = zip(names, self._requests().map(find, names.values()), strict=True)
        return {name: file for name, file in found if file is not None}

    def _walk(self, url: str, prefix: str, budget: Iterator[int]) -> Iterator[tuple[str, str]]:
        """Yield relative name and URL of each file that an index page and those below it name.

        Args:
            url: where the walk began.
            prefix: what was gone down since, with a slash at its end.
            budget: has one item for each page that may still be read.
        """
        if next(budget, None) is None:
            raise FetchError(f"{url}: more than {_MAX_DIRECTORIES} directories; give the directory of one model")
        source = _source_of(f"{url}/{quote(prefix)}" if prefix else f"{url}/")

        def ask() -> tuple[str, bytes] | None:
            try:
                reply = self._client.ask("GET", source.url, source.headers, redirects=True)
                return reply.headers.get_content_type(), reply.content
            except RefusalError as error:
                if error.status in _ABSENT:
                    return None
                raise

        answered = self.call("GET", url, ask)
        entries = parse_index(*answered, source.url) if answered else []
        if len(entries) > _MAX_FILES:
            raise FetchError(f"{url}/{prefix}: {len(entries):,} entries; give the directory of one model")
        for name, is_directory in entries:
            if not is_directory:
                yield prefix + name, f"{url}/{quote(prefix + name)}"
            else:
                yield from self._walk(url, f"{prefix}{name}/", budget)

    def _check_ranges(self, files: Iterable[StoredFile]) -> None:
        """Make sure, before a merge needs it, that the server serves parts of files."""
        largest = max(files, key=lambda file: file.nbytes, default=None)
        if largest is not None and largest.nbytes > 1:
            self._read_byte(largest)

    def _read_byte(self, file: StoredFile) -> None:
        def ask() -> None:
            self.open_range(file, 0, 1).finish()

        self.call("GET", file.url, ask)


def _source_of(url: str) -> _Source:
    """Return how a URL is asked for: `%` in it is taken to encode something, anything else is encoded."""
    parts = urlsplit(url)
    headers = {"Authorization": basic_credentials(parts)} if parts.username else {}
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
    return _Source(parts._replace(netloc=parts.netloc.rpartition("@")[2], path=path).geturl(), headers)


def _is_page(url: str, headers: Message) -> bool:
    """Tell whether the answer is a page, as if all were well, that says that there is nothing, or asks who we are."""
    return headers.get_content_type() == "text/html" and not url.endswith((".html", ".htm"))


def _make_file(url: str, headers: Message) -> StoredFile:
    nbytes = web_reader.parse_nbytes(headers)
    if nbytes is None:
        raise FetchError(f"{url}: the server does not say how large it is; download the model, and name the directory")
    etag = _read_etag(headers)
    if not etag:
        raise FetchError(
            f"{url}: the server gives neither ETag nor Last-Modified, so that nobody could tell if the file changed;"
            " download the model, and name the directory"
        )
    return StoredFile(url, nbytes, etag)


def _read_etag(headers: Message) -> str:
    """Return a file's version: its ETag, or the time of its last change."""
    return headers.get("ETag") or headers.get("Last-Modified") or ""


def _make_condition(etag: str) -> dict[str, str]:
    """Return the header by which a server notices that a file is not what was planned with."""
    if etag.startswith('"'):
        return {"If-Match": etag}
    if not etag or etag.startswith("W/"):
        return {}  # weak ones may not be sent; the answer's is compared
    return {"If-Unmodified-Since": etag}


def _refuse(url: str) -> NoReturn:
    scheme = urlsplit(url).scheme
    raise OutputError(f"{url}: {scheme}:// cannot be written to; choose a directory, s3://, gs://, az:// or hf://")
