"""What a person sees of plans and reports at a Python prompt."""

from __future__ import annotations

from pathlib import Path

from raymerge import inspect, merge, plan
from tests.checkpoints import write_family


def test_reprs_say_what_it_is_on_one_short_line(tmp_path: Path) -> None:
    family = [str(model) for model in write_family(tmp_path / "in", 2)]
    models = [{"model": model, "parameters": {"weight": 1}} for model in family]
    the_plan = plan({"merge_method": "linear", "models": models}, shard_size="20kB")
    task = the_plan.tasks[0]
    tensors, written = len(the_plan.weight_map), the_plan.total_nbytes / 1e3
    assert repr(the_plan) == (
        f"MergePlan(linear of 3 models, {tensors} tensors, {written:.3g} kB in {len(the_plan.tasks)} shards)"
    )
    assert repr(task).startswith(f"ShardTask({task.file}: {len(task.merges)} tensor")
    assert repr(task.merges[0]) == f"TensorMerge({task.merges[0].name}: linear of 3 tensors, F32 [32, 16])"
    assert repr(the_plan.inputs[0]).startswith(f"InputModel({family[0]}: 3 files in ")
    report = merge({"merge_method": "linear", "models": models}, tmp_path / "out", workers=1)
    assert repr(report).startswith(f"MergeReport({tmp_path}/out: {tensors} tensors in 1 shard, ")
    assert repr(report.slowest).startswith("ShardResult(model.safetensors: ")
    assert repr(inspect(family[0])).startswith(f"Inspection({family[0]}: safetensors, {tensors} tensors in 3 files, ")
