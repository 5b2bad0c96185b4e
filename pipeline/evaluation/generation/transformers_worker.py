"""Generates with transformers: a process of its own, started by `engine`.

Answers are drawn from uniform numbers that depend on seed, item and sample alone, one for each token.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from raymerge.pipeline.evaluation.generation.protocol import serve_requests

_LOGITS_NBYTES = 2**30
"""For the logits of windows that are measured at once."""


class Loaded:
    """A model in memory."""

    def __init__(self, directory: str, digest: str, dtype: str) -> None:
        self.key = directory, digest, dtype
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        kind = {"auto": "auto" if self.device == "cuda" else torch.float32}.get(dtype) or getattr(torch, dtype)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        spread = {"device_map": "auto"} if torch.cuda.device_count() > 1 else {}  # which needs accelerate
        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=kind, local_files_only=True, **spread)
        self.model: Any = model if spread else model.to(self.device)
        self.model.eval()
        self.max_positions: int = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2**31
        self.ends = list_ends(self.model.generation_config, self.model.config, self.tokenizer)
        pad = self.tokenizer.pad_token_id
        self.pad: int = pad if pad is not None else (self.ends or [0])[0]


def list_ends(*sources: Any) -> list[int]:
    """Return the tokens that end a text, as a model's generation config, config and tokenizer name them."""
    ends = [source.eos_token_id for source in sources]
    lists = [end if isinstance(end, list) else [end] for end in ends if end is not None]
    return sorted({int(token) for each in lists for token in each})


class Server:
    """Answers requests; keeps the last model in memory."""

    def __init__(self) -> None:
        self.loaded: Loaded | None = None

    def serve(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the answers to a request: a line for each sample or window."""
        key = request["model"], request["digest"], request["dtype"]
        if self.loaded is None or self.loaded.key != key:
            self.loaded = None
            gc.collect()
            torch.cuda.empty_cache()
            self.loaded = Loaded(*key)
        with torch.inference_mode():
            serve = {"generate": generate, "loss": measure_losses}[request["kind"]]
            yield from serve(self.loaded, request)


def generate(loaded: Loaded, request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what the model answers to each prompt."""
    encoded = encode_all(loaded, request)
    jobs = [(item, number) for item, number in request["jobs"]]
    while jobs:
        batch, jobs = jobs[: request["batch_size"]], jobs[request["batch_size"] :]
        for (item, number), (ids, is_cut) in zip(batch, generate_batch(loaded, batch, encoded, request), strict=True):
            yield describe(loaded, request, item, number, encoded[item][0], ids, is_cut=is_cut)


def encode_all(loaded: Any, request: Mapping[str, Any]) -> dict[str, tuple[str, list[int]]]:
    """Return the prompt of each item; see `encode`.

    Raises:
        ValueError: one is longer than the model takes.
    """
    encoded = {item: encode(loaded, messages, request) for item, messages in request["items"].items()}
    for item, (_, ids) in encoded.items():
        if len(ids) >= loaded.max_positions:
            raise ValueError(
                f"the prompt of item {item} has {len(ids):,} tokens, and the model takes {loaded.max_positions:,}"
            )
    return encoded


def encode(loaded: Any, messages: list[dict[str, str]], request: Mapping[str, Any]) -> tuple[str, list[int]]:
    """Return a prompt as text and as tokens: by the chat template, or where there is none, the messages' plain text."""
    if loaded.tokenizer.chat_template:
        text = loaded.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **request["template"]
        )
        return text, loaded.tokenizer.encode(text, add_special_tokens=False)
    text = "\n\n".join(message["content"] for message in messages)
    ids = loaded.tokenizer.encode(text)
    if len(ids) > 1 and ids[-1] in loaded.ends:  # some tokenizers end what they are given
        ids = ids[:-1]
    return text, ids or [loaded.pad]


def describe(
    loaded: Any, request: Mapping[str, Any], item: str, number: int, prompt: str, ids: list[int], *, is_cut: bool
) -> dict[str, Any]:
    """Return an answer with what counts of it, from its tokens without the one that ends the text."""
    text = loaded.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return {
        "item": item,
        "number": number,
        "prompt": prompt,
        "text": cut_at(text, request["stop"]),
        "tokens": len(ids),
        "cut_off": is_cut,
        "is_chat": bool(loaded.tokenizer.chat_template),
    }


def cut_at(text: str, stops: Sequence[str]) -> str:
    """Return a text up to the first of some strings."""
    found = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(found)] if found else text


