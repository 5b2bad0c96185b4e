"""One event of each kind."""

from __future__ import annotations

from raymerge.pipeline.plan.results import HostReport, MergeReport, ShardFile, ShardResult
from raymerge.pipeline.progress.events import (
    Event,
    Held,
    MergeFailed,
    Planned,
    Progressed,
    Resumed,
    Retried,
    SweepDone,
    SweepPlanned,
    Warned,
)

SHARD = ShardResult(
    file="model-00001-of-00002.safetensors",
    nbytes=120,
    files=(ShardFile("model-00001-of-00002.safetensors", 120, "ab", "cd", ("norm.weight",)),),
    read_nbytes=300,
    seconds=2,
    peak_rss=2**29,
    peak_measured_mem=2**28,
    host="10.0.0.5",
    faults=(("s3://bucket: GET: 503 SlowDown", 2),),
)
REPORT = MergeReport(
    out="s3://bucket/merged",
    manifest="s3://bucket/merged/raymerge_manifest.json",
    num_tensors=3,
    num_shards=2,
    num_resumed=0,
    was_complete=False,
    read_nbytes=600,
    written_nbytes=240,
    seconds=3.5,
    work_seconds=2.5,
    slowest=SHARD,
    hosts=(HostReport("10.0.0.5", 1, 300, 120), HostReport("10.0.0.6", 1, 300, 120)),
    peak_rss=2**29,
    peak_measured_mem=2**28,
    projected_mem=2**28,
    over_nbytes=0,
    faults=(("ray: shard: its worker died", 1),),
    warnings=("doubtful",),
    nonfinite=("norm.weight",),
)
EVENTS: dict[str, Event] = {
    "planned": Planned("ties", ("a", "b"), 3, 2, 600, 240, "f00", "ties of 2 models\n  tensors  3"),
    "waiting": Held("another run is writing"),
    "resumed": Resumed(1, 120),
    "progress": Progressed(1, 2, 300, 600, 120, 240, 1e9, 4e8, None, 1),
    "shard": SHARD,
    "retry": Retried("ray: shard: its worker died", 1),
    "warning": Warned("ä\u2028\nb"),
    "done": REPORT,
    "sweep": SweepPlanned(9, 8, 2, 1200, 960, "sweep of t: 9 points"),
    "swept": SweepDone("s3://bucket/spectrum", "s3://bucket/spectrum/spectrum.json", 9, 8, 7, 3.5),
    "error": MergeFailed("ConfigError", "models: nothing is given", 2),
}
