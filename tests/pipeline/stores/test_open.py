"""Stores: the storages of one merge."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from raymerge.pipeline.errors import ConfigError, FetchError
from raymerge.pipeline.stores.local.storage import LocalStorage
from raymerge.pipeline.stores.open import COPY_NBYTES, Stores, open_stores
from raymerge.pipeline.stores.settings import StoreSettings
from tests.pipeline.stores.storage_contract import make_bytes


def test_there_is_one_storage_for_each_scheme(tmp_path: Path) -> None:
    with open_stores() as stores, open_stores() as others:
        assert stores.at("relative/dir") is stores.at(str(tmp_path)) is stores.at(tmp_path.as_uri())
        assert stores.at("relative/dir") is not others.at("relative/dir")
        assert isinstance(stores.at("odd:name"), LocalStorage)
        assert stores.at("s3://bucket/a") is stores.at("s3a://other/b") is not stores.at("gs://bucket/a")


def test_urls_are_checked(stores: Stores) -> None:
    with pytest.raises(ConfigError, match="did you mean s3://bucket/a"):
        stores.at("s3:bucket/a")


def test_another_process_gets_the_settings_and_what_is_known_to_work(tmp_path: Path) -> None:
    stores = Stores(StoreSettings("fsspec", private=False))
    here = stores.at(str(tmp_path))
    stores.faults.note("s3://bucket", "GET", "503")
    stores.faults.note_answer("s3://bucket")
    copy, again = pickle.loads(pickle.dumps((stores, stores)))
    assert copy is again
    assert copy.settings == stores.settings
    assert copy.at(str(tmp_path)) is not here
    assert copy.faults.drain() == ()
    assert copy.faults.reached == ("s3://bucket",)
    assert stores.faults.drain() == (("s3://bucket: GET: 503", 1),)


@pytest.mark.parametrize("nbytes", [0, 1, COPY_NBYTES, 2 * COPY_NBYTES + 1])
def test_files_are_read_in_pieces(stores: Stores, tmp_path: Path, nbytes: int) -> None:
    (tmp_path / "a").write_bytes(make_bytes(nbytes))
    file = stores.at(str(tmp_path)).stat(str(tmp_path / "a"))
    pieces = [bytes(piece) for piece in stores.read_pieces(file)]
    assert b"".join(pieces) == make_bytes(nbytes)
    assert len(pieces) == -(-nbytes // COPY_NBYTES)


def test_a_file_that_changes_while_it_is_read(stores: Stores, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(COPY_NBYTES + 1))
    pieces = stores.read_pieces(stores.at(str(tmp_path)).stat(str(tmp_path / "a")))
    next(pieces)
    with (tmp_path / "a").open("ab") as file:
        file.write(b"more")
    with pytest.raises(FetchError, match="changed since the plan was made"):
        next(pieces)


def test_closed_stores_can_still_be_used(tmp_path: Path) -> None:
    with open_stores() as stores:
        stores.at(str(tmp_path)).write(str(tmp_path / "a"), b"1")
    assert stores.at(str(tmp_path)).read(str(tmp_path / "a"), 1) == b"1"
