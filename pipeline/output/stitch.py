"""Makes one model of the finished shards: everything that is not a tensor, and what makes it loadable last."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version

from raymerge import __version__
from raymerge.pipeline.checkpoint.files import PIPELINE
from raymerge.pipeline.checkpoint.manifest import FIGURES, MANIFEST, MAX_MANIFEST_NBYTES, Manifest, OutputFile
from raymerge.pipeline.errors import OutputError
from raymerge.pipeline.output.card import make_card
from raymerge.pipeline.output.journal import Journal
from raymerge.pipeline.output.state import read_manifest
from raymerge.pipeline.output.verify import hash_file
from raymerge.pipeline.plan.out_files import Copied, Network, Written
from raymerge.pipeline.plan.results import ShardFile
from raymerge.pipeline.plan.types import MergePlan, PlannedOutput
from raymerge.pipeline.redact import redact
from raymerge.pipeline.stores.files import Buffer
from raymerge.pipeline.stores.seam import Writer
from raymerge.pipeline.urls import revision_of

_OWN_CONFIG = "mergekit_config.yml"
_CARD = "README.md"


def list_outputs(plan: MergePlan) -> list[str]:
    """Return the name of every file of an output."""
    names = [*(task.file for task in plan.tasks), *(file.name for file in plan.outputs[0].side_files)]
    return [*names, _OWN_CONFIG, _CARD, MANIFEST, FIGURES, *plan.indexes]


def find_nonfinite(files: Iterable[ShardFile]) -> tuple[str, ...]:
    """Return the tensors with NaN or infinity, by name."""
    return tuple(sorted(name for file in files for name in file.nonfinite))


def check_shards(plan: MergePlan, shards: Sequence[ShardFile], journal: Journal) -> None:
    """Make sure that the shards of an output are what was written; call it before anything else is written there.

    Raises:
        OutputError: a shard is not there, or is another one.
    """
    stores, out = journal.stores, journal.out
    storage = stores.at(out)
    by_name = {shard.file: shard for shard in shards}
    for task in plan.tasks:
        made = by_name[task.file]
        try:
            found = storage.stat(f"{out}/{task.file}")
        except FileNotFoundError:
            raise OutputError(f"{out}/{task.file} is gone; run again when nobody else writes there") from None
        is_same = found.nbytes == made.nbytes
        if is_same and found.etag != made.etag:  # of two workers that made it, the slower one may have been here last
            is_same = hash_file(stores, found, lambda progress: None) == made.sha256
        if not is_same:
            raise OutputError(
                f"{out}/{task.file} is no longer what was written: {found.nbytes:,} bytes, etag {found.etag};"
                f" {made.nbytes:,} bytes, etag {made.etag} are expected; run again when nobody else writes there"
            )


def copy_side_files(plan: MergePlan, journals: Sequence[Journal]) -> list[dict[str, OutputFile]]:
    """Copy the files that outputs take from inputs, each to all of its outputs from one reading; return them by name.

    Args:
        plan: what was to be done.
        journals: of the output directories, in the plan's order.

    Raises:
        FetchError: a file could not be read, or has changed.
        OutputError: one could not be written.
    """
    takers: dict[Copied, list[int]] = {}
    for position, output in enumerate(plan.outputs):
        for side_file in output.side_files:
            if isinstance(side_file, Copied):
                takers.setdefault(side_file, []).append(position)
    copied: list[dict[str, OutputFile]] = [{} for _ in journals]
    for file, positions in takers.items():
        made = _copy(file, [journals[position] for position in positions])
        for position in positions:
            copied[position][file.name] = made
    return copied


def stitch(
    plan: MergePlan,
    output: PlannedOutput,
    shards: Sequence[ShardFile],
    journal: Journal,
    copied: Mapping[str, OutputFile],
) -> None:
    """Complete an output directory.

    The order matters: the donor's files, the card and the manifest first, then config.json, and last of all the index,
    without which nothing loads. (A model of one shard, or an adapter, has no index; there its config is the last. Of a
    pipeline it is model_index.json, after those of the components.) The manifest, which tells any two plans apart, and
    the last one must not be there already: of two runs that write to one place, only one can finish.

    Args:
        plan: what was to be done.
        output: the model of the plan that is made here.
        shards: its files, one for each task.
        journal: of the output directory.
        copied: the files there that were copied from inputs.

    Raises:
        OutputError: a file could not be written, or another run has finished here.
    """
    from raymerge.pipeline.output.figures import dump_figures, make_figures, summarise  # pyarrow: slow to import

    out = journal.out
    files = {shard.file: OutputFile(shard.nbytes, shard.sha256) for shard in shards} | dict(copied)
    contents = {_OWN_CONFIG: redact(output.config_text).encode(), _CARD: redact(make_card(plan, output)).encode()}
    last = {network.config: output.read(network.config).encode() for network in plan.networks}
    last |= {name: make_index(plan, network).encode() for name, network in plan.indexes.items()}
    if plan.is_pipeline:
        last[PIPELINE] = output.read(PIPELINE).encode()
    for side_file in output.side_files:
        if isinstance(side_file, Written) and side_file.name not in last:
            contents[side_file.name] = side_file.text.encode()
    figures = make_figures(plan, shards)
    contents[FIGURES] = dump_figures(figures)
    for name, content in (contents | last).items():
        files[name] = OutputFile(len(content), hashlib.sha256(content).hexdigest())
    nonfinite = find_nonfinite(shards)
    contents[MANIFEST] = make_manifest(plan, output, nonfinite, summarise(figures), files).dump().encode()
    final = next(reversed(last))
    for name, content in (contents | last).items():
        if name == final:
            journal.check_held()
        try:
            _write([content], name, len(content), journal, exclusive=name in (MANIFEST, final))
        except FileExistsError:
            if not _is_ours(name, content, output, journal):
                raise OutputError(
                    f"{out}/{name}: another run has finished a different model here meanwhile;"
                    " choose another directory, or run again with --overwrite when nobody else writes there"
                ) from None
            _write([content], name, len(content), journal)
    title = f"{plan.method} of {', '.join(map(str, plan.models))}, made with raymerge {__version__}"
    journal.stores.at(out).publish(out, redact(title), last=[MANIFEST, *last])


def make_index(plan: MergePlan, network: Network) -> str:
    """Return the index of a network's shards, such as `model.safetensors.index.json`."""
    prefix = network.prefix
    merges = [(merge, task) for task in plan.tasks if task.file.startswith(prefix) for merge in task.merges]
    metadata = {"total_size": sum(merge.nbytes for merge, _ in merges), "raymerge_version": __version__}
    files = {merge.name.removeprefix(prefix): task.file.removeprefix(prefix) for merge, task in merges}
    weight_map = dict(sorted(files.items()))
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, ensure_ascii=False) + "\n"


