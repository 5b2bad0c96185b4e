"""Moves the bytes of a job through raymerge's storage seam, without a merge; see bare_client.py for the job.

`python benchmarks/seam_client.py OPERATION JOB`, where the operation is `read`, `write` or `settings`, which prints how
raymerge reads and writes.
"""

from __future__ import annotations

import json
import mmap
import sys
import threading
from collections.abc import Iterator
from functools import partial

from bare_client import Job, main, measured

from raymerge.pipeline.plan.memory.projection import MAX_FETCH_NBYTES
from raymerge.pipeline.stores.files import ByteRange, StoredFile
from raymerge.pipeline.stores.objects.writer import NUM_PARTS, PART_NBYTES
from raymerge.pipeline.stores.open import Stores, open_stores
from raymerge.pipeline.stores.remote import NUM_REQUESTS, PIECE_NBYTES


def find_tensors(stores: Stores, file: StoredFile) -> list[ByteRange]:
    """Return where the tensors of a file are, in order; those that are larger than a buffer in pieces."""
    storage = stores.at(file.url)
    prefix = memoryview(bytearray(8))
    storage.read_into([ByteRange(file, 0, 8)], [prefix])
    begin = 8 + int.from_bytes(prefix, "little")
    header = memoryview(bytearray(begin - 8))
    storage.read_into([ByteRange(file, 8, begin)], [header])
    entries = json.loads(bytes(header))
    places = sorted(entry["data_offsets"] for name, entry in entries.items() if name != "__metadata__")
    return [
        ByteRange(file, begin + at, begin + min(at + MAX_FETCH_NBYTES, stop))
        for start, stop in places
        for at in range(start, stop, MAX_FETCH_NBYTES)
    ]


def make_windows(ranges: list[ByteRange]) -> Iterator[list[ByteRange]]:
    """Yield what is read at once: as much as goes into a buffer."""
    window: list[ByteRange] = []
    for item in ranges:
        if sum(each.nbytes for each in window) + item.nbytes > MAX_FETCH_NBYTES:
            yield window
            window = []
        window.append(item)
    yield window


def read(stores: Stores, job: Job) -> None:
    """Read every tensor into a buffer that is used again."""
    ranges = []
    for bucket, key, _ in job.reads:
        url = f"s3://{bucket}/{key}"
        ranges += find_tensors(stores, stores.at(url).stat(url))
    storage = stores.at(ranges[0].file.url)
    windows = list(make_windows(ranges))
    buffer = memoryview(bytearray(MAX_FETCH_NBYTES))

    def read_window(window: list[ByteRange]) -> None:
        views, at = [], 0
        for item in window:
            views.append(buffer[at : at + item.nbytes])
            at += item.nbytes
        storage.read_into(window, views)

    read_window(windows[0])
    with measured(sum(item.nbytes for item in ranges)):
        for window in windows:
            read_window(window)


def write(stores: Stores, job: Job) -> None:
    """Write the files, one after the other, from buffers that the writer gives back, as a merge does."""

    def write_file(bucket: str, key: str, nbytes: int) -> None:
        url = f"s3://{bucket}/{key}"
        writer = stores.at(url).open_writer(url, nbytes)
        free = threading.Semaphore(writer.num_buffers)

        def release(buffer: mmap.mmap) -> None:
            stores.pool.release(buffer)
            free.release()

        for start in range(0, nbytes, writer.buffer_nbytes):
            free.acquire()
            writer.take(stores.pool.acquire(writer.buffer_nbytes), min(writer.buffer_nbytes, nbytes - start), release)
        writer.commit()

    write_file(*job.writes[0])
    with measured(sum(nbytes for _, _, nbytes in job.writes)):
        for file in job.writes:
            write_file(*file)


if __name__ == "__main__":
    if sys.argv[1] == "settings":
        settings = {
            "num_requests": NUM_REQUESTS,
            "piece_nbytes": PIECE_NBYTES,
            "part_nbytes": PART_NBYTES,
            "num_parts": NUM_PARTS,
        }
        print(json.dumps(settings))
    else:
        with open_stores() as stores:
            main({"read": partial(read, stores), "write": partial(write, stores)})
