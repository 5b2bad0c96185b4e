from __future__ import annotations

import re
from pathlib import Path

import pytest

from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.stores.open import Stores
from raymerge.pipeline.urls import check_url, is_url, scheme_of, split_url, suggest_file


@pytest.mark.parametrize(
    ("url", "scheme"),
    [
        ("models/a", "file"), ("/models/a", "file"), ("./s3:/a", "file"), ("org/name@main", "file"), ("C:/a", "file"),
        ("C:\\a", "file"), ("", "file"), ("a:b", "file"), ("file:///a", "file"), ("FILE:///a", "file"),
        ("s3://b/k", "s3"), ("S3://b/k", "s3"), ("s3a://b", "s3"), ("s3n://b", "s3"), ("gcs://b", "gs"),
        ("abfss://c/k", "az"), ("azure://c", "az"), ("hf://org/name@main", "hf"), ("http://h", "http"),
        ("HTTPS://h", "https"), ("memory://a", "memory"), ("s3:/b", "s3"), ("svn+ssh://h", "svn+ssh"),
    ],
)  # fmt: skip
def test_scheme(url: str, scheme: str) -> None:
    assert scheme_of(url) == scheme
    assert is_url(url) == (scheme != "file" or url.lower().startswith("file:"))


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("s3://bucket/a/b", ("bucket", "a/b")),
        ("s3://bucket", ("bucket", "")),
        ("s3://bucket/", ("bucket", "")),
        ("s3://bucket//a", ("bucket", "/a")),
        ("s3://bucket/a b/é#?%20", ("bucket", "a b/é#?%20")),
        ("hf://org/name@refs/pr/1", ("org", "name@refs/pr/1")),
    ],
)
def test_split(url: str, parts: tuple[str, str]) -> None:
    assert split_url(url) == parts


@pytest.mark.parametrize(
    "url",
    [
        "models/a", "/models/../a", "./s3:bucket", "C:/models", "org/name", "org/name@main", "a:b", "s3/a", "files//a",
        "", ".", "hfx//a", "https.d//a", "file:///models/a%20b", "file:///a/../b",
        "s3://bucket", "s3://bucket/a b/ü", "s3://bucket/a//b", "S3A://bucket/a", "s3://bucket/a@b:c", "gs://b/.a",
        "s3://arn:aws:s3:us-east-1:1:accesspoint/a/k", "az://container/a", "abfss://container/a",
        "hf://org/name", "hf://org/name@main", "http://127.0.0.1:80/a", "https://me:pw@host/a?b=/c", "memory://",
        "ftp://host/a", "github://org:repo@main/a",
    ],
)  # fmt: skip
def test_well_formed(url: str) -> None:
    check_url(url)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3:/bucket/a", "did you mean s3://bucket/a?"),
        ("s3:///bucket/a", "did you mean s3://bucket/a?"),
        ("s3:bucket/a", "did you mean s3://bucket/a? If it is a path, write ./s3:bucket/a"),
        ("S3:bucket/a", "did you mean S3://bucket/a?"),
        ("s3//bucket/a", "did you mean s3://bucket/a?"),
        ("gcs:bucket", "did you mean gcs://bucket?"),
        ("hf:org/name@main", "did you mean hf://org/name@main?"),
        ("https//host/a", "did you mean https://host/a?"),
        ("http:/host/a", "did you mean http://host/a?"),
        ("file:models/a", "did you mean file:///models/a?"),
        ("file:/models/a", "as in file:///models/a"),
        ("file://models/a", "as in file:///models/a"),
        ("file:////models/a", "as in file:///models/a"),
        ("htps://host/a", "did you mean https://?"),
        ("s33://bucket/a", "did you mean s3://?"),
        ("nosuch://a/b", "is not a kind of URL that raymerge or fsspec knows"),
        ("s3://", "nothing is named after s3://"),
        ("hf://", "nothing is named after hf://"),
        (" s3://bucket/a", "white space before it"),
        ("\ns3://bucket/a", "white space before it"),
        ("simplecache::s3://bucket/a", "chained by ::"),
        ("zip://a::s3://bucket/b", "chained by ::"),
        ("s3::https://host/a", "chained by ::"),
        ("s3://me@bucket/a", "credentials do not belong in a URL"),
        ("s3://KEY:secret@bucket/a", "credentials do not belong in a URL"),
        ("s3://KEY:sec/ret@bucket/a", "credentials do not belong in a URL"),
        ("gs://KEY:secret@bucket", "credentials do not belong in a URL"),
        ("abfss://container@account.dfs.core.windows.net/a", "write az://container/a"),
        ("s3://bucket/../a", "`.` and `..` have no meaning"),
        ("https://host/./a", "`.` and `..` have no meaning"),
        ("models/\udcff", "'models/\\udcff': the name is not UTF-8; rename it, or give a link"),
        ("hf://org/..", "`.` and `..` have no meaning"),
    ],
)
def test_malformed(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        check_url(url)
    assert "secret" not in str(caught.value)


def test_a_mistyped_url_makes_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for url in ("s3:bucket/out", "s3//bucket/out", " s3://bucket/out"):
        with pytest.raises(ConfigError):
            Stores().at(url)
    assert not list(tmp_path.iterdir())


def test_the_nearest_file_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "slerp.yml").touch()
    (tmp_path / "slrp").mkdir()
    assert suggest_file(tmp_path / "slrp.yml") == f"; did you mean {tmp_path / 'slerp.yml'}?"
    assert suggest_file(tmp_path / "slerp.yml") == suggest_file(tmp_path / "gone" / "slerp.yml") == ""
    assert suggest_file(tmp_path / "other") == suggest_file(Path("a\0b")) == ""
