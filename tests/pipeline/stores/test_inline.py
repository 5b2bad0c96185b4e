"""Files that are part of a plan."""

from __future__ import annotations

import pickle

import pytest

from raymerge.pipeline.errors import ConfigError, OutputError
from raymerge.pipeline.stores.files import ByteRange
from raymerge.pipeline.stores.inline import INLINE_URL, make_file
from raymerge.pipeline.stores.open import Stores


def test_are_read_in_whatever_process_has_them() -> None:
    file = pickle.loads(pickle.dumps(make_file(b"0123456789")))
    stores = pickle.loads(pickle.dumps(Stores()))
    assert stores.read_ranges([ByteRange(file, 2, 5), ByteRange(file, 0, 1)]) == (b"234", b"0")
    stores.at(file.url).check_unchanged(file)


def test_are_told_apart_by_their_content() -> None:
    assert make_file(b"a").content_id == make_file(b"a").content_id != make_file(b"b").content_id
    assert make_file(b"a", "x").content_id == make_file(b"b", "x").content_id
    assert "0123" not in repr(make_file(b"0123"))


def test_nothing_else_is_there() -> None:
    storage = Stores().at(INLINE_URL)
    assert storage.list(INLINE_URL) == {}
    with pytest.raises(FileNotFoundError):
        storage.stat(INLINE_URL)
    with pytest.raises(OutputError, match="cannot be written to"):
        storage.write(f"{INLINE_URL}", b"")
    with pytest.raises(ConfigError, match="not a kind of URL"):
        Stores().at("inline://other")
