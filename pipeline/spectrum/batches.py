"""Batches of a sweep: the points that are made of one reading of the inputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

from raymerge import RaymergeError
from raymerge.pipeline.config.merge_config import MergeConfig, ModulePart
from raymerge.pipeline.errors import MemoryLimitError
from raymerge.pipeline.plan.types import MergePlan
from raymerge.pipeline.plan.variants import VariantsDifferError, can_join
from raymerge.pipeline.spectrum.points import SweepPoint, explain

_MOST_AT_ONCE = 32
"""Most models of one batch: each has files, threads and buffers of its own in every worker."""

MakePlan = Callable[[Sequence[SweepPoint]], MergePlan]


@dataclass(frozen=True, slots=True)
class Batch:
    """Points that are made at once."""

    points: tuple[SweepPoint, ...]
    plan: MergePlan
    """With an output for each point."""

    @property
    def read_nbytes(self) -> int:
        """Bytes that are read for all of them together, rereads included."""
        return sum(task.read_nbytes + task.reread_nbytes for task in self.plan.tasks)

    @property
    def write_nbytes(self) -> int:
        """Bytes of shards that are written."""
        return sum(task.nbytes for task in self.plan.tasks)


def make_batches(points: Sequence[SweepPoint], make: MakePlan, num_workers: int) -> list[Batch]:
    """Plan all points, as many together as differ in parameters alone and have room in the memory.

    Args:
        points: in the order in which they are made.
        make: plans some points of one kind together.
        num_workers: that the user wants.

    Raises:
        RaymergeError: points cannot be planned; it names them.
    """
    kinds: dict[Hashable, list[SweepPoint]] = {}
    for point in points:
        kinds.setdefault(_find_kind(point.config), []).append(point)
    batches: list[Batch] = []
    problems: list[tuple[SweepPoint, RaymergeError]] = []
    for group in kinds.values():
        try:
            batches += _plan_group(group, make, num_workers)
        except RaymergeError as error:
            found = _find_problems(group, make)
            if not found:
                raise type(error)(f"{group[0].name} to {group[-1].name}: {error}") from error
            problems += found
    if problems:
        texts = [f"{point.name}: {error}" for point, error in problems]
        raise type(problems[0][1])(explain(texts, len(points)))
    return batches


def _find_kind(config: MergeConfig) -> Hashable:
    """Return what points of one batch have in common, as far as configs tell."""
    bodies: tuple[MergeConfig | ModulePart, ...] = (config, *config.modules)
    return repr(
        (
            config.op.name,
            config.base_model,
            config.copy_rest_from,
            [(body.name, _list_models(body)) for body in bodies],
            sorted(map(str, config.statistics.items())),
            config.vocabulary,
            (config.dtype, config.out_dtype, config.keep_float32, config.integers),
            config.mixture,
            config.adapter,
            [replace(step, text="") for step in config.steps],
        )
    )


def _list_models(body: MergeConfig | ModulePart) -> Hashable:
    """Return the models of a config, or of one of its modules, and the layers of each slice."""
    slices = [
        (part.base_model, [(source.model, source.layer_range) for source in part.sources]) for part in body.slices
    ]
    return repr(([entry.model for entry in body.models], slices, isinstance(body, ModulePart) and body.is_copied))


def _plan_group(group: Sequence[SweepPoint], make: MakePlan, num_workers: int) -> list[Batch]:
    """Plan points that should fit together."""
    if len(group) > _MOST_AT_ONCE:
        return [batch for part in _cut(group, _MOST_AT_ONCE) for batch in _plan_group(part, make, num_workers)]
    try:
        whole = Batch(tuple(group), make(group))
    except VariantsDifferError:
        return [batch for part in _sort_out(group, make) for batch in _plan_group(part, make, num_workers)]
    except MemoryLimitError:
        if len(group) == 1:
            raise
    else:
        if len(group) == 1 or not _is_short_of_memory(whole.plan, num_workers):
            return [whole]
    return _choose(group, make)


def _is_short_of_memory(plan: MergePlan, num_workers: int) -> bool:
    """Tell whether fewer outputs at a time might go faster."""
    return plan.num_workers < min(num_workers, len(plan.tasks)) or any(task.spared_nbytes for task in plan.tasks)


def _choose(group: Sequence[SweepPoint], make: MakePlan) -> list[Batch]:
    """Return batches of the size with which the least is read and written by each worker."""
    best: tuple[float, int] | None = None
    size = len(group)
    while size:
        try:
            batch = Batch(tuple(group[:size]), make(group[:size]))
        except MemoryLimitError:
            if size == 1:
                raise
        else:
            cost = (batch.read_nbytes + batch.write_nbytes) / size / batch.plan.num_workers
            if best is None or cost < best[0]:
                best = cost, size
        size //= 2
    assert best is not None
    return [Batch(tuple(part), make(part)) for part in _cut(group, best[1])]


def _cut(group: Sequence[SweepPoint], most: int) -> list[Sequence[SweepPoint]]:
    """Return parts of about one size, of `most` points at most."""
    num_parts = -(-len(group) // most)
    bounds = [len(group) * k // num_parts for k in range(num_parts + 1)]
    return [group[start:stop] for start, stop in itertools.pairwise(bounds)]


def _sort_out(group: Sequence[SweepPoint], make: MakePlan) -> list[list[SweepPoint]]:
    """Return the points that make each tensor in one way, together."""
    parts: list[tuple[MergePlan, list[SweepPoint]]] = []
    for point in group:
        plan = make([point])
        for first, part in parts:
            if can_join(first, plan):
                part.append(point)
                break
        else:
            parts.append((plan, [point]))
    return [part for _, part in parts]


def _find_problems(group: Sequence[SweepPoint], make: MakePlan) -> list[tuple[SweepPoint, RaymergeError]]:
    found = []
    for point in group:
        try:
            make([point])
        except RaymergeError as error:
            found.append((point, error))
    return found
