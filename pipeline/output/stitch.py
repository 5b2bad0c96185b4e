"""Makes one model of the finished shards: everything that is not a tensor, and what makes it loadable last."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version

from raymerge import __version__
from raymerge.pipeline.checkpoint.checkpoint import CONFIG, INDEX, MANIFEST
from raymerge.pipeline.errors import OutputError
from raymerge.pipeline.output.card import make_card
from raymerge.pipeline.output.journal import Journal
from raymerge.pipeline.output.state import MAX_MANIFEST_NBYTES, read_manifest
from raymerge.pipeline.plan.types import MergePlan, OutputFile, ShardResult
from raymerge.pipeline.redact import redact
from raymerge.pipeline.stores.files import Buffer, StoredFile
from raymerge.pipeline.stores.open import Stores
from raymerge.pipeline.urls import revision_of

_OWN_CONFIG = "mergekit_config.yml"
_CARD = "README.md"


def list_outputs(plan: MergePlan) -> list[str]:
    """Return the name of every file of the output."""
    names = [*(task.file for task in plan.tasks), *(name for name, _ in plan.side_files)]
    return [*names, _OWN_CONFIG, _CARD, MANIFEST, CONFIG, *([INDEX] if len(plan.tasks) > 1 else [])]


def find_nonfinite(results: Iterable[ShardResult]) -> tuple[str, ...]:
    """Return the tensors with NaN or infinity, by name."""
    return tuple(sorted(name for result in results for name in result.nonfinite))


def stitch(plan: MergePlan, results: Sequence[ShardResult], journal: Journal) -> None:
    """Complete an output directory.

    The order matters: the donor's files, the card and the manifest first, then config.json, and last of all the index,
    without which nothing loads. (A model of one shard has no index; there config.json is the last.) The manifest, which
    tells any two plans apart, and the last one must not be there already: of two runs that write to one place, only one
    can finish.

    Args:
        plan: what was to be done.
        results: one for each of its tasks.
        journal: of the output directory.

    Raises:
        OutputError: a shard is not there, a file could not be written, or another run has finished here.
    """
    stores, out = journal.stores, journal.out
    storage = stores.at(out)
    by_file = {result.file: result for result in results}
    for task in plan.tasks:
        found, made = storage.stat(f"{out}/{task.file}"), by_file[task.file]
        if (found.nbytes, found.etag) != (made.nbytes, made.etag):
            raise OutputError(
                f"{out}/{task.file} is no longer what was written: {found.nbytes:,} bytes, etag {found.etag};"
                f" {made.nbytes:,} bytes, etag {made.etag} are expected; run again when nobody else writes there"
            )
    files = {result.file: OutputFile(result.nbytes, result.sha256) for result in results}
    for name, source in plan.side_files:
        files[name] = _copy(source, name, journal)

    texts = {_OWN_CONFIG: redact(plan.config_text), _CARD: redact(make_card(plan))}
    last = {CONFIG: plan.config_json}
    if len(plan.tasks) > 1:
        last[INDEX] = make_index(plan)
    for name, text in (texts | last).items():
        files[name] = OutputFile(len(text.encode()), hashlib.sha256(text.encode()).hexdigest())
    texts[MANIFEST] = make_manifest(plan, results, files)
    final = next(reversed(last))
    for name, text in (texts | last).items():
        content = text.encode()
        if name == final:
            journal.check_held()
        try:
            _write([content], name, len(content), journal, exclusive=name in (MANIFEST, final))
        except FileExistsError:
            if not _is_ours(stores, name, content, plan, out):
                raise OutputError(
                    f"{out}/{name}: another run has finished a different model here meanwhile;"
                    " choose another directory, or run again with --overwrite when nobody else writes there"
                ) from None
            _write([content], name, len(content), journal)
    title = f"{plan.method} of {', '.join(map(str, plan.models))}, made with raymerge {__version__}"
    storage.publish(out, redact(title))


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
    sources = {(source.model, source.file) for task in plan.tasks for merge in task.merges for source in merge.sources}
    urls = {str(item.model): item.url for item in plan.inputs}
    inputs = sorted((model, file.url.removeprefix(f"{urls[model]}/"), file.nbytes) for model, file in sources)
    manifest = {
        "raymerge": __version__,
        "torch": version("torch"),
        "python": platform.python_version(),
        "fingerprint": plan.fingerprint,
        "seed": plan.seed,
        "method": plan.method,
        "config": plan.config_text,
        "models": [{"model": str(item.model), "revision": revision_of(item.url)} for item in plan.inputs],
        "inputs": [{"model": model, "file": name, "nbytes": nbytes} for model, name, nbytes in inputs],
        "warnings": list(plan.warnings),
        "dropped": list(plan.dropped),
        "nonfinite": find_nonfinite(results),
        "files": {name: dataclasses.asdict(file) for name, file in sorted(files.items())},
    }
    return redact(json.dumps(manifest, indent=1, ensure_ascii=False)) + "\n"


def _is_ours(stores: Stores, name: str, content: bytes, plan: MergePlan, out: str) -> bool:
    """Tell whether a file that is there already was written by an earlier try at the same plan."""
    if name != MANIFEST:
        return stores.at(out).read(f"{out}/{name}", MAX_MANIFEST_NBYTES) == content
    try:
        return read_manifest(stores, out).fingerprint == plan.fingerprint
    except ValueError:
        return False


def _copy(source: StoredFile, name: str, journal: Journal) -> OutputFile:
    digest = hashlib.sha256()

    def hashed() -> Iterator[Buffer]:
        for piece in journal.stores.read_pieces(source):
            digest.update(piece)
            yield piece

    _write(hashed(), name, source.nbytes, journal)
    return OutputFile(source.nbytes, digest.hexdigest())


def _write(
    pieces: Iterable[Buffer | bytes], name: str, nbytes: int, journal: Journal, *, exclusive: bool = False
) -> None:
    writer = journal.open_file(name, nbytes, exclusive=exclusive)
    try:
        for piece in pieces:
            writer.write(piece)
    except BaseException:
        writer.abort()
        raise
    writer.commit()
