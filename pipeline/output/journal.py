"""The journal of an unfinished output: finished shards are recorded, so that an interrupted merge resumes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from raymerge import __version__
from raymerge.pipeline.decoding import decode, parse_json
from raymerge.pipeline.errors import FetchError, MergeError, OutputError
from raymerge.pipeline.plan.results import ShardFile
from raymerge.pipeline.plan.types import ShardOutput
from raymerge.pipeline.stores.open import Stores
from raymerge.pipeline.stores.seam import Storage, Writer

DIRECTORY = ".raymerge"
"""In the output directory; gone once the merge is complete."""

LOCK = f"{DIRECTORY}/lock"
"""Held by the run that writes to the output."""

_PLAN = f"{DIRECTORY}/plan.json"
_MAX_READS = 5
_MAX_RECORD_NBYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Journal:
    """The journal of one output directory; picklable, so that workers can write to it."""

    stores: Stores
    out: str
    """The output directory."""
    fingerprint: str
    """Fingerprint of the plan that is being carried out."""
    token: str = ""
    """Token of the lock that this run holds, where it may be lost."""

    def check_held(self) -> None:
        """Make sure, before something is committed, that the lock is still this run's.

        Raises:
            OutputError: another run has taken it.
        """
        if not self.token:
            return
        try:
            content = self._read_lock()
        except FileNotFoundError:
            raise OutputError(
                f"{self.out}: the lock of this run is gone: the output, or the bucket that it is in, was deleted"
                " meanwhile; run again when nobody else works there"
            ) from None
        if self.token.encode() not in content:
            raise OutputError(
                f"{self.out}: another run has taken the lock of this one, which had not renewed it in time;"
                " run again when nobody else writes there"
            )

    def _read_lock(self) -> bytes:
        """Return the lock's content; once more where it was renewed between two requests, as on slow lines."""
        url = f"{self.out}/{LOCK}"
        for _ in range(_MAX_READS):
            before = self._storage.stat(url)
            try:
                return self._storage.read(url, _MAX_RECORD_NBYTES)
            except FetchError:
                if self._storage.stat(url) == before:
                    raise
        return self._storage.read(url, _MAX_RECORD_NBYTES)

    def begin(self, names: Sequence[str]) -> None:
        """Note which plan this output is made by, and the names of all its files: no others may be deleted."""
        self._write(_PLAN, {"fingerprint": self.fingerprint, "raymerge": __version__, "files": list(names)})

    def end(self) -> None:
        """Delete the journal: first the note that something is unfinished, in case that not all of this happens."""
        storage = self._storage
        storage.delete(f"{self.out}/{_PLAN}")
        for name in storage.list(f"{self.out}/{DIRECTORY}"):
            if f"{DIRECTORY}/{name}" != LOCK:
                storage.delete(f"{self.out}/{DIRECTORY}/{name}")

    def open_shard(self, output: ShardOutput) -> Writer:
        """Begin a shard; until it is committed it lies in the journal's directory."""
        return self.open_file(output.file, output.nbytes)

    def open_file(self, name: str, nbytes: int, *, exclusive: bool = False) -> Writer:
        """Begin an output file; where a store cannot hide it until it is committed, the journal's directory does."""
        return self._storage.open_writer(
            f"{self.out}/{name}", nbytes, f"{self.out}/{_flat(name)}.partial", exclusive=exclusive
        )

    def record(self, file: ShardFile) -> None:
        """Note that a shard is finished."""
        fields = {field.name: getattr(file, field.name) for field in dataclasses.fields(file)}
        self._write(f"{_flat(file.file)}.json", {"fingerprint": self.fingerprint, **fields})

    def read_records(self, outputs: Iterable[ShardOutput]) -> dict[str, ShardFile]:
        """Return by name the finished shards of this plan whose files are there in full size.

        Args:
            outputs: the shards that the plan makes here.
        """
        found = {}
        for output in outputs:
            try:
                record = parse_json(self._storage.read(f"{self.out}/{_flat(output.file)}.json", _MAX_RECORD_NBYTES))
                if record.pop("fingerprint") != self.fingerprint:
                    continue
                file: ShardFile = decode(record, ShardFile)
                nbytes = self._storage.stat(f"{self.out}/{output.file}").nbytes
                if file.file == output.file and nbytes == file.nbytes == output.nbytes:
                    found[file.file] = file
            except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
                continue  # no record, or one that is damaged: the file is made again
        return found

    @property
    def _storage(self) -> Storage:
        return self.stores.at(self.out)

    def _write(self, name: str, content: object) -> None:
        self._storage.write(f"{self.out}/{name}", json.dumps(content).encode())


def _flat(name: str) -> str:
    """Return where the journal keeps something on a file: not in directories of its own."""
    return f"{DIRECTORY}/{name.replace('/', '_')}"


@dataclass(frozen=True, slots=True)
class Begun:
    """The plan that an unfinished output was begun with."""

    fingerprint: str
    """Fingerprint of the plan; empty where the record is damaged."""
    files: frozenset[str]
    """Names of the files that the plan makes."""


def read_begun(stores: Stores, out: str) -> Begun | None:
    """Return the plan that an unfinished output was begun with; None where there is none."""
    try:
        plan = parse_json(stores.at(out).read(f"{out}/{_PLAN}", _MAX_RECORD_NBYTES))
        return Begun(str(plan["fingerprint"]), frozenset(map(str, plan["files"])))
    except FileNotFoundError:
        return None
    except MergeError:
        raise
    except (ValueError, TypeError, KeyError):
        return Begun("", frozenset())