def make_manifest(
    plan: MergePlan,
    output: PlannedOutput,
    nonfinite: Sequence[str],
    figures: Mapping[str, Mapping[str, float]],
    files: Mapping[str, OutputFile],
) -> Manifest:
    """Return where an output comes from, and the checksum of every file.

    Args:
        plan: what was done.
        output: the model of the plan.
        nonfinite: its tensors with NaN or infinity.
        figures: summary of what is known of its tensors.
        files: every other file of the output, by name.
    """
    sources = (source for task in plan.tasks for merge in task.merges for source in merge.sources)
    origins = {(tensor.model, tensor.file) for source in sources for tensor in source.origins}
    urls = {str(item.model): item.url for item in reversed(plan.directories)}
    inputs = sorted((model, _name_file(file.url, urls[model]), file.nbytes) for model, file in origins)
    return Manifest(
        raymerge=__version__,
        torch=version("torch"),
        python=platform.python_version(),
        fingerprint=output.fingerprint,
        seed=output.seed,
        method=plan.method,
        config=output.config_text,
        models=[{"model": str(item.model), "revision": revision_of(item.url)} for item in plan.directories],
        inputs=[{"model": model, "file": name, "nbytes": nbytes} for model, name, nbytes in inputs],
        warnings=output.warnings,
        dropped=plan.dropped,
        nonfinite=nonfinite,
        figures=figures,
        files=dict(sorted(files.items())),
    )


def _name_file(url: str, place: str) -> str:
    """Return a file's name in the directory of its model, or of a file that is all there is."""
    return url.rpartition("/")[2] if url == place else url.removeprefix(f"{place}/")


def _is_ours(name: str, content: bytes, output: PlannedOutput, journal: Journal) -> bool:
    """Tell whether a file that is there already was written by an earlier try at the same plan."""
    if name != MANIFEST:
        return journal.stores.at(journal.out).read(f"{journal.out}/{name}", MAX_MANIFEST_NBYTES) == content
    try:
        return read_manifest(journal.stores, journal.out).fingerprint == output.fingerprint
    except ValueError:
        return False


def _copy(file: Copied, journals: Sequence[Journal]) -> OutputFile:
    digest = hashlib.sha256()
    writers: list[Writer] = []
    try:
        writers += (journal.open_file(file.name, file.nbytes) for journal in journals)
        for piece in journals[0].stores.read_pieces(file.source):
            digest.update(piece)
            for writer in writers:
                writer.write(piece)
    except BaseException:
        for writer in writers:
            writer.abort()
        raise
    for position, writer in enumerate(writers):
        try:
            writer.commit()
        except BaseException:
            for other in writers[position + 1 :]:
                other.abort()
            raise
    return OutputFile(file.nbytes, digest.hexdigest())


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
