"""Generation against transformers' own, of each prompt alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from raymerge.pipeline.evaluation.generation.transformers_worker import Draw, Loaded, Server, draw_uniform
from tests.tokenized_models import TEXTS, byte_level, write_tokenized

PROMPTS = {"a": "the quick", "b": "1 + 1 =", "c": "something else entirely was written there, and then", "d": "x"}
CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if thinks %}<think>{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenized(tmp_path_factory.mktemp("model") / "model", 3, byte_level(TEXTS[0]))


@pytest.fixture(scope="module")
def loaded(directory: Path) -> Loaded:
    return Loaded(str(directory), "", "auto")


def ask(directory: Path, server: Server | None = None, **changes: Any) -> dict[tuple[str, int], dict[str, Any]]:
    request = {
        "kind": "generate",
        "model": str(directory),
        "digest": "",
        "dtype": "auto",
        "items": {name: [{"role": "user", "content": text}] for name, text in PROMPTS.items()},
        "jobs": [(name, k) for name in PROMPTS for k in range(changes.get("samples", 1))],
        "template": {},
        "batch_size": 3,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "max_new_tokens": 12,
        "seed": 0,
        "stop": [],
        **changes,
    }
    return {(each["item"], each["number"]): each for each in (server or Server()).serve(request)}


def test_greedy_answers_are_those_of_transformers(directory: Path, loaded: Loaded) -> None:
    found = ask(directory)
    for name, text in PROMPTS.items():
        ids = loaded.tokenizer(text, return_tensors="pt")
        made = loaded.model.generate(**ids, do_sample=False, max_new_tokens=12, pad_token_id=loaded.pad)
        expected = made[0, ids["input_ids"].shape[1] :].tolist()
        if expected[-1] in loaded.ends:
            expected.pop()
        answer = found[name, 0]
        assert answer["text"] == loaded.tokenizer.decode(expected, clean_up_tokenization_spaces=False)
        assert answer["tokens"] == len(expected)
        assert answer["cut_off"] == (len(expected) == 12)


@pytest.mark.parametrize("batch_size", [1, 40])
def test_answers_do_not_depend_on_the_batch_or_on_what_is_left_to_do(directory: Path, batch_size: int) -> None:
    server = Server()
    sampled = {"temperature": 0.8, "top_p": 0.9, "seed": 4, "samples": 4}
    found = ask(directory, server, **sampled)
    assert len({each["text"] for each in found.values()}) > 12
    assert ask(directory, server, **sampled, batch_size=batch_size) == found
    some = [("d", 3), ("b", 0), ("a", 1)]
    assert ask(directory, server, **sampled, jobs=some) == {key: found[key] for key in some}
    others = ask(directory, server, **{**sampled, "seed": 5})
    assert sum(others[key]["text"] == found[key]["text"] for key in found) < 3


@pytest.mark.parametrize("more", [{}, {"top_p": 0.7}, {"top_k": 3}])
def test_tokens_are_drawn_with_the_probabilities_of_transformers(more: dict[str, float]) -> None:
    torch.manual_seed(1)
    scores = torch.randn(1, 6) * 2
    request = {"temperature": 0.7, "top_p": 1.0, "top_k": 0, **more}
    expected = TemperatureLogitsWarper(0.7)(torch.zeros(1, 1), scores)
    if "top_k" in more:
        expected = TopKLogitsWarper(3)(torch.zeros(1, 1), expected)
    if "top_p" in more:
        expected = TopPLogitsWarper(0.7)(torch.zeros(1, 1), expected)
    num = 4000
    numbers = [np.array([k]) for k in (np.arange(num) + 0.5) / num]
    drawn = Draw(request, 1, numbers)(torch.zeros(num, 1), scores.expand(num, -1)).argmax(-1)
    counts = Counter(drawn.tolist())
    for token, share in enumerate(expected.softmax(-1)[0].tolist()):
        assert counts[token] / num == pytest.approx(share, abs=2 / num)


def test_numbers_belong_to_seed_item_and_sample() -> None:
    first = draw_uniform(1, "a", 0, 5)
    assert np.array_equal(draw_uniform(1, "a", 0, 50)[:5], first)
    others = [draw_uniform(2, "a", 0, 5), draw_uniform(1, "b", 0, 5), draw_uniform(1, "a", 1, 5)]
    assert not any(np.array_equal(first, other) for other in others)


def test_an_answer_ends_at_a_stop_string(directory: Path) -> None:
    whole = ask(directory, temperature=1.0, max_new_tokens=40)["a", 0]
    stop = whole["text"][10:12]
    found = ask(directory, temperature=1.0, max_new_tokens=40, stop=[stop])["a", 0]
    assert found["text"] == whole["text"][: whole["text"].index(stop)]
    assert found["tokens"] < whole["tokens"]
    assert not found["cut_off"]


def test_the_chat_template_is_applied(tmp_path: Path) -> None:
    directory = write_tokenized(tmp_path / "chat", 3, byte_level(TEXTS[0]))
    (directory / "chat_template.jinja").write_text(CHAT)
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "1?"}]
    [answer] = ask(directory, items={"a": messages}, jobs=[("a", 0)], template={"thinks": True}).values()
    assert answer["prompt"] == "[system]Be short.\n[user]1?\n[assistant]<think>"
    assert answer["is_chat"]


def test_a_prompt_longer_than_the_model_takes_is_refused(directory: Path, loaded: Loaded) -> None:
    items = {"a": [{"role": "user", "content": "x" * (loaded.max_positions + 1)}]}
    with pytest.raises(ValueError, match=r"item a has [\d,]+ tokens, and the model takes"):
        ask(directory, items=items, jobs=[("a", 0)])


def test_answers_end_where_the_positions_end(directory: Path, loaded: Loaded) -> None:
    server = Server()
    server.loaded = Loaded(str(directory), "", "auto")
    server.loaded.max_positions = 50
    found = ask(directory, server, temperature=1.0, max_new_tokens=40)
    for name, text in PROMPTS.items():
        room = min(40, 50 - len(loaded.tokenizer.encode(text)))
        assert found[name, 0]["tokens"] <= room
        assert found[name, 0]["cut_off"] == (found[name, 0]["tokens"] == room)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_is_as_asked(directory: Path, dtype: str) -> None:
    assert Loaded(str(directory), "", dtype).model.dtype == getattr(torch, dtype)
