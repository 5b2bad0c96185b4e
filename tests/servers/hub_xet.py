"""Xet storage of the test Hub: directories on this machine that hf_xet keeps itself, as if each were a CAS server.

Each upload gets a directory of its own, because hf_xet locks one for as long as its process lives. Contents are read
over HTTP, as any client may; there is no reading by Xet.
"""

from __future__ import annotations

import itertools
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

_HEADER_NBYTES = 48
_ENTRY_NBYTES = 48
_END = b"\xff" * 32
_HAS_VERIFICATION, _HAS_METADATA = 1 << 31, 1 << 30


class XetStore:
    """What was uploaded by Xet, by its Xet hash, and by its SHA-256 where that is known."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._numbers = itertools.count()

    def open(self) -> str:
        """Return the URL of a new directory."""
        path = self._directory / str(next(self._numbers))
        path.mkdir(parents=True)
        return f"local://{path}"

    def fetch(self, *, sha256: str | None = None, xet_hash: str | None = None) -> bytes | None:
        """Return the content that has one of these; None where it was not uploaded."""
        for shard in self._directory.glob("*/xet/xorbs/shards/*.mdb"):
            for found_hash, found_sha256, nbytes in _parse_shard(shard.read_bytes()):
                if xet_hash == found_hash or (sha256 is not None and sha256 == found_sha256):
                    return _download(shard.parents[3], found_hash, nbytes)
        return None


def _parse_shard(content: bytes) -> Iterator[tuple[str, str | None, int]]:
    """Yield the Xet hash, SHA-256 and size of each file that a shard, a piece of Xet's metadata, tells of."""
    offset = _HEADER_NBYTES
    while (xet_hash := content[offset : offset + 32]) != _END:
        flags, num_entries = struct.unpack_from("<II", content, offset + 32)
        offset += _HEADER_NBYTES
        nbytes = sum(
            struct.unpack_from("<I", content, offset + _ENTRY_NBYTES * number + 36)[0] for number in range(num_entries)
        )
        offset += _ENTRY_NBYTES * num_entries * (2 if flags & _HAS_VERIFICATION else 1)
        sha256 = None
        if flags & _HAS_METADATA:
            sha256 = _to_hex(content[offset : offset + 32])
            offset += _ENTRY_NBYTES
        yield _to_hex(xet_hash), sha256, nbytes


def _to_hex(value: bytes) -> str:
    """Return a hash, which is stored as four little-endian numbers."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", value))


def _download(directory: Path, xet_hash: str, nbytes: int) -> bytes:
    from hf_xet import XetFileInfo, XetSession

    with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
        copy = shutil.copytree(directory, Path(temporary, "copy"))  # whoever has written there may hold its lock
        target = Path(temporary, "file")
        with XetSession().new_file_download_group(endpoint=f"local://{copy}") as group:
            group.start_download_file(XetFileInfo(xet_hash, nbytes), str(target))
        return target.read_bytes()
