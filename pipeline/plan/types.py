"""The nouns of a merge: what a plan is made of, and what comes back. Frozen, picklable, without handles or tensors."""

from __future__ import annotations

from dataclasses import dataclass

from raymerge.ops.registry import Value
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.checkpoint.source import StoredTensor
from raymerge.pipeline.messages import counted
from raymerge.pipeline.redact import redact
from raymerge.pipeline.sizes import format_nbytes, format_seconds
from raymerge.pipeline.stores.files import StoredFile

ParameterValue = Value | tuple[Value, ...]
"""A shared parameter's value, or one value for each model."""


@dataclass(frozen=True, slots=True)
class TensorMerge:
    """One output tensor and how it comes about."""

    name: str
    shape: tuple[int, ...]
    out_dtype: str
    """As in a safetensors header."""
    op: str
    """A registered op, or `copy`: the sources must be equal, and the first one's bytes are written."""
    parameters: tuple[tuple[str, ParameterValue], ...]
    """Every parameter of the op, by name; a per-model parameter has one value for each source that it belongs to."""
    sources: tuple[StoredTensor, ...]
    """In config order; where the op requires a base, that comes first."""
    num_elements: int
    nbytes: int
    """Of the output."""

    def __repr__(self) -> str:
        what = f"{self.op} of {counted(len(self.sources), 'tensor')}"
        return f"TensorMerge({self.name}: {what}, {self.out_dtype} {list(self.shape)})"


@dataclass(frozen=True, slots=True)
class Gpus:
    """What a machine offers."""

    num_gpus: int
    allowed_mem: int
    """Of each, for all workers that share it, in bytes."""

    def num_sharing(self, num_workers: int) -> int:
        """Return how many of the machine's workers share a GPU, at most.

        >>> Gpus(2, 2**30).num_sharing(5)
        3
        """
        return -(-num_workers // self.num_gpus)


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One output file; all that a worker needs to know."""

    file: str
    """Its final name, relative to the output directory."""
    header: bytes
    """The file's first bytes: the length, and the JSON padded to a multiple of 8."""
    merges: tuple[TensorMerge, ...]
    """In the order in which they are written."""
    nbytes: int
    """Of the finished file, header included."""
    read_nbytes: int
    """Bytes read once for each tensor; see `reread_nbytes`."""
    reread_nbytes: int
    """Bytes read again because a tensor does not fit in memory between its passes."""
    buffer_nbytes: int
    """Size of one input buffer."""
    num_buffers: int
    """Input buffers: with 2, the next is filled while one is merged."""
    projected_mem: int
    """Peak memory for tensors and scratch, in bytes."""
    projected_gpu_mem: int
    """Peak memory on a GPU, in bytes; 0 where it is merged on the CPU."""
    seed: int

    def __repr__(self) -> str:
        return f"ShardTask({self.file}: {counted(len(self.merges), 'tensor')}, {format_nbytes(self.nbytes)})"


@dataclass(frozen=True, slots=True)
class InputModel:
    """A model that the config names, whether or not the output takes tensors from it, and where it lies."""

    model: ModelRef
    url: str
    """The directory that holds its files, at a revision that does not move where there are any."""
    names: tuple[str, ...]
    """Its files, relative to `url`."""

    def __repr__(self) -> str:
        return f"InputModel({self.model}: {counted(len(self.names), 'file')} in {redact(self.url)})"


@dataclass(frozen=True, slots=True)
class MergePlan:
    """Everything that will happen, decided."""

    tasks: tuple[ShardTask, ...]
    donor: ModelRef
    """Whose config.json, tokenizer and other files the output gets."""
    config_json: str
    """The output's config.json."""
    side_files: tuple[tuple[str, StoredFile], ...]
    """Files copied from the donor: name in the output, source."""
    inputs: tuple[InputModel, ...]
    """Base first, then in order of appearance."""
    method: str
    config_text: str
    """The YAML as given."""
    seed: int
    warnings: tuple[str, ...]
    advice: tuple[str, ...]
    """What would be faster on the machines at hand; nothing of it gets into the output."""
    dropped: tuple[str, ...]
    """Input tensors that are not in the output, grouped, each with the rule that says so."""
    num_threads: int
    """Workers that the memory allows at once."""
    allowed_mem: int
    """For tensors and scratch of all workers together, in bytes."""
    gpus: Gpus | None
    """What merges; None where the CPU does."""
    total_nbytes: int
    """Of the output's tensors."""
    fingerprint: str
    """Hash of everything that decides the output's bytes."""

    def __repr__(self) -> str:
        models, tensors = counted(len(self.inputs), "model"), counted(len(self.weight_map), "tensor")
        written = f"{format_nbytes(self.total_nbytes)} in {counted(len(self.tasks), 'shard')}"
        return f"MergePlan({self.method} of {models}, {tensors}, {written})"

    @property
    def models(self) -> tuple[ModelRef, ...]:
        """What the config names, in the order of `inputs`."""
        return tuple(item.model for item in self.inputs)

    @property
    def weight_map(self) -> dict[str, str]:
        """Which file each output tensor is in."""
        return {merge.name: task.file for task in self.tasks for merge in task.merges}


@dataclass(frozen=True, slots=True)
class ShardResult:
    """One finished output file; also its record in the journal."""

    file: str
    nbytes: int
    sha256: str
    etag: str
    """Of the file in the output's store when it was finished."""
    nonfinite: tuple[str, ...]
    """Tensors with NaN or infinity in the output."""
    read_nbytes: int
    """Bytes read in fact, rereads included."""
    seconds: float
    peak_rss: int
    """Of the whole process when the shard was done, in bytes."""
    peak_measured_mem: int
    """What of that is to be compared with `projected_mem`: neither code nor what the process had before, in bytes."""
    host: str
    """The machine that made it: its address on a cluster, else its name."""
    faults: tuple[tuple[str, int], ...]
    """What went wrong on the way and was got over, with how often."""

    def __repr__(self) -> str:
        return f"ShardResult({self.file}: {format_nbytes(self.nbytes)} in {format_seconds(self.seconds)})"


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One finished file that is not a shard."""

    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class HostReport:
    """What one machine did."""

    host: str
    num_shards: int
    read_nbytes: int
    written_nbytes: int


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge did."""

    out: str
    manifest: str
    """Where it is written down what the output was made of, and the checksum of every file."""
    num_tensors: int
    num_shards: int
    num_resumed: int
    """Shards that an earlier run had finished."""
    was_complete: bool
    """Whether an earlier run had finished everything, so that there was nothing to do."""
    read_nbytes: int
    written_nbytes: int
    seconds: float
    work_seconds: float
    """Those of them in which shards were made."""
    slowest: ShardResult | None
    """The shard that took longest; None where none was made."""
    hosts: tuple[HostReport, ...]
    """By name."""
    peak_rss: int
    """Of the largest worker process, in bytes."""
    peak_measured_mem: int
    """Of the process whose tensors, scratch and transfers took most, in bytes; to be compared with `projected_mem`."""
    projected_mem: int
    """What the plan says about that, in bytes."""
    faults: tuple[tuple[str, int], ...]
    """What went wrong with stores or workers and was got over, with how often."""
    warnings: tuple[str, ...]
    nonfinite: tuple[str, ...]
    """Tensors with NaN or infinity in the output."""

    def __repr__(self) -> str:
        contents = f"{counted(self.num_tensors, 'tensor')} in {counted(self.num_shards, 'shard')}"
        return f"MergeReport({redact(self.out)}: {contents}, {format_seconds(self.seconds)})"