def generate_batch(
    loaded: Loaded,
    batch: Sequence[tuple[str, int]],
    encoded: Mapping[str, tuple[str, list[int]]],
    request: Mapping[str, Any],
) -> list[tuple[list[int], bool]]:
    """Return tokens of each answer, without the one that ends it, and whether it was cut off."""
    prompts = [encoded[item][1] for item, _ in batch]
    longest = max(map(len, prompts))
    ids = torch.full((len(batch), longest), loaded.pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    limits = [min(request["max_new_tokens"], loaded.max_positions - len(prompt)) for prompt in prompts]
    ends = Ends(loaded, longest, limits, request["stop"])
    processors: list[LogitsProcessor] = []
    if request["temperature"] > 0:
        numbers = [draw_uniform(request["seed"], item, number, max(limits)) for item, number in batch]
        processors = [Draw(request, longest, numbers)]
    # nothing of the model's own generation_config.json: all models are sampled in the same way
    config = GenerationConfig(
        max_new_tokens=max(limits), do_sample=False, pad_token_id=loaded.pad, eos_token_id=None, use_cache=True
    )
    loaded.model.generation_config = config
    made = loaded.model.generate(
        ids.to(loaded.model.device),
        attention_mask=mask.to(loaded.model.device),
        generation_config=config,
        logits_processor=LogitsProcessorList(processors),
        stopping_criteria=StoppingCriteriaList([ends]),
    )
    rows = made[:, longest:].tolist()
    return [ends.trim(row, tokens) for row, tokens in enumerate(rows)]


def draw_uniform(seed: int, item: str, number: int, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return uniform numbers in [0, 1) that belong to a sample of an item."""
    key = hashlib.sha256(f"{seed}\0{item}\0{number}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random(count)


class Draw(LogitsProcessor):
    """Draws each row's next token by its own uniform number, and leaves no other."""

    def __init__(
        self, request: Mapping[str, Any], start: int, numbers: Sequence[np.ndarray[Any, np.dtype[np.float64]]]
    ) -> None:
        self._start = start
        self._numbers = torch.from_numpy(np.stack(numbers))
        self._warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(float(request["temperature"]))]
        if request["top_k"]:
            self._warpers.append(TopKLogitsWarper(request["top_k"]))
        if request["top_p"] < 1:
            self._warpers.append(TopPLogitsWarper(float(request["top_p"])))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores of 0 for the token drawn, and minus infinity for all others."""
        scores = scores.float()
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        sums = scores.softmax(-1, dtype=torch.float64).cumsum(-1)
        number = self._numbers[:, input_ids.shape[1] - self._start].to(sums.device)
        drawn = torch.searchsorted(sums, (number * sums[:, -1]).unsqueeze(-1), right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn.clamp_(max=scores.shape[-1] - 1), 0.0)


class Ends(StoppingCriteria):
    """Ends each row by itself: at a token that ends a text, at a string, or when it is long enough."""

    def __init__(self, loaded: Loaded, start: int, limits: Sequence[int], stops: Sequence[str]) -> None:
        self._tokenizer, self._ends = loaded.tokenizer, set(loaded.ends)
        self._start, self._limits, self._stops = start, limits, stops
        self._window = max((len(stop.encode()) for stop in stops), default=0) + 8
        self._ended: dict[int, tuple[int, bool]] = {}
        """Row: how many tokens it has, and whether it was cut off."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **keywords: Any) -> torch.Tensor:
        """Tell for each row whether it has ended."""
        length = input_ids.shape[1] - self._start
        last = input_ids[:, -1].tolist()
        for row, token in enumerate(last):
            if row in self._ended:
                continue
            if token in self._ends:
                self._ended[row] = length - 1, False
            elif self._stops and self._has_stop(input_ids[row, max(self._start, input_ids.shape[1] - self._window) :]):
                self._ended[row] = length, False
            elif length >= self._limits[row]:
                self._ended[row] = length, True
        return torch.tensor([row in self._ended for row in range(len(last))], device=input_ids.device)

    def _has_stop(self, tokens: torch.Tensor) -> bool:
        text = self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return any(stop in text for stop in self._stops)

    def trim(self, row: int, tokens: list[int]) -> tuple[list[int], bool]:
        """Return a row's tokens up to its end, and whether it was cut off."""
        length, is_cut = self._ended.get(row, (len(tokens), True))
        return tokens[:length], is_cut


def measure_losses(loaded: Loaded, request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the negative log-likelihood of each window of texts; it begins with the last token of the one before."""
    finished = {(item, number) for item, number in request["finished"]}
    window = min(request["window"], loaded.max_positions)
    for name, text in request["texts"].items():
        encoded = loaded.tokenizer(text, return_offsets_mapping=loaded.tokenizer.is_fast, verbose=False)
        ids = encoded["input_ids"]
        starts = list(range(0, len(ids) - 1, window - 1))[: request["limit"]]
        jobs = [(number, start) for number, start in enumerate(starts) if (name, number) not in finished]
        vocabulary = loaded.model.config.get_text_config().vocab_size
        size = max(1, min(request["batch_size"], _LOGITS_NBYTES // (4 * window * vocabulary)))
        while jobs:
            length = len(ids[jobs[0][1] : jobs[0][1] + window])
            num = next((k for k, (_, start) in enumerate(jobs) if len(ids) - start < window), len(jobs)) or 1
            batch, jobs = jobs[: min(num, size)], jobs[min(num, size) :]
            tokens = torch.tensor([ids[start : start + length] for _, start in batch], device=loaded.model.device)
            logits = loaded.model(input_ids=tokens).logits[:, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
            for (number, start), nats in zip(batch, losses.sum(-1, dtype=torch.float64).tolist(), strict=True):
                measures = {"nats": nats, "tokens": length - 1}
                if loaded.tokenizer.is_fast:
                    first, last = (encoded["offset_mapping"][place][1] for place in (start, start + length - 1))
                    measures["bytes"] = len(text[first:last].encode("utf-8", "replace"))
                yield {"item": name, "number": number, "measures": measures}


def main() -> None:
    """Serve until nobody asks any more."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    serve_requests(Server().serve)


if __name__ == "__main__":
    main()
