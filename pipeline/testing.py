"""Helpers to test merge methods of one's own: `from raymerge.testing import draw_models, merge_in_every_way`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymerge.ops.kernel import Block
from raymerge.pipeline.checkpoint.dtypes import DTYPES
from raymerge.pipeline.checkpoint.source import StoredTensor
from raymerge.pipeline.driver import merge, merge_variants, plan
from raymerge.pipeline.errors import MemoryLimitError
from raymerge.pipeline.options import MergeOptions

if TYPE_CHECKING:
    import torch

    from raymerge.pipeline.plan.types import TensorMerge

    Tensors = dict[str, torch.Tensor]

SHAPES = {"matrix": (901, 333), "experts": (3, 50, 70), "norm": (5,), "scalar": (), "empty": (0, 4)}
"""Shapes of tensors that kernels meet: the first has more than two blocks, and no round number of elements."""


def draw_models(directory: Path, num_models: int, shapes: Mapping[str, Sequence[int]] = SHAPES) -> list[str]:
    """Write models of normally distributed float32 values, each near the first, as fine-tunes are near their base.

    Args:
        directory: gets a directory for each model.
        num_models: how many, the base included.
        shapes: of their tensors, by name.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(tuple(shape), generator=generator) for name, shape in shapes.items()}
    models = [write_model(directory / "model0", base)]
    for k in range(1, num_models):
        tuned = {name: x + 0.1 * torch.randn(x.shape, generator=generator) for name, x in base.items()}
        models.append(write_model(directory / f"model{k}", tuned))
    return models


def write_model(directory: Path, tensors: Tensors) -> str:
    """Write a model of these tensors; return its directory as configs name it."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "test"}))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return str(directory)


def read_model(directory: str | Path) -> Tensors:
    """Return the tensors of a model, or of a safetensors file, by name."""
    from safetensors.torch import load_file

    path = Path(directory)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def merge_in_every_way(config: Mapping[str, Any], directory: Path, *, ops: str | Path | None = None) -> Tensors:
    """Merge with much memory and the least, by one process and by two, twice at once, and on a GPU if there is one.

    Where there is none, kernels get all blocks of a tensor at once on the CPU, as a GPU gets them.

    Args:
        config: of the merge, as in the YAML.
        directory: gets the outputs.
        ops: the file that declares the method; None where it is installed.

    Returns:
        The merged tensors, by name.

    Raises:
        AssertionError: two of them differ in a bit, or on a GPU by more than a kernel's `tolerance`: the method keeps
            something between blocks, changes what it reads, or depends on how a tensor is cut.
    """
    options = MergeOptions(workers=1, ops=None if ops is None else str(ops))
    outputs = {name: directory / name for name in ("plenty", "least", "processes", "first", "second")}
    merge(config, outputs["plenty"], options)
    merge(config, outputs["least"], options, memory=_find_least_memory(config, options))
    merge(config, outputs["processes"], options, workers=2, shard_size=1)
    merge_variants([config, config], [outputs["first"], outputs["second"]], options)
    if _has_gpu():
        outputs["gpu"] = directory / "gpu"
        merge(config, outputs["gpu"], options, gpu_memory="1GiB")
    expected = read_model(outputs["plenty"])
    merged = {name: read_model(output) for name, output in outputs.items()}
    tensors = [tensor for task in plan(config, options).tasks for tensor in task.merges]
    sources = [source for tensor in tensors for source in tensor.sources]
    if "gpu" not in outputs and all(isinstance(source, StoredTensor) and source.origins for source in sources):
        merged["all blocks at once"] = _merge_whole(tensors)
    for name, found in merged.items():
        assert found.keys() == expected.keys(), f"{name}: {sorted(found)}, not {sorted(expected)}"
        is_elsewhere = name in ("gpu", "all blocks at once")
        loose = {tensor.name: tensor.variants[0].kernel.tolerance if is_elsewhere else 0 for tensor in tensors}
        differing = [tensor for tensor, x in found.items() if not _is_same(x, expected[tensor], loose.get(tensor, 0))]
        assert not differing, f"{', '.join(differing)} of the merge {name!r} differ from those of 'plenty'"
    return expected


def _merge_whole(tensors: Iterable[TensorMerge]) -> Tensors:
    """Merge each tensor as one piece."""
    import torch

    found = {}
    for tensor in tensors:
        variant = tensor.variants[0]
        kernel, site = variant.kernel, tensor.site(variant)
        dtype = getattr(torch, kernel.compute_dtype)
        stored = [
            read_model(source.model)[source.name] for source in tensor.sources if isinstance(source, StoredTensor)
        ]
        block = _Piece([x.reshape(-1).to(dtype) for x in stored], kernel.num_scratch(site))
        run = kernel.start(site)
        out = torch.empty(block.stop, dtype=dtype)
        if block.stop:
            for index in range(kernel.num_passes(site)):
                run.measure(index, block)
                run.end_pass(index)
            run.combine(block, out)
        found[tensor.name] = out.reshape(tensor.shape).to(getattr(torch, DTYPES[tensor.out_dtype].torch_name))
    return found


class _Piece(Block):
    """All of a tensor's sources."""

    def __init__(self, sources: Sequence[torch.Tensor], num_scratch: int) -> None:
        self.start, self.stop = 0, sources[0].numel()
        self.scratch = [sources[0].new_full((self.stop,), float("nan")) for _ in range(num_scratch)]
        self._sources = sources

    def load(self, source: int, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(self._sources[source])


def _find_least_memory(config: Mapping[str, Any], options: MergeOptions) -> str:
    try:
        plan(config, options, memory=1)
    except MemoryLimitError as error:
        if found := re.search(r"--memory (\S+)", str(error)):
            return found[1]
        raise
    raise AssertionError("one byte of memory was enough")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _is_same(x: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Return whether values have the same bits or, with a tolerance, differ by no more than a share of their norm."""
    if not tolerance:
        return _read_bits(x) == _read_bits(expected)
    return bool((x.double() - expected.double()).norm() <= tolerance * expected.double().norm())


def _read_bits(x: torch.Tensor) -> bytes:
    """Return the values byte by byte: 0.0 is not -0.0."""
    import torch

    return x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
