"""The options of a merge: one dataclass that the API takes, and that the command line's options are made of."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, TypedDict

from raymerge.cluster.host import count_cores
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.messages import flag
from raymerge.pipeline.sizes import parse_nbytes
from raymerge.pipeline.stores.settings import Library

Size = str | int
"""Bytes, or text such as `4GiB` or `5GB`."""

SPEED = "Memory and speed"
OUTPUT = "Output"
CLUSTER = "Cluster"


@dataclass(frozen=True)
class Help:
    """The command line's help for an option; the API's names are the same, with underscores."""

    text: str
    panel: str
    metavar: str | None = None
    default: str | None = None
    """Effective value where the value is None."""
    opposite: str | None = None
    """Name of the flag that turns off what is on by default."""
    former: str | None = None
    """Another name of the option, accepted as well: an earlier one, or that of another command."""
    short: str | None = None
    """One letter that stands for the option."""


StorageOption = Annotated[Library, Help("Library that serves s3://, gs://, az:// and http(s)://.", SPEED)]


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Options of a merge: memory, workers and place, and what becomes of an earlier output.

    Raises:
        ConfigError: a value is out of range, or two exclude each other.
    """

    memory: Annotated[Size, Help("Memory for tensors and scratch of all workers together.", SPEED, "SIZE")] = "4GiB"
    workers: Annotated[
        int | None, Help("Shards in work at once.", SPEED, "N", default="one for each core", former="threads")
    ] = None
    gpu_memory: Annotated[
        Size | None, Help("Merge on GPUs, with so much memory of each.", SPEED, "SIZE", default="merge on the CPU")
    ] = None
    storage: StorageOption = "auto"
    shard_size: Annotated[
        Size | None, Help("Largest output file, such as 5GB.", OUTPUT, "SIZE", default="by the output's size")
    ] = None
    seed: Annotated[int, Help("Seed of methods that draw random numbers.", OUTPUT, "N")] = 0
    ops: Annotated[
        str | None, Help("Python file that declares merge methods of your own.", OUTPUT, "FILE", default="none")
    ] = None
    strict: Annotated[bool, Help("Refuse whatever gives a warning otherwise, and NaN and infinity.", OUTPUT)] = False
    trust_headers: Annotated[
        bool, Help("Go by the weight files where an input's index is missing or disagrees with them.", OUTPUT)
    ] = False
    private: Annotated[bool, Help("How to make a Hub repository that is not there yet.", OUTPUT, opposite="public")] = (
        True
    )
    keep_intermediates: Annotated[
        str | None,
        Help("Write the outputs of documents that others use, too: each to DIR/NAME.", OUTPUT, "DIR", default="none"),
    ] = None
    wait: Annotated[bool, Help("Wait for another run that is writing to OUT to end.", OUTPUT)] = False
    recheck: Annotated[
        bool, Help("Read and hash again what an earlier run finished, instead of going by size and time.", OUTPUT)
    ] = False
    overwrite: Annotated[bool, Help("Replace a model that is in OUT.", OUTPUT)] = False
    ray: Annotated[bool, Help("Start Ray on this machine, and merge on it.", CLUSTER)] = False
    address: Annotated[
        str | None,
        Help("Merge on the Ray cluster whose head is there; `auto`: that of this machine.", CLUSTER, "HOST:PORT"),
    ] = None
    shared_filesystem: Annotated[bool, Help("Paths mean the same files on all machines of the cluster.", CLUSTER)] = (
        False
    )

    def __post_init__(self) -> None:
        for name in ("memory", "shard_size", "gpu_memory"):
            _parse(name, getattr(self, name))
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"--workers is {self.workers}; it must be 1 or more")
        if self.seed < 0:
            raise ConfigError(f"--seed is {self.seed}; it must be 0 or more")
        if self.storage not in ("auto", "fsspec"):
            raise ConfigError(f"--storage is {self.storage!r}; it must be 'auto' or 'fsspec'")
        if self.ray and self.address is not None:
            raise ConfigError(
                "both --ray, which starts Ray here, and --address, of a running cluster, are given; leave one"
            )
        if self.shared_filesystem and self.address is None:
            raise ConfigError("--shared-filesystem is about the machines of a cluster; give its --address too")

    @property
    def allowed_mem(self) -> int:
        """`memory` in bytes."""
        return _parse("memory", self.memory) or 0

    @property
    def shard_nbytes(self) -> int | None:
        """`shard_size` in bytes."""
        return _parse("shard_size", self.shard_size)

    @property
    def allowed_gpu_mem(self) -> int | None:
        """`gpu_memory` in bytes."""
        return _parse("gpu_memory", self.gpu_memory)

    @property
    def num_workers(self) -> int:
        """`workers`, or the cores that this process may use."""
        return self.workers or count_cores()


class MergeKeywords(TypedDict, total=False):
    """The fields of `MergeOptions` as keywords."""

    memory: Size
    workers: int | None
    gpu_memory: Size | None
    storage: Library
    shard_size: Size | None
    seed: int
    ops: str | None
    strict: bool
    trust_headers: bool
    private: bool
    keep_intermediates: str | None
    wait: bool
    recheck: bool
    overwrite: bool
    ray: bool
    address: str | None
    shared_filesystem: bool


def make_options(options: MergeOptions | None, keywords: Mapping[str, Any]) -> MergeOptions:
    """Return options with the fields changed that keywords name.

    Raises:
        TypeError: there is no such field.
        ConfigError: a value is out of range, or two exclude each other.
    """
    names = [field.name for field in fields(MergeOptions)]
    for name in keywords:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
            raise TypeError(f"{name!r} is not an option of a merge; {hint}")
    return replace(options or MergeOptions(), **keywords)


def _parse(name: str, size: Size | None) -> int | None:
    if isinstance(size, str):
        return parse_nbytes(size)
    if size is not None and size < 1:
        raise ConfigError(f"{flag(name)} is {size}; it must be 1 byte or more")
    return size
