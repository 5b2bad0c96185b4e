"""On a real GPU: the bits of the CPU, in the memory that was planned. Skipped where there is none."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from raymerge import merge
from raymerge.ops.kernel import BLOCK_ELEMENTS, Site
from raymerge.ops.registry import Op, find_op
from tests.checkpoints import read_model, write_family
from tests.method_configs import METHODS, make_config
from tests.ops.engine import MemoryBlock, run_kernel
from tests.ops.kernel_contract import Case
from tests.ops.samples import CASES, Change, make_kernel, make_sources
from tests.watchers import Keep

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")


@pytest.mark.parametrize(("op", "change"), CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_op_gives_the_bits_of_the_cpu(op: Op, change: Change, dtype: torch.dtype) -> None:
    kernel = make_kernel(op, change)
    num_elements = 20 * BLOCK_ELEMENTS + 20_001
    sources = make_sources(op, num_elements, dtype=dtype)
    site = Site("model.layers.0.weight", (num_elements,), len(sources), 0)
    options = {"dtype": getattr(torch, kernel.compute_dtype), "device": "cuda"}
    scratch = [torch.full((num_elements,), torch.nan, **options) for _ in range(kernel.num_scratch(site))]
    block = MemoryBlock(0, num_elements, scratch, [source.cuda() for source in sources])
    run = kernel.start(site)
    for index in range(kernel.num_passes(site)):
        run.measure(index, block)
        run.end_pass(index)
    out = torch.full((num_elements,), torch.nan, **options)
    run.combine(block, out)
    torch.testing.assert_close(out.cpu(), run_kernel(kernel, sources), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(2000, 300), (300, 2000), (4, 200, 300)])
@pytest.mark.parametrize("op", ["tsv", "iso_c", "iso_cts", "star", "wudi", "knots"])
def test_whole_matrices_are_as_near_to_the_cpu_as_they_say(op: str, shape: tuple[int, ...]) -> None:
    kernel = make_kernel(find_op(op))
    sources = [x.reshape(shape) for x in make_sources(find_op(op), math.prod(shape))]
    case = Case(kernel, lambda n: sources, shapes=[shape])
    site = Site("model.layers.0.weight", shape, len(sources), 0)
    scratch = [torch.full((site.num_elements,), torch.nan, device="cuda") for _ in range(kernel.num_scratch(site))]
    block = MemoryBlock(0, site.num_elements, scratch, [source.reshape(-1).cuda() for source in sources])
    run = kernel.start(site)
    for index in range(kernel.num_passes(site)):
        run.measure(index, block)
        run.end_pass(index)
    out = torch.full((site.num_elements,), torch.nan, device="cuda")
    run.combine(block, out)
    assert case.is_same(out.cpu().reshape(shape), run_kernel(kernel, sources), sources)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    directory = tmp_path_factory.mktemp("family")
    return write_family(directory, 2, num_layers=3, dtype=torch.bfloat16, vocab=30_001, hidden=512)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("memory", ["64MiB", "4GiB"])
@pytest.mark.parametrize("method", METHODS)
def test_the_same_files(method: str, memory: str, workers: int, family: tuple[Path, ...], tmp_path: Path) -> None:
    config = make_config(method, family)
    merge(config, tmp_path / "cpu", seed=3, shard_size="20MB")
    merge(config, tmp_path / "gpu", seed=3, shard_size="20MB", memory=memory, workers=workers, gpu_memory="8GiB")
    assert read_model(tmp_path / "gpu") == read_model(tmp_path / "cpu")


@pytest.mark.parametrize("method", METHODS)
def test_memory_on_the_gpu_is_as_projected(method: str, family: tuple[Path, ...], tmp_path: Path) -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    keep = Keep()
    merge(make_config(method, family), tmp_path / "out", workers=1, gpu_memory="8GiB", on_event=keep)
    projected = max(task.projected_gpu_mem for task in keep.plan.tasks)
    assert torch.cuda.max_memory_reserved() <= projected + 64 * 2**20
