"""Index pages of web servers, and what is in a model where there are none."""

from __future__ import annotations

from contextlib import suppress
from html.parser import HTMLParser
from urllib.parse import unquote, urldefrag, urljoin

from raymerge.pipeline.decoding import parse_json

INDEX = "model.safetensors.index.json"

USUAL_NAMES = (  # the first is in every model
    "config.json",
    INDEX,
    "model.safetensors",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "preprocessor_config.json",
)


def parse_index(content_type: str, content: bytes, url: str) -> list[tuple[str, bool]]:
    """Return name, and whether it is a directory, of what an index page lists right below itself; none if it is none.

    Args:
        content_type: of the page, such as `text/html`.
        content: the page.
        url: the page's, with a slash at its end.

    >>> parse_index("text/html", b'<a href="../">up</a> <a href="a%20b">a b</a> <a href="c/">c</a>', "http://host/m/")
    [('a b', False), ('c', True)]
    """
    if content_type == "application/json":
        return _parse_json(content)
    if content_type != "text/html":
        return []
    parser = _LinkParser()
    with suppress(AssertionError):  # of html.parser, about markup that it cannot read; the links before it count
        parser.feed(content.decode(errors="replace"))
    found: dict[str, bool] = {}
    for link in parser.links:
        try:
            target = urldefrag(urljoin(url, link)).url
        except ValueError:
            continue
        rest = target.removeprefix(url)
        name = unquote(rest.removesuffix("/"))
        if target != rest and "?" not in rest and _is_name(name):
            found[name] = rest.endswith("/")
    return list(found.items())


def parse_weight_names(content: bytes) -> list[str]:
    """Return the files that a model's index names; none where it is damaged, which whoever plans with it will say."""
    try:
        return sorted({name for name in parse_json(content)["weight_map"].values() if _is_name(name)})
    except (ValueError, TypeError, KeyError, AttributeError):
        return []


def _parse_json(content: bytes) -> list[tuple[str, bool]]:
    """Read what nginx writes with `autoindex_format json`."""
    try:
        entries = [(entry["name"], entry["type"] == "directory") for entry in parse_json(content)]
    except (ValueError, TypeError, KeyError):
        return []
    return [(name, is_directory) for name, is_directory in entries if _is_name(name)]


def _is_name(name: object) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name


class _LinkParser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.links += [value for name, value in attrs if name == "href" and value]
