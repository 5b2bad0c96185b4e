"""The nouns of a merge: what a plan is made of, and what comes back. Frozen, picklable, without handles or tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from hashlib import sha256

from raymerge.ops.kernel import Kernel, Site
from raymerge.ops.own import OwnOps
from raymerge.ops.registry import Op, Value
from raymerge.pipeline.checkpoint.dtypes import DTYPES
from raymerge.pipeline.checkpoint.files import ADAPTER_CONFIG
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.checkpoint.source import Source
from raymerge.pipeline.messages import counted
from raymerge.pipeline.plan.out_files import Network, SideFile, Written
from raymerge.pipeline.redact import redact
from raymerge.pipeline.sizes import format_nbytes

ParameterValue = Value | tuple[Value, ...]
"""A shared parameter's value, or one value for each model."""


Parameters = tuple[tuple[str, ParameterValue], ...]
"""Every parameter of an op, by name; a per-model parameter has one value for each source that it belongs to."""


@dataclass(frozen=True, slots=True)
class Variant:
    """The way in which one output of a plan has a tensor made."""

    parameters: Parameters
    kernel: Kernel
    """The kernel that the op returned for the parameters."""
    seed: int
    """Seed of the merge."""


@dataclass(frozen=True, slots=True)
class TensorMerge:
    """One tensor of every output, and how it comes about."""

    name: str
    shape: tuple[int, ...]
    out_dtype: str
    """As in a safetensors header."""
    written_dtype: str
    """The dtype that results are rounded to: `out_dtype`, or U8 where bytes are copied as they are."""
    op: str
    """A registered op; or `max`, `sum` or `copy` of integers, the last of sources that must be equal."""
    sources: tuple[Source, ...]
    """In config order; where the op requires a base, that comes first."""
    variants: tuple[Variant, ...]
    """One for each output; all have one grid."""
    num_statistics: int = 0
    """Number of the last sources that are statistics of the others."""
    has_whole_statistics: bool = False
    """Whether all elements of these are fetched with any of the others."""
    packed: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """Names and shapes of the tensors that the values are, one after the other, where they are several."""

    @property
    def num_elements(self) -> int:
        """Elements as the kernels see them; bytes where these are copied."""
        return math.prod(self.sources[0].shape)

    @property
    def entries(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Names and shapes in the file."""
        return self.packed or ((self.name, self.shape),)

    @property
    def nbytes(self) -> int:
        """Size of the tensor in one output, in bytes."""
        return self.num_elements * DTYPES[self.written_dtype].num_bits // 8

    @property
    def tensors(self) -> tuple[Source, ...]:
        """The sources without statistics: the models' own tensors."""
        return self.sources[: len(self.sources) - self.num_statistics]

    @property
    def statistics(self) -> tuple[Source, ...]:
        """The sources that are statistics of the others."""
        return self.sources[len(self.sources) - self.num_statistics :]

    @property
    def num_cut(self) -> int:
        """Number of the first sources that are fetched and merged in pieces of the same elements."""
        return len(self.sources) - self.num_statistics * self.has_whole_statistics

    @property
    def num_early_passes(self) -> int:
        """Measuring passes of sources that are merges themselves, before the kernels see any values."""
        return max((source.decoder.num_passes for source in self.sources), default=0)

    @property
    def num_passes(self) -> int:
        """Passes over the sources, read or kept, before they are combined."""
        kernels = (variant.kernel.num_passes(self.site(variant)) for variant in self.variants)
        return self.num_early_passes + max(kernels)

    def site(self, variant: Variant) -> Site:
        """Return the site of a variant's kernel."""
        return Site(self.name, self.sources[0].shape, len(self.sources), variant.seed, self.num_statistics)

    def __repr__(self) -> str:
        what = f"{self.op} of {counted(len(self.sources), 'tensor')}"
        return f"TensorMerge({self.name}: {what}, {self.out_dtype} {list(self.shape)})"


@dataclass(frozen=True, slots=True)
class Gpus:
    """The GPUs of one machine."""

    num_gpus: int
    allowed_mem: int
    """Memory of each for all workers that share it, in bytes."""
    is_in_one_process: bool = True
    """Whether workers that share a GPU are threads, with one CUDA context together, instead of processes."""

    def num_sharing(self, num_workers: int) -> int:
        """Return how many of the machine's workers share a GPU, at most.

        >>> Gpus(2, 2**30).num_sharing(5)
        3
        """
        return -(-num_workers // self.num_gpus)

    def share(self, num_workers: int, context_nbytes: int) -> int:
        """Return a worker's memory on its GPU besides CUDA's context, of which each process has one.

        >>> Gpus(2, 1000).share(8, 200), Gpus(2, 1000, is_in_one_process=False).share(8, 200)
        (200, 50)
        """
        sharing = self.num_sharing(num_workers)
        if self.is_in_one_process:
            return (self.allowed_mem - context_nbytes) // sharing
        return self.allowed_mem // sharing - context_nbytes


@dataclass(frozen=True, slots=True)
class ShardOutput:
    """One file that a task writes."""

    file: str
    """Its final name, relative to the output directory."""
    header: bytes = field(repr=False)
    """The file's first bytes: the length, and the JSON padded to a multiple of 8."""
    nbytes: int
    """Size of the finished file, header included."""


@dataclass(frozen=True, slots=True)
class ShardTask:
    """The same shard of every output; all that a worker needs to know."""

    own: OwnOps | None = field(repr=False)
    """The file that declares the method, where it is of the user's own; first, for unpickling it makes the module that
    kernels refer to."""
    outputs: tuple[ShardOutput, ...]
    """One for each output that it writes to; all of one name and layout."""
    positions: tuple[int, ...]
    """Numbers of the outputs in the plan: all of them, unless an earlier run has made the shard of some."""
    merges: tuple[TensorMerge, ...]
    """In the order in which they are written."""
    read_nbytes: int
    """Bytes read once for each tensor, and those between scattered rows in stores; see `reread_nbytes`."""
    reread_nbytes: int
    """Bytes read again: of tensors that are not kept between their passes, and where windows of documents overlap."""
    spared_nbytes: int
    """Part of these that would be read once with more memory: not those that the page cache keeps anyway."""
    buffer_nbytes: int
    """Size of one input buffer; on a GPU, where there is one."""
    fetch_nbytes: int
    """Bytes fetched at once, where a tensor need not be kept in the buffer."""
    piece_nbytes: int
    """Bytes of a tensor's sources that a GPU merges at once; 0 where the CPU merges."""
    staging_nbytes: int
    """Size of a buffer of the host that sources go through on their way to a GPU."""
    num_buffers: int
    """Input buffers: with 2, the next is filled while one is merged."""
    keeps_buffers: bool
    """Whether they have the size of most tasks' buffers, so that the worker keeps them for its next task."""
    num_threads: int
    """Threads that a CPU merges it with: more than one where it is large beside what each worker has to do, or where
    the memory is for fewer workers than there might be."""
    num_shares: int
    """Workers' shares of the memory that it takes: several where it reads a large tensor once."""
    projected_mem: int
    """Peak memory for tensors and scratch, in bytes."""
    projected_gpu_mem: int
    """Peak memory on a GPU besides CUDA's context, in bytes; 0 where it is merged on the CPU."""

    @property
    def file(self) -> str:
        """The shard's name, the same in every output."""
        return self.outputs[0].file

    @property
    def nbytes(self) -> int:
        """Size of all files together, in bytes."""
        return sum(output.nbytes for output in self.outputs)

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
class InputAdapter:
    """A LoRA adapter that is applied to a model, or to several."""

    files: InputModel
    """The adapter's directory and files."""
    effects: tuple[str, ...]
    """A line for each of its models: how many tensors it changes, by which rank."""


@dataclass(frozen=True, slots=True)
class PlannedOutput:
    """One model that the plan makes."""

    config_text: str = field(repr=False)
    """The YAML as given."""
    seed: int
    side_files: tuple[SideFile, ...] = field(repr=False)
    """config.json of each network, and what goes along with the donor's weights."""
    warnings: tuple[str, ...]
    fingerprint: str
    """Hash of everything that decides the output's bytes."""

    def read(self, name: str) -> str:
        """Return the text of a file that the plan makes."""
        return next(file.text for file in self.side_files if isinstance(file, Written) and file.name == name)


@dataclass(frozen=True, slots=True)
class MergePlan:
    """Everything that will happen, decided."""

    own: OwnOps | None = field(repr=False)
    """See `ShardTask`."""
    tasks: tuple[ShardTask, ...]
    outputs: tuple[PlannedOutput, ...]
    """The models that are made of one reading of the inputs: one, unless variants are planned together."""
    donor: ModelRef
    """Whose config.json, tokenizer and other files the outputs get."""
    inputs: tuple[InputModel, ...]
    """Base first, then in order of appearance."""
    statistics: tuple[InputModel, ...]
    """The models' statistics, for a method that needs some."""
    adapters: tuple[InputAdapter, ...]
    """Each adapter once, in order of appearance."""
    op: Op
    """The merge method."""
    chosen: tuple[str, ...]
    """The models that a pattern has found, with their weights; none where they are listed."""
    notes: tuple[str, ...]
    """Readings of configs that leave something open, and what the method does with some tensors."""
    advice: tuple[str, ...]
    """Faster options on the machines at hand; nothing of it gets into the output."""
    dropped: tuple[str, ...]
    """Input tensors that are not in the output, grouped, each with the rule that says so."""
    num_workers: int
    """Workers that the memory allows at once."""
    allowed_mem: int
    """For tensors and scratch of all workers together, in bytes."""
    gpus: Gpus | None
    """The GPUs that merge; None where the CPU does."""
    total_nbytes: int
    """Size of the tensors of one output, in bytes."""
    vocabulary: tuple[str, ...] = ()
    """The output's tokens, and how many rows come from whom; empty where the config asks for no tokenizer."""
    networks: tuple[Network, ...] = (Network(),)
    """The output's networks: those of a diffusers pipeline, or one."""

    def __repr__(self) -> str:
        models, tensors = counted(len(self.inputs), "model"), counted(len(self.weight_map), "tensor")
        written = f"{format_nbytes(self.total_nbytes)} in {counted(len(self.tasks), 'shard')}"
        return f"MergePlan({self.method} of {models}, {tensors}, {written})"

    @property
    def method(self) -> str:
        """The merge method's name."""
        return self.op.name

    @property
    def models(self) -> tuple[ModelRef, ...]:
        """The models of the config, in the order of `inputs`."""
        return tuple(item.model for item in self.inputs)

    @property
    def directories(self) -> tuple[InputModel, ...]:
        """Everything that is read from: models, then adapters and statistics."""
        return (*self.inputs, *(adapter.files for adapter in self.adapters), *self.statistics)

    @property
    def is_pipeline(self) -> bool:
        """Whether the output is a diffusers pipeline."""
        return any(network.prefix for network in self.networks)

    @property
    def is_adapter(self) -> bool:
        """Whether the output is an adapter, and no model."""
        return self.networks[0].config_name == ADAPTER_CONFIG

    @property
    def indexes(self) -> dict[str, Network]:
        """The indexes of the networks that are in several files, by name."""
        files = [task.file for task in self.tasks]
        return {
            network.index: network
            for network in self.networks
            if sum(file.startswith(network.prefix) for file in files) > 1
        }

    @property
    def weight_map(self) -> dict[str, str]:
        """File of each output tensor."""
        return {name: task.file for task in self.tasks for merge in task.merges for name, _ in merge.entries}

    @property
    def warnings(self) -> tuple[str, ...]:
        """The warnings of all outputs, each once."""
        return tuple(dict.fromkeys(warning for output in self.outputs for warning in output.warnings))

    @property
    def fingerprint(self) -> str:
        """The output's fingerprint, or a hash of those of several outputs."""
        fingerprints = [output.fingerprint for output in self.outputs]
        return fingerprints[0] if len(fingerprints) == 1 else sha256("".join(fingerprints).encode()).hexdigest()
