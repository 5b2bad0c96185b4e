"""Merges on a GPU that is the CPU in disguise: the same files, and nothing happens before what it depends on."""

from __future__ import annotations

import multiprocessing
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils._python_dispatch import _get_current_dispatch_mode

from raymerge import merge, plan
from raymerge.cluster.runner import Report
from raymerge.ops.kernels.sparsifiers.random import PAGE_ELEMENTS
from raymerge.ops.registry import find_op
from raymerge.pipeline import execution, runners, workers
from raymerge.pipeline.engine import fetch
from raymerge.pipeline.engine import shard as execute
from raymerge.pipeline.engine.gpu import stage as gpu_stage
from raymerge.pipeline.errors import ConfigError, MemoryLimitError
from raymerge.pipeline.options import MergeOptions
from raymerge.pipeline.plan.memory import places
from raymerge.pipeline.plan.memory.projection import Transfer
from raymerge.pipeline.plan.results import ShardResult
from raymerge.pipeline.plan.types import ShardTask
from raymerge.pipeline.stores.open import Stores
from raymerge.testing import draw_models
from tests.checkpoints import Tensors, add_noise, read_model, read_tensors, write_checkpoint
from tests.commands import Cli
from tests.fake_gpu import DEVICE, FakeGpu, FakeMark, FakeQueue
from tests.method_configs import METHODS, make_config
from tests.statistics import write_statistics
from tests.watchers import Keep

LIMITS = ("large", "small")


def find_limits(limits: str, config: dict[str, Any]) -> tuple[str, str]:
    """Return much memory of the host and the GPU, or as little as works."""
    if limits == "large":
        return "1GiB", "4GiB"
    with pytest.raises(MemoryLimitError, match=r"--gpu-memory \w+$") as caught:
        plan(config, gpu_memory="1MiB")
    return "32MiB", str(caught.value).split()[-1]


