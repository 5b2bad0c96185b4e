"""A merge in a fresh process that measures its own peak, against what its plan says."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.checkpoints import write_checkpoint

SLACK_NBYTES = 4 * 2**20
"""What no plan counts: code that is paged in for the first time, and the room between the chunks of the allocator."""

NUM_ELEMENTS = 2**23
"""Of each of two tensors: 16 MiB as stored, 32 MiB in the compute dtype; one copy too many of either is seen."""

# How many output buffers are in use at once depends on the disk: here all of them count, as if it were slow.
# The tiny merge runs first, so that the large one finds the op's code paged in and the threads' stacks touched.
SCRIPT = """
import json, sys
from pathlib import Path
from raymerge import merge
from raymerge.pipeline.engine.writer import ShardWriter

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))

class Keep:
    def __call__(self, event):
        self.plan = getattr(event, "plan", None) or self.plan

def begin(shard, writer, pool, digest):
    buffers = [pool.acquire(writer.buffer_nbytes) for _ in range(writer.num_buffers)]
    for buffer in buffers:
        for start in range(0, len(buffer), 4096):
            buffer[start] = 0
        pool.release(buffer)
    begin_writing(shard, writer, pool, digest)

begin_writing, ShardWriter.__init__ = ShardWriter.__init__, begin
tiny, large, out, memory = sys.argv[1:]
merge(Path(tiny), f"{out}/tiny", memory=memory, workers=1)
before = resident("VmRSS")
keep = Keep()
merge(Path(large), f"{out}/large", memory=memory, workers=1, shard_size="16MiB", on_event=keep)
peak = resident("VmHWM")  # ru_maxrss would begin with what the parent had when it started this process
tasks = keep.plan.tasks
print(json.dumps({
    "used": peak - before,
    "projected": keep.plan.num_workers * max(task.projected_mem for task in tasks),
    "allowed": keep.plan.allowed_mem,
    "num_workers": keep.plan.num_workers,
    "num_shards": len(tasks),
}))
"""


def write_models(directory: Path, num_elements: int, num_tensors: int = 2, shape: tuple[int, ...] = (-1,)) -> list[str]:
    """Write a base and two fine-tunes of so many tensors each, in one dimension or in another shape."""
    generator = torch.Generator().manual_seed(0)
    models = []
    for name in ("base", "a", "b"):
        drawn = (torch.rand(num_elements, generator=generator) for _ in range(num_tensors))
        tensors = {f"w{k}": values.to(torch.bfloat16).reshape(shape) for k, values in enumerate(drawn)}
        models.append(str(write_checkpoint(directory / name, tensors, {})))
    return models
