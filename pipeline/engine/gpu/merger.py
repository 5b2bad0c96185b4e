"""Opens what merges a task on a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from raymerge.pipeline.engine.gpu.devices import take_gpu
from raymerge.pipeline.engine.gpu.rooms import Sizes
from raymerge.pipeline.engine.gpu.stage import GpuStage, open_gpu_stage
from raymerge.pipeline.engine.runs import Figures
from raymerge.pipeline.engine.tally import Tally
from raymerge.pipeline.engine.torch_merger import TorchMerger, explain_full_gpu, measure_scratch
from raymerge.pipeline.engine.writer import ShardWriter
from raymerge.pipeline.plan.memory.gpu import out_slot_nbytes
from raymerge.pipeline.plan.memory.projection import measure_demand
from raymerge.pipeline.plan.types import ShardTask


@contextmanager
def open_gpu_merger(
    task: ShardTask, shards: Sequence[ShardWriter], tallies: Sequence[Tally], figures: Sequence[Figures], device: str
) -> Iterator[tuple[GpuStage, TorchMerger]]:
    """Have a stage on a GPU, and what merges there, for a while.

    Args:
        task: planned for a GPU.
        shards: where results go, one for each output.
        tallies: of the shards.
        figures: of the shards.
        device: "cuda" for this thread's GPU; any other one behaves the same, for tests.

    Raises:
        MemoryLimitError: there is less memory on the GPU than the plan was allowed.
    """
    there = take_gpu() if device == "cuda" else torch.device(device)
    sizes = Sizes(
        room_nbytes=task.buffer_nbytes,
        num_rooms=task.num_buffers,
        staging_nbytes=task.staging_nbytes,
        scratch_nbytes=measure_scratch(task.merges, task.piece_nbytes),
        out_nbytes=max(out_slot_nbytes(measure_demand(merge), task.piece_nbytes) for merge in task.merges),
        num_outputs=len(shards),
    )
    with explain_full_gpu(task.file, task), open_gpu_stage(shards, tallies, there, sizes, task.piece_nbytes) as stage:
        yield stage, TorchMerger(task, stage, figures)
