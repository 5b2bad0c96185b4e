"""A plan for people, for machines and as a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from raymerge.pipeline.checkpoint.dtypes import count_nbytes
from raymerge.pipeline.checkpoint.files import is_tokenizer
from raymerge.pipeline.errors import OutputError
from raymerge.pipeline.messages import counted, listing
from raymerge.pipeline.plan.memory.gpu import CONTEXT_NBYTES
from raymerge.pipeline.plan.memory.projection import NOTABLE_NBYTES, project_plan_mem
from raymerge.pipeline.plan.types import MergePlan
from raymerge.pipeline.redact import redact, redact_texts
from raymerge.pipeline.sizes import format_memory, format_nbytes

if TYPE_CHECKING:
    import pyarrow as pa

_MAX_ADAPTERS = 8
"""Adapters that a plan names unless it is verbose."""
_MAX_CHOSEN = 8
"""Models that a pattern has found, and that a plan names unless it is verbose."""


def format_plan(plan: MergePlan, *, verbose: bool = False) -> str:
    """Return a plan as text; with `verbose`, a line for each shard."""
    read = sum(task.read_nbytes for task in plan.tasks)
    reread = sum(task.reread_nbytes for task in plan.tasks)
    largest = max(task.nbytes for task in plan.tasks)
    again = f", and {format_nbytes(reread)} again for tensors that are not kept between passes" if reread else ""
    shards = counted(len(plan.tasks), "shard") + (f", the largest {format_nbytes(largest)}" if plan.tasks[1:] else "")
    models = counted(len(plan.models), "model")
    has_tokenizer = any(is_tokenizer(file.name) for file in plan.outputs[0].side_files)
    given = "config.json, tokenizer and other files" if has_tokenizer else "config.json; it has no tokenizer"
    if plan.is_pipeline:
        given = "model_index.json, configs and other files"
    lends = f"{plan.donor} gives {given}"
    if plan.is_adapter:
        models, lends = counted(len(plan.models), "adapter"), "to an adapter"
    own = _project_own_mem(plan)
    besides = f"; the plan takes {format_memory(own)} besides" if own >= NOTABLE_NBYTES else ""
    lines = [
        f"{plan.method} of {models}, {lends}",
        f"  tensors  {len(plan.weight_map)}",
        f"  read     {format_nbytes(read)}{again}",
        f"  write    {format_nbytes(plan.total_nbytes)} in {shards}",
        f"  passes   {_num_passes(plan)} to measure, 1 to merge",
        f"  memory   {_format_shares(plan)}; {format_memory(plan.allowed_mem)} are allowed in all{besides}",
    ]
    effects = [effect for adapter in plan.adapters for effect in adapter.effects]
    if effects:
        listed = listing(effects, len(effects) if verbose else _MAX_ADAPTERS, separator="\n           ")
        lines.append(f"  adapters {listed}")
    if plan.chosen:
        lines.append(f"  chosen   {listing(plan.chosen, len(plan.chosen) if verbose else _MAX_CHOSEN)}")
    if plan.vocabulary:
        lines += [f"  tokens   {plan.vocabulary[0]}", *(f"           {line}" for line in plan.vocabulary[1:])]
    if plan.gpus is not None:
        context = "CUDA" if plan.gpus.is_in_one_process else "CUDA in each of them"
        on_gpu = max(task.projected_gpu_mem for task in plan.tasks)
        lines.append(
            f"  gpus     {plan.gpus.num_gpus}, {format_memory(on_gpu)} for each of "
            f"{counted(plan.gpus.num_sharing(plan.num_workers), 'worker')} on one, at most, and "
            f"{format_memory(CONTEXT_NBYTES)} for {context}; {format_memory(plan.gpus.allowed_mem)} of each are allowed"
        )
    if verbose:
        lines += [
            f"  {task.file}: {counted(len(task.merges), 'tensor')}, {format_nbytes(task.nbytes)}, reads "
            f"{format_nbytes(task.read_nbytes + task.reread_nbytes)}, {format_memory(task.projected_mem)}"
            for task in plan.tasks
        ]
    lines += [f"  note: {line}" for line in plan.notes]
    lines += [f"  not in the output: {line}" for line in plan.dropped]
    lines += [f"  advice: {line}" for line in plan.advice]
    return redact("\n".join(lines))


def _project_own_mem(plan: MergePlan) -> int:
    return project_plan_mem(
        sum(len(merge.sources) for task in plan.tasks for merge in task.merges), len(plan.weight_map)
    )


def _format_shares(plan: MergePlan) -> str:
    """Describe the memory of a worker, and of tasks that take several shares."""
    each = "one worker" if plan.num_workers == 1 else f"each of {plan.num_workers} workers"
    single = max((task.projected_mem for task in plan.tasks if task.num_shares == 1), default=0)
    large = [task for task in plan.tasks if task.num_shares > 1]
    text = [f"{format_memory(single)} for {each}, at most"] if single else []
    if large:
        most = max(large, key=lambda task: task.projected_mem)
        what = f"{counted(len(large), 'shard')} with larger tensors" if single else "each shard"
        text.append(f"{what} up to {format_memory(most.projected_mem)}, in the place of {most.num_shares} workers")
    return "; ".join(text)


def _num_passes(plan: MergePlan) -> int:
    return max(merge.num_passes for task in plan.tasks for merge in task.merges)


def plan_json(plan: MergePlan) -> str:
    """Return a plan as JSON, without its tensors (see `plan_table`)."""
    configs = {  # JSON has no Infinity, which config.json may: written as newer versions of transformers write it
        network.config: json.loads(
            plan.outputs[0].read(network.config), parse_constant=lambda name: {"__float__": name}
        )
        for network in plan.networks
    }
    content = redact_texts(
        {
            "method": plan.method,
            "models": [str(model) for model in plan.models],
            "donor": str(plan.donor),
            "adapters": [effect for adapter in plan.adapters for effect in adapter.effects],
            "seed": plan.outputs[0].seed,
            "fingerprint": plan.fingerprint,
            "num_tensors": len(plan.weight_map),
            "read_nbytes": sum(task.read_nbytes for task in plan.tasks),
            "reread_nbytes": sum(task.reread_nbytes for task in plan.tasks),
            "write_nbytes": sum(task.nbytes for task in plan.tasks),
            "num_passes": _num_passes(plan),
            "num_workers": plan.num_workers,
            "allowed_mem": plan.allowed_mem,
            "plan_mem": _project_own_mem(plan),
            "num_gpus": plan.gpus.num_gpus if plan.gpus else 0,
            "allowed_gpu_mem": plan.gpus.allowed_mem if plan.gpus else 0,
            "shards": [
                {
                    "file": task.file,
                    "num_tensors": len(task.merges),
                    "nbytes": task.nbytes,
                    "read_nbytes": task.read_nbytes,
                    "reread_nbytes": task.reread_nbytes,
                    "projected_mem": task.projected_mem,
                    "projected_gpu_mem": task.projected_gpu_mem,
                }
                for task in plan.tasks
            ],
            "side_files": [file.name for file in plan.outputs[0].side_files if file.name not in configs],
            "config": configs if plan.is_pipeline else configs[plan.networks[0].config],
            "vocabulary": list(plan.vocabulary),
            "dropped": list(plan.dropped),
            "warnings": list(plan.warnings),
            "notes": list(plan.notes),
            "advice": list(plan.advice),
        }
    )
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)


def save_table(plan: MergePlan, path: Path) -> None:
    """Write the plan's tensor table as Parquet.

    Raises:
        OutputError: the file cannot be written.
    """
    import pyarrow.parquet as pq

    try:
        pq.write_table(plan_table(plan), path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error}") from error


def plan_table(plan: MergePlan) -> pa.Table:
    """Return one row for each output tensor: where it goes, what is done, and the byte ranges it comes from."""
    import pyarrow as pa

    text, number = pa.string(), pa.int64()
    source_fields = {"model": text, "name": text, "dtype": text, "url": text, "start": number, "stop": number}
    fields = {
        "name": text,
        "file": text,
        "dtype": text,
        "shape": pa.list_(number),
        "nbytes": number,
        "op": text,
        "parameters": text,
        "sources": pa.list_(pa.struct(list(source_fields.items()))),
    }
    return pa.Table.from_pylist(
        [
            {
                "name": name,
                "file": task.file,
                "dtype": merge.out_dtype,
                "shape": list(shape),
                "nbytes": count_nbytes(shape, merge.out_dtype),
                "op": merge.op,
                "parameters": json.dumps(dict(merge.variants[0].parameters)),
                "sources": [
                    {
                        "model": redact(tensor.model),
                        "name": tensor.name,
                        "dtype": tensor.dtype,
                        "url": redact(tensor.file.url),
                        "start": tensor.start,
                        "stop": tensor.stop,
                    }
                    for source in merge.sources
                    for tensor in source.origins
                ],
            }
            for task in plan.tasks
            for merge in task.merges
            for name, shape in merge.entries
        ],
        schema=pa.schema(list(fields.items())),
    )
