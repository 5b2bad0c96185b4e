"""Makes one model of the finished shards: everything that is not a tensor, and what makes it loadable last."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Sequence
from importlib.metadata import version

from raymerge import __version__
from raymerge.pipeline.card import make_card
from raymerge.pipeline.errors import OutputError
from raymerge.pipeline.output import MANIFEST
from raymerge.pipeline.sources import CONFIG, INDEX
from raymerge.pipeline.storage import ByteRange, storage_for
from raymerge.pipeline.types import MergePlan, OutputFile, ShardResult, StoredFile

_COPY_NBYTES = 4 * 2**20


def stitch(plan: MergePlan, results: Sequence[ShardResult], out: str) -> None:
    """Complete an output directory.

    The order matters: the donor's files, the card and the manifest first, then config.json, and last of all the index,
    without which nothing loads. (A model of one shard has no index; there config.json is the last.)

    Args:
        plan: what was to be done.
        results: one for each of its tasks.
        out: the output directory.

    Raises:
        OutputError: a shard is not there, or a file could not be written.
    """
    storage = storage_for(out)
    by_file = {result.file: result for result in results}
    for task in plan.tasks:
        found = storage.stat(f"{out}/{task.file}").nbytes
        if found != by_file[task.file].nbytes:
            raise OutputError(f"{out}/{task.file}: {found} bytes, {by_file[task.file].nbytes} were written")
    files = {result.file: OutputFile(result.nbytes, result.sha256) for result in results}
    for name, source in plan.side_files:
        files[name] = _copy(source, f"{out}/{name}")

    texts = {"mergekit_config.yml": plan.config_text, "README.md": make_card(plan, out.rstrip("/").rpartition("/")[2])}
    last = {CONFIG: plan.config_json}
    if len(plan.tasks) > 1:
        last[INDEX] = make_index(plan)
    for name, text in (texts | last).items():
        files[name] = OutputFile(len(text.encode()), hashlib.sha256(text.encode()).hexdigest())
    texts[MANIFEST] = make_manifest(plan, results, files)
    for name, text in (texts | last).items():
        storage.write(f"{out}/{name}", text.encode())


def make_index(plan: MergePlan) -> str:
    """Return `model.safetensors.index.json`."""
    metadata = {"total_size": plan.total_nbytes, "raymerge_version": __version__}
    weight_map = dict(sorted(plan.weight_map.items()))
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, ensure_ascii=False) + "\n"


def make_manifest(plan: MergePlan, results: Sequence[ShardResult], files: dict[str, OutputFile]) -> str:
    """Return `raymerge_manifest.json`: where the output comes from, and the checksum of every file.

    Args:
        plan: what was done.
        results: of its tasks.
        files: every other file of the output, by name.
    """
    inputs = {(source.model, source.file) for task in plan.tasks for merge in task.merges for source in merge.sources}
    manifest = {
        "raymerge": __version__,
        "torch": version("torch"),
        "python": platform.python_version(),
        "fingerprint": plan.fingerprint,
        "seed": plan.seed,
        "method": plan.method,
        "config": plan.config_text,
        "models": [str(model) for model in plan.models],
        "inputs": [
            {"model": model, **dataclasses.asdict(file)}
            for model, file in sorted(inputs, key=lambda item: (item[0], item[1].url))
        ],
        "warnings": list(plan.warnings),
        "dropped": list(plan.dropped),
        "nonfinite": sorted(name for result in results for name in result.nonfinite),
        "files": {name: dataclasses.asdict(file) for name, file in sorted(files.items())},
    }
    return json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"


def _copy(source: StoredFile, target: str) -> OutputFile:
    """Copy a file in pieces."""
    digest = hashlib.sha256()
    storage = storage_for(source.url)
    writer = storage_for(target).open_writer(target, source.nbytes)
    buffer = memoryview(bytearray(min(_COPY_NBYTES, source.nbytes)))
    try:
        for start in range(0, source.nbytes, _COPY_NBYTES):
            piece = ByteRange(source, start, min(start + _COPY_NBYTES, source.nbytes))
            view = buffer[: piece.nbytes]
            storage.read_into([piece], [view])
            digest.update(view)
            writer.write(view)
    except BaseException:
        writer.abort()
        raise
    writer.commit()
    return OutputFile(source.nbytes, digest.hexdigest())