def make_tensors() -> Tensors:
    """Return tensors of several blocks, of one, of none, of other dtypes, and one that is copied."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"a": 400_000, "c": 131_072, "d": 10, "e": 0, "f": 900_001}
    tensors = {name: torch.randn(size, generator=generator).to(torch.bfloat16) for name, size in sizes.items()}
    tensors["f"][:1000] = float("inf")
    return tensors | {"b": torch.arange(50_000), "g": torch.randn(300_000, generator=generator)}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    directory = tmp_path_factory.mktemp("family")
    base = make_tensors()
    models = [base, *(add_noise(base, seed=k) | {"b": base["b"]} for k in (1, 2))]
    return tuple(write_checkpoint(directory / f"m{k}", tensors, {}) for k, tensors in enumerate(models))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """A GPU that every merge of this process uses."""
    gpu = FakeGpu()
    run, send, read = execute.run_shard, gpu_stage.GpuStage._send, fetch.read_ranges

    def run_there(stores: Stores, task: ShardTask, report: Report, **rest: Any) -> ShardResult:
        with gpu:
            return run(stores, task, report, **rest, device=DEVICE.type)

    def send_there(*args: Any) -> Any:
        with nullcontext() if _get_current_dispatch_mode() is gpu else gpu:  # a thread of its own, or the task's
            return send(*args)

    def read_and_tell(stores: Stores, ranges: Any, views: Any, on_read: Any, **more: Any) -> None:
        for view in views:
            gpu.host_writes(view)
        read(stores, ranges, views, on_read, **more)

    for module in (runners, workers):
        monkeypatch.setattr(module, "require_gpus", lambda: ["0"])
    monkeypatch.setattr(execute, "run_shard", run_there)
    monkeypatch.setattr(gpu_stage.GpuStage, "_send", send_there)
    monkeypatch.setattr(gpu_stage, "read_ranges", read_and_tell)
    monkeypatch.setattr(gpu_stage, "open_queue", gpu.open_queue)
    return gpu


@pytest.fixture(scope="module", params=METHODS)
def on_the_cpu(
    request: pytest.FixtureRequest, family: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A config, and the output."""
    config, out = make_config(request.param, family), tmp_path_factory.mktemp("cpu") / "out"
    merge(config, out, workers=1, seed=3, shard_size="2MB")
    return config, read_model(out)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_the_same_files_of_methods_that_take_statistics(method: str, gpu: FakeGpu, tmp_path: Path) -> None:
    """In pieces with their tensors, or whole."""
    models = draw_models(tmp_path, 3, {"matrix": (901, 333), "square": (70, 70), "norm": (5,)})
    config = {
        "merge_method": method,
        "models": [{"model": model, **write_statistics(find_op(method), model)} for model in models],
    }
    for name, gpu_memory in (("cpu", None), ("gpu", "1GiB")):
        merge(config, tmp_path / name, workers=1, gpu_memory=gpu_memory)
    found, expected = (read_tensors(tmp_path / name) for name in ("gpu", "cpu"))
    for name, x in found.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_the_same_files_of_a_kernel_in_float64(family: tuple[Path, ...], gpu: FakeGpu, tmp_path: Path) -> None:
    """Their norms, too, which come back in float32."""
    models = [{"model": str(model)} for model in family[:2]]
    config = {"merge_method": "arcee_fusion", "base_model": str(family[0]), "models": models}
    for name, gpu_memory in (("cpu", None), ("gpu", "1GiB")):
        merge(config, tmp_path / name, workers=1, seed=3, gpu_memory=gpu_memory)
    assert read_model(tmp_path / "gpu") == read_model(tmp_path / "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("gpu_memory", ["660MiB", "1GiB"])
def test_the_same_files_of_a_document_that_another_uses(
    gpu_memory: str, family: tuple[Path, ...], gpu: FakeGpu, tmp_path: Path
) -> None:
    base, one, two = map(str, family)
    first = {"name": "first", "merge_method": "nuslerp", "models": [{"model": base}, {"model": one}]}
    second = {"merge_method": "ties", "base_model": two, "models": [{"model": "first"}]}
    shared = {"parameters": {"weight": 1}}
    config = "---\n".join(yaml.safe_dump(document | shared, sort_keys=False) for document in (first, second))
    for name, memory in (("cpu", None), ("gpu", gpu_memory)):
        merge(config, tmp_path / name, workers=1, seed=3, gpu_memory=memory)
    assert read_model(tmp_path / "gpu") == read_model(tmp_path / "cpu")


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("num_buffers", [1, 2])
def test_the_same_files(
    num_buffers: int,
    limits: str,
    on_the_cpu: tuple[dict[str, Any], dict[str, Any]],
    gpu: FakeGpu,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, expected = on_the_cpu
    keep = Keep()
    staging = {"large": 8 * 2**20, "small": 2**16}[limits]
    monkeypatch.setattr(places, "_measure_transfer", lambda *_: Transfer(num_buffers, staging_nbytes=staging))
    memory, gpu_memory = find_limits(limits, config)
    settings = MergeOptions(workers=1, seed=3, shard_size="2MB", memory=memory, gpu_memory=gpu_memory)
    merge(config, tmp_path / "gpu", settings, on_event=keep)
    assert read_model(tmp_path / "gpu") == expected
    reread = sum(task.reread_nbytes for task in keep.plan.tasks)
    assert bool(reread) is (limits == "small" and config["merge_method"] != "linear")
    merges = [m for task in keep.plan.tasks for m in task.merges]
    extra = gpu.num_sent - reread - sum(source.nbytes for m in merges for source in m.sources)
    assert 0 <= extra < 64 * sum(len(m.sources) for m in merges), "as they are stored, and once, but for gaps between"
    assert gpu.num_there <= PAGE_ELEMENTS * 4, "nothing is left on the GPU but the table of random words"
    projected = max(task.projected_gpu_mem for task in keep.plan.tasks)
    assert projected // 2 <= gpu.most_there <= projected + 2**20, "what operations need is counted with the context"


def run_on_the_cpu(stores: Stores, task: ShardTask, report: Report, **rest: Any) -> ShardResult:
    return execute.run_shard(stores, task, report, **rest, device="cpu")


@pytest.mark.slow
def test_the_same_files_from_threads_of_a_process_that_is_started_before_the_plan(
    on_the_cpu: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, expected = on_the_cpu
    for module in (runners, workers):
        monkeypatch.setattr(module, "require_gpus", lambda: ["0"])
    monkeypatch.setattr(execution, "run_shard", run_on_the_cpu)
    keep = Keep()
    merge(config, tmp_path / "gpu", workers=2, seed=3, shard_size="2MB", gpu_memory="4GiB", on_event=keep)
    assert read_model(tmp_path / "gpu") == expected
    assert len(keep.plan.tasks) > keep.plan.num_workers == 2
    assert not multiprocessing.active_children()


def test_processes_end_where_the_plan_fails(
    family: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (runners, workers):
        monkeypatch.setattr(module, "require_gpus", lambda: ["0"])
    with pytest.raises(MemoryLimitError):
        merge(make_config("linear", family), tmp_path / "out", workers=3, gpu_memory="1MiB")
    assert not multiprocessing.active_children()


class CarelessQueue(FakeQueue):
    """Does not wait for other queues."""

    def wait(self, mark: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("careless", "message"),
    [
        ("queue 1", "copy_.default in queue 1 does not wait for"),
        ("queue 2", "in queue 2 does not wait for aten.copy_.default in queue 1"),
        ("queue 3", "copy_.default in queue 3 does not wait for"),
        ("host", "in host does not wait for aten.copy_.default in queue"),
    ],
)
def test_every_wait_is_needed(
    careless: str,
    message: str,
    family: tuple[Path, ...],
    gpu: FakeGpu,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if careless == "host":
        monkeypatch.setattr(FakeMark, "synchronize", lambda self: None)
    open_queue = gpu.open_queue

    def open_careless(device: torch.device) -> FakeQueue:
        queue = open_queue(device)
        return CarelessQueue(gpu, queue.name) if queue.name == careless else queue

    monkeypatch.setattr(gpu_stage, "open_queue", open_careless)
    config = make_config("linear", family)
    memory, gpu_memory = find_limits("small", config)
    with pytest.raises(AssertionError, match=message):
        merge(config, tmp_path / "out", workers=1, memory=memory, gpu_memory=gpu_memory)


def test_a_gpu_that_runs_full_is_an_error_with_the_tensor(
    family: tuple[Path, ...], gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "capacity", 10**6)
    with pytest.raises(MemoryLimitError, match=r"^model.safetensors.*allow less with --gpu-memory, or end what else"):
        merge(make_config("ties", family), tmp_path / "out", workers=1, gpu_memory="4GiB")
    monkeypatch.setattr(gpu, "capacity", 2**40)
    merge(make_config("ties", family), tmp_path / "done", workers=1, gpu_memory="4GiB")
    monkeypatch.setattr(gpu, "capacity", gpu.most_there - 1)
    with pytest.raises(MemoryLimitError, match=r"^[acf]: .*allow less with --gpu-memory, or end what else"):
        merge(make_config("ties", family), tmp_path / "out", workers=1, gpu_memory="4GiB")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu_is_said_before_anything_runs(family: tuple[Path, ...], tmp_path: Path, cli: Cli) -> None:
    with pytest.raises(ConfigError, match=r"--gpu-memory asks for a GPU on .*: torch .* or leave --gpu-memory out"):
        merge(make_config("linear", family), tmp_path / "out", gpu_memory="4GiB")
    assert not (tmp_path / "out").exists()
