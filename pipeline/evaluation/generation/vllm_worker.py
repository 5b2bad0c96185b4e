"""Generates with vLLM: a process of its own for each model, started by `engine`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # or the model would outlive this process

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from vllm import LLM, SamplingParams

from raymerge.pipeline.evaluation.generation.protocol import serve_requests
from raymerge.pipeline.evaluation.generation.transformers_worker import describe, encode_all, list_ends


class Loaded:
    """A model in memory."""

    def __init__(self, directory: str, dtype: str) -> None:
        on_gpus = torch.cuda.is_available()
        self.llm = LLM(
            directory,
            dtype="float32" if dtype == "auto" and not on_gpus else dtype,
            tensor_parallel_size=max(1, torch.cuda.device_count()),
            enforce_eager=not on_gpus,
            generation_config="vllm",  # nothing of the model's own: all models are sampled in the same way
        )
        self.tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        try:
            own = GenerationConfig.from_pretrained(directory, local_files_only=True)
        except OSError:
            own = GenerationConfig()
        self.ends = list_ends(own, config, self.tokenizer)
        self.pad = (self.ends or [0])[0]
        self.max_positions: int = self.llm.llm_engine.model_config.max_model_len


class Server:
    """Answers requests for one model."""

    def __init__(self) -> None:
        self.loaded: Loaded | None = None

    def serve(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield what the model answers to each prompt, as soon as it is there."""
        if self.loaded is None:
            self.loaded = Loaded(request["model"], request["dtype"])
        yield from generate(self.loaded, request)


def generate(loaded: Loaded, request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what the model answers to each prompt."""
    encoded = encode_all(loaded, request)
    engine = loaded.llm.llm_engine
    jobs = [(item, number) for item, number in request["jobs"]]
    for index, (item, number) in enumerate(jobs):
        ids = encoded[item][1]
        limit = min(request["max_new_tokens"], loaded.max_positions - len(ids))
        params = make_params(loaded, request, limit, draw_seed(request["seed"], item, number))
        engine.add_request(str(index), {"prompt_token_ids": ids}, params)
    while engine.has_unfinished_requests():
        for found in engine.step():
            if found.finished:
                item, number = jobs[int(found.request_id.partition("-")[0])]
                answer = found.outputs[0]
                ids = list(answer.token_ids)
                if ids and ids[-1] in loaded.ends:
                    ids.pop()
                is_cut = answer.finish_reason == "length"
                yield describe(loaded, request, item, number, encoded[item][0], ids, is_cut=is_cut)


def make_params(loaded: Loaded, request: Mapping[str, Any], limit: int, seed: int) -> SamplingParams:
    """Return how an answer is sampled: as transformers does it, but for the random numbers."""
    is_sampled = request["temperature"] > 0
    return SamplingParams(
        temperature=request["temperature"],
        top_p=request["top_p"] if is_sampled else 1.0,
        top_k=request["top_k"] if is_sampled else 0,
        max_tokens=limit,
        seed=seed if is_sampled else None,
        stop=list(request["stop"]),
        stop_token_ids=loaded.ends,
        skip_special_tokens=False,
    )


def draw_seed(seed: int, item: str, number: int) -> int:
    """Return the seed that belongs to a sample of an item."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{item}\0{number}".encode()).digest()[:7], "little")


if __name__ == "__main__":
    serve_requests(Server().serve)
