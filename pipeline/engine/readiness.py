"""Readiness of compiled loops: which tensors they merge here, and what is imported and compiled before."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import replace
from functools import partial

from raymerge.cluster.host import count_cores
from raymerge.ops.decoders.decoder import Plain
from raymerge.ops.decoders.intermediate import has_aligned_grids
from raymerge.ops.kernel import Kernel, Site
from raymerge.ops.lazy import np
from raymerge.ops.loops.ahead import Compiling, compile_ahead
from raymerge.ops.loops.compiler import Loop, trace_loops
from raymerge.ops.stored import LOOP_DTYPES, STRIP, Slot, Stored
from raymerge.pipeline.checkpoint.dtypes import DTYPES
from raymerge.pipeline.checkpoint.views.gathered_rows import GatheredRows
from raymerge.pipeline.engine import digests
from raymerge.pipeline.engine.loop_intermediate import find_loop_dtype
from raymerge.pipeline.engine.threads import run_in_turn
from raymerge.pipeline.plan.sources.merged import MergedTensor, list_sources
from raymerge.pipeline.plan.types import TensorMerge
from raymerge.pipeline.stores.retry import one_line

LOOPS = tuple(
    f"raymerge.ops.loops.{name}"
    for name in (
        "delta_loops",
        "digest_loops",
        "low_rank_loops",
        "rank_loops",
        "rule_loops",
        "sum_loops",
        "value_loops",
    )
)
_TORCH_MERGER = "raymerge.pipeline.engine.torch_merger"

_TRIED: dict[Hashable, str] = {}
"""Why loops do not work in this process, or nothing; kernels that measure the same share theirs."""


def takes_loops(merge: TensorMerge) -> bool:
    """Return whether compiled loops merge a tensor: there are some for its kernels and dtypes, and they work here."""
    return _has_loops(merge) and not any(_try_loops(merge))


def prepare(merges: Iterable[TensorMerge]) -> str:
    """Import and compile what merging these on a CPU takes, and return why torch does what loops could do; or nothing.

    Processes that are forked from this one afterwards have it, too.
    """
    reason = ""
    needs_torch = False
    merges = list(merges)
    if any(len(merge.variants) > 1 for merge in merges):
        digests.can_share()
    for merge in merges:
        if not _has_loops(merge):
            needs_torch = True
        elif why := next(filter(None, _try_loops(merge)), ""):
            reason, needs_torch = why, True
    if needs_torch:
        importlib.import_module(_TORCH_MERGER)
    return reason and f"torch merges, several times slower than compiled loops would: {reason}"


def start_compiling(kernels: Iterable[tuple[Kernel, int]], *, has_variants: bool) -> Compiling | None:
    """Begin to compile the loops that will be called, but for those in the cache; to be closed.

    Args:
        kernels: each with the number of its sources.
        has_variants: whether files of several models will be written side by side.
    """
    digesting = digests.list_loops() if has_variants else []
    return compile_ahead([*list_loops(kernels), *digesting], count_cores())


def list_loops(kernels: Iterable[tuple[Kernel, int]]) -> Collection[Loop]:
    """Return the loops that kernels with so many sources call, and that are not loaded, by having Python run them."""
    with trace_loops() as called, np.errstate(all="ignore"):
        for kernel, num_sources in kernels:
            if kernel.loop_dtypes == LOOP_DTYPES:
                # Python checks indexes that compiled loops never use; what is called before is known all the same
                _explain_failure(partial(_try_kernels, [kernel], Site("", (2,), num_sources, 0)))
    return dict.fromkeys(called)


def _has_loops(merge: TensorMerge) -> bool:
    dtypes = {DTYPES[merge.written_dtype].torch_name}
    grid = merge.variants[0].kernel.grid(merge.site(merge.variants[0]))
    any_gathered = any(isinstance(source, GatheredRows) for source in list_sources(merge))
    for source in merge.sources:
        if isinstance(source, GatheredRows) and source.plain_dtypes:
            dtypes |= source.plain_dtypes
            continue
        if isinstance(source, MergedTensor):
            is_known = not any_gathered and has_aligned_grids(source.decoder, grid) and _has_loops(source.merge)
        else:
            is_known = isinstance(source.decoder, Plain) or source.decoder.has_loops
        if not is_known:
            return False
        dtypes.add(find_loop_dtype(source.decoder))
    return all(dtypes <= {*variant.kernel.loop_dtypes} for variant in merge.variants)


def _try_loops(merge: TensorMerge) -> Iterable[str]:
    """Yield why loops of sources and variants, and of merges before them, do not work here; nothing where they do."""
    for source in merge.sources:
        if isinstance(source, MergedTensor):
            yield from _try_loops(source.merge)
        elif not isinstance(source.decoder, Plain):
            key: Hashable = type(source.decoder)
            if key not in _TRIED:
                _TRIED[key] = _explain_failure(source.decoder.compile_loops)
            yield _TRIED[key]
    kernels: dict[Hashable, Kernel] = {}
    for variant in merge.variants:
        if variant.kernel.loop_dtypes == LOOP_DTYPES:
            kernels.setdefault(variant.kernel.measuring(merge.site(variant)), variant.kernel)
    tried: Iterable[Hashable] = [*kernels, tuple(kernels)] if len(kernels) > 1 else kernels
    for key in tried:
        if key not in _TRIED:
            together = [kernels[key]] if key in kernels else list(kernels.values())
            site = replace(merge.site(merge.variants[0]), shape=(2,))
            _TRIED[key] = _explain_failure(partial(_try_kernels, together, site))
        yield _TRIED[key]


def _explain_failure(function: Callable[[], None]) -> str:
    """Return the error that a function raises, or nothing."""
    try:
        function()
    except Exception as error:  # whatever a compiler, its cache and its libraries may raise
        return f"{type(error).__name__}: {one_line(error)}"
    return ""


def _try_kernels(kernels: Sequence[Kernel], site: Site) -> None:
    """Merge two elements with the same delta, for an output of each kernel, as several threads would."""
    values = np.ones(2 * site.num_sources, np.float32)
    values[:2] = 0
    dtypes = ("float32",) * site.num_sources
    stored = Stored(0, 2, values.data.cast("B"), tuple(range(0, values.nbytes, 8)), dtypes)
    runs = [kernel.start(site) for kernel in kernels]
    for index in range(max(kernel.num_passes(site) for kernel in kernels)):
        measuring = [run for run, kernel in zip(runs, kernels, strict=True) if index < kernel.num_passes(site)]
        measuring[0].measure_outputs(index, measuring, stored, run_in_turn)
        for run in measuring:
            run.end_pass(index)
    forks = [fork for run in runs for fork in run.fork([stored], run_in_turn)]
    slots = [Slot(memoryview(bytearray(8)), "float32", np.zeros(STRIP, np.float32)) for _ in forks]
    forks[0].combine_outputs(forks, stored, slots)
