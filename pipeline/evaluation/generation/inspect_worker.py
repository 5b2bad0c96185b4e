"""Evaluates with Inspect: a process of its own, started by `engine`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import inspect_ai
import torch
from inspect_ai.log import EvalLog, EvalSample, read_eval_log
from inspect_ai.scorer import value_to_float
from transformers import AutoTokenizer

from raymerge.pipeline.evaluation.generation.protocol import serve_requests

_END = "</think>"
_DEFAULT_MAX_TOKENS = 2048
"""Tokens of an answer by Inspect's `hf` provider, unless the task sets another limit."""


def serve(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the answers to a request: what a task is called, or what a model makes of it."""
    with tempfile.TemporaryDirectory(prefix="raymerge-") as scratch:
        if request["kind"] == "list":
            log = _evaluate(request["task"], scratch, model="mockllm/model", run_samples=False)
            yield {"task": log.eval.task, "scorers": [scorer.name for scorer in log.eval.scorers or ()]}
            return
        logs = request["kept"] or scratch
        link = Path(logs, "model")  # the log of an interrupted run has its path, and the model may be elsewhere now
        link.unlink(missing_ok=True)
        link.symlink_to(request["model"])
        arguments: dict[str, Any] = {"model_path": str(link), "batch_size": request["batch_size"]}
        on_gpus = torch.cuda.is_available()
        arguments["dtype"] = "float32" if request["dtype"] == "auto" and not on_gpus else request["dtype"]
        if torch.cuda.device_count() > 1:
            arguments["device"] = "auto"
        options = {
            name: request[name] for name in ("limit", "epochs", "seed", "max_tokens") if request[name] is not None
        }
        if request["temperature"] is not None:
            arguments["do_sample"] = request["temperature"] > 0
        if request["temperature"]:
            options["temperature"] = request["temperature"]
        options["max_connections"] = options["log_buffer"] = request["batch_size"]
        log = _evaluate(request["task"], logs, model="hf/local", model_args=arguments, **options)
        tokenizer = AutoTokenizer.from_pretrained(request["model"], local_files_only=True)
        limit = request["max_tokens"] or log.plan.config.max_tokens or _DEFAULT_MAX_TOKENS
        for sample in log.samples or ():
            yield {"sample": describe(sample, tokenizer, limit)}
        results = log.results.scores if log.results else []
        yield {
            "results": {
                f"{score.name}/{name}": float(metric.value)
                for score in results
                for name, metric in score.metrics.items()
                if isinstance(metric.value, int | float)
            }
        }


def _evaluate(task: str, logs: str, **options: Any) -> EvalLog:
    """Return the log of a task.

    Raises:
        RuntimeError: it has failed, or is several tasks.
    """
    file, at, name = task.partition("@")
    if file.endswith(".py"):  # Inspect takes no other paths than those below the working directory
        os.chdir(Path(file).absolute().parent)
        task = f"{Path(file).name}{at}{name}"
    begun, found = _find_log(logs), None
    if begun is not None:
        if begun.status == "success":
            return begun
        again = {name: options[name] for name in ("max_connections", "log_buffer") if name in options}
        with suppress(Exception):  # such as of a task file that has another name now; what a task raises is in its log
            found = inspect_ai.eval_retry(begun, log_dir=logs, display="none", **again)
    if found is None:
        found = inspect_ai.eval(task, log_dir=logs, log_format="eval", display="none", **options)
    if len(found) != 1:
        names = ", ".join(log.eval.task for log in found)
        raise RuntimeError(
            f"{task} is {len(found)} tasks; name one as FILE.py@TASK: {names}" if found else "no such task"
        )
    [log] = found
    if log.status == "error":
        raise RuntimeError(log.error.message if log.error else "the task has failed")
    return log


def _find_log(logs: str) -> EvalLog | None:
    """Return the log of an interrupted run that has the most samples; None where there is none."""
    found = []
    for path in sorted(Path(logs).glob("*.eval")):
        with suppress(Exception):  # it was killed before it had written anything that can be read
            found.append(read_eval_log(str(path)))
    return max(found, key=lambda log: len(log.samples or ()), default=None)


def describe(sample: EvalSample, tokenizer: Any, limit: int) -> dict[str, Any]:
    """Return the figures of a sample; tokens are those of the model's messages, as its tokenizer splits them.

    In Inspect's own usage, an answer of the `hf` provider has as many tokens as the longest of its batch, and none is
    cut off: it is no more than an upper bound.

    Args:
        sample: of a log.
        tokenizer: the model's.
        limit: tokens with which an answer is cut off.
    """

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    thoughts, texts, counts = [], [], [0]
    for message in sample.messages:
        if message.role == "assistant":
            parts = message.content if isinstance(message.content, list) else []
            thought = "".join(part.reasoning for part in parts if part.type == "reasoning")
            thoughts += [thought] if thought else []
            texts.append(message.text)
            counts.append(count(f"<think>\n{thought}\n{_END}\n\n{message.text}" if thought else message.text))
    to_float = value_to_float()
    scores = {
        f"{name}/{key}" if key else name: to_float(value)
        for name, score in (sample.scores or {}).items()
        for key, value in (score.value.items() if isinstance(score.value, dict) else [("", score.value)])
        if isinstance(value, str | int | float)
    }
    most = sum(usage.output_tokens for usage in sample.model_usage.values()) or sum(counts)
    is_cut = any(choice.stop_reason in ("max_tokens", "model_length") for choice in sample.output.choices)
    return {
        "item": str(sample.id),
        "number": sample.epoch - 1,
        "scores": scores,
        "tokens": min(sum(counts), most),
        "reasoning_tokens": min(sum(map(count, thoughts)), most),
        "thinking": bool(thoughts) or any(_END in text for text in texts),
        "cut_off": is_cut or min(counts[-1], most) >= limit,
        "prompt": sample.input if isinstance(sample.input, str) else "\n\n".join(each.text for each in sample.input),
        "texts": texts,
        "thoughts": thoughts,
        "expected": sample.target,
    }


if __name__ == "__main__":
    serve_requests(serve)
