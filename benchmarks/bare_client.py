"""Moves bytes from and to S3 with obstore alone: what a merge is compared with.

`python benchmarks/bare_client.py OPERATION JOB`, with the server and credentials in the environment as for raymerge.
What a job is says `Job`. Operations: `read` into memory that obstore gives, `read_into` memory of our own, `write` from
memory that stays as it is, `write_from` memory that is used again; what they cost is printed. And `transfer`: `read`
and `write` at once, in several processes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from pathlib import Path

import obstore
from obstore.store import S3Store

Piece = tuple[str, str, int, int]
"""Bucket, key, start, stop."""

WRITE_NBYTES = 4 * 2**20
"""Given to a writer at once, as a merge does."""


@dataclass(frozen=True)
class Job:
    """What is to be moved, and how."""

    reads: list[tuple[str, str, int]]
    """Whole objects: bucket, key, bytes."""
    writes: list[tuple[str, str, int]]
    """Likewise."""
    num_processes: int
    """Of `transfer`; the others are done by one."""
    num_requests: int
    """GETs in flight in a process."""
    piece_nbytes: int
    """Of a GET."""
    part_nbytes: int
    """Of a part of an upload."""
    num_parts: int
    """In flight, of one upload."""

    @classmethod
    def load(cls, path: Path) -> Job:
        """Read it from a file."""
        return cls(**json.loads(path.read_text()))

    def pieces(self) -> list[Piece]:
        """Return the GETs."""
        return [
            (bucket, key, start, min(start + self.piece_nbytes, nbytes))
            for bucket, key, nbytes in self.reads
            for start in range(0, nbytes, self.piece_nbytes)
        ]


@cache
def open_store(bucket: str) -> S3Store:
    """Return a store that does as little as the one that raymerge uses."""
    return S3Store(
        bucket,
        config={
            "endpoint": os.environ["AWS_ENDPOINT_URL"],
            "region": os.environ["AWS_REGION"],
            "access_key_id": os.environ["AWS_ACCESS_KEY_ID"],
            "secret_access_key": os.environ["AWS_SECRET_ACCESS_KEY"],
            "unsigned_payload": True,
            "checksum_algorithm": "crc64nvme",
        },
        client_options={"allow_http": True, "timeout": timedelta(seconds=20)},
    )


def read(job: Job, pieces: list[Piece], *, is_copied: bool = False) -> None:
    """Get pieces into memory; into buffers that are used again if they are to be copied."""
    buffers = threading.local()

    def get(piece: Piece) -> None:
        bucket, key, start, stop = piece
        data = memoryview(open_store(bucket).get_range(key, start=start, end=stop))
        if data.nbytes != stop - start:
            raise EOFError(f"{key}: {data.nbytes} bytes of {stop - start}")
        if is_copied:
            if not hasattr(buffers, "own"):
                buffers.own = memoryview(bytearray(job.piece_nbytes))
            buffers.own[: data.nbytes] = data

    with ThreadPoolExecutor(job.num_requests) as pool:
        for _ in pool.map(get, pieces):
            pass


@cache
def make_content(nbytes: int) -> memoryview:
    """Return memory that holds something."""
    content = memoryview(bytearray(nbytes))
    content[:] = os.urandom(nbytes)
    return content


def write(job: Job, files: list[tuple[str, str, int]], *, is_copied: bool = False) -> None:
    """Upload files, one after the other; obstore keeps what it is given, not a copy, until it has arrived."""
    num_pieces = (job.num_parts + 2) * job.part_nbytes // WRITE_NBYTES
    content = make_content(num_pieces * WRITE_NBYTES)
    for bucket, key, nbytes in files:
        with obstore.open_writer(
            open_store(bucket), key, buffer_size=job.part_nbytes, max_concurrency=job.num_parts
        ) as writer:
            for number, start in enumerate(range(0, nbytes, WRITE_NBYTES)):
                at = number % num_pieces * WRITE_NBYTES
                piece = content[at : at + min(WRITE_NBYTES, nbytes - start)]
                writer.write(bytes(piece) if is_copied else piece)


def transfer(job: Job, number: int) -> None:
    """Do one process's share, reading and writing at once."""
    pieces = job.pieces()
    start, stop = (len(pieces) * k // job.num_processes for k in (number, number + 1))
    with ThreadPoolExecutor(2) as pool:
        reading = pool.submit(read, job, pieces[start:stop])
        writing = pool.submit(write, job, job.writes[number :: job.num_processes])
        reading.result()
        writing.result()


def transfer_all(job: Job) -> None:
    """Do all of it, in several processes."""
    context = multiprocessing.get_context("fork")  # nothing of obstore runs yet
    processes = [context.Process(target=transfer, args=(job, number)) for number in range(job.num_processes)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        sys.exit("a process failed")


@contextmanager
def measured(nbytes: int) -> Iterator[None]:
    """Print what is done in here cost this process, as JSON."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    before, started = usage.ru_utime + usage.ru_stime, time.perf_counter()
    yield
    wall = time.perf_counter() - started
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"nbytes": nbytes, "wall": wall, "cpu": usage.ru_utime + usage.ru_stime - before}))


def main(operations: dict[str, Callable[[Job], None]]) -> None:
    """Do what the command line says."""
    operation, path = sys.argv[1:]
    operations[operation](Job.load(Path(path)))


def _read_alone(job: Job, *, is_copied: bool) -> None:
    read(job, job.pieces()[: job.num_requests], is_copied=is_copied)  # connections are there then
    with measured(sum(nbytes for _, _, nbytes in job.reads)):
        read(job, job.pieces(), is_copied=is_copied)


def _write_alone(job: Job, *, is_copied: bool) -> None:
    write(job, job.writes[:1], is_copied=is_copied)
    with measured(sum(nbytes for _, _, nbytes in job.writes)):
        write(job, job.writes, is_copied=is_copied)


if __name__ == "__main__":
    main(
        {
            "read": partial(_read_alone, is_copied=False),
            "read_into": partial(_read_alone, is_copied=True),
            "write": partial(_write_alone, is_copied=False),
            "write_from": partial(_write_alone, is_copied=True),
            "transfer": transfer_all,
        }
    )
