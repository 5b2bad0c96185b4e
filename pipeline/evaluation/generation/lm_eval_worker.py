"""Evaluates with lm-eval: a process of its own, started by `engine`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from raymerge.pipeline.evaluation.generation.protocol import serve_requests

_DEFAULT_MAX_TOKENS = 256
"""Default of lm-eval, where a task says nothing."""


def serve(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the answers to a request: the names of all tasks, or what a model makes of one."""
    manager = TaskManager(include_path=request["include_path"])
    if request["kind"] == "list":
        yield {"tasks": sorted(manager.all_tasks)}
        return
    model = HFLM(
        pretrained=request["model"],
        dtype=request["dtype"],
        batch_size=request["batch_size"],
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed")
    found = simple_evaluate(
        model,
        tasks=[request["task"]],
        limit=request["limit"],
        apply_chat_template=bool(model.tokenizer.chat_template),
        gen_kwargs=request["arguments"] or None,
        task_manager=manager,
        bootstrap_iters=0,
        use_cache=request["cache"],
        **({} if request["seed"] is None else dict.fromkeys(seeds, request["seed"])),
    )
    assert found is not None
    results: Mapping[str, Any] = found["results"]
    for task, samples in found["samples"].items():
        for sample in samples:
            yield {"sample": {"task": task, **describe(sample, model.tokenizer)}}
    yield {"results": {task: _numbers(values) for task, values in results.items()}}


def describe(sample: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Return what counts of a sample as lm-eval logs it; generated texts come with their tokens."""
    metrics = {
        name: sample[name] for name in sample.get("metrics", ()) if isinstance(sample.get(name), bool | int | float)
    }
    found = {
        "item": str(sample["doc_id"]),
        "filter": sample["filter"],
        "metrics": {name: float(value) for name, value in metrics.items()},
        "expected": str(sample["target"]),
        "answer": str(sample["filtered_resps"])[:2000],
    }
    arguments = [
        list(each) if not isinstance(each, Mapping) else [*each.values()] for each in _list(sample["arguments"])
    ]
    settings = [each[1] for each in arguments if len(each) > 1 and isinstance(each[1], Mapping)]
    texts = [text for response in sample["resps"] for text in _list(response) if isinstance(text, str)]
    if not settings or not texts:  # a loglikelihood task: nothing is generated
        return found
    limit = int(settings[0].get("max_gen_toks") or settings[0].get("max_new_tokens") or _DEFAULT_MAX_TOKENS)
    counts = [len(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    return {**found, "prompt": str(arguments[0][0]), "texts": texts, "tokens": counts, "max_tokens": limit}


def _list(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else [value]


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}


if __name__ == "__main__":
    serve_requests(serve)
