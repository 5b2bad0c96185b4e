"""LoRA adapters and spectra of them, evaluated with their base."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import raymerge
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.errors import CheckpointError, ConfigError
from raymerge.pipeline.evaluation.adapters import plan_sum
from raymerge.pipeline.evaluation.events import Evaluated, EvaluationEvent
from raymerge.pipeline.evaluation.results import Evaluation
from raymerge.pipeline.spectrum.materialise import materialised
from tests.adapters import draw_factors, write_adapter
from tests.checkpoints import read_files
from tests.tokenized_models import TEXTS, byte_level, write_tokenized

SCRIPT = """
import hashlib, json, pathlib, sys
content = b"".join(path.read_bytes() for path in sorted(pathlib.Path(sys.argv[1]).glob("*.safetensors")))
with open("calls.txt", "a") as calls:
    print(sys.argv[1], file=calls)
print(json.dumps({"accuracy": 0.5, "tokens": 3, "sum": int(hashlib.sha256(content).hexdigest()[:8], 16)}))
"""
MODULE = "model.layers.0.mlp.up_proj"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a base and two adapters for it, which name it by a relative path, and go there."""
    monkeypatch.chdir(tmp_path)
    write_tokenized(tmp_path / "base", 0, byte_level(TEXTS[0]))
    for seed, name in enumerate("ab"):
        factors = draw_factors(MODULE, 32, 16, seed=seed)
        write_adapter(tmp_path / name, factors, base_model_name_or_path="base")
    (tmp_path / "sum.py").write_text(SCRIPT)
    return tmp_path


def sweep_adapters(**options: str) -> raymerge.SweepReport:
    models = [{"model": each, "parameters": {"weight": 0.5}} for each in "ab"]
    config = {"merge_method": "task_arithmetic", "adapter": {}, "models": models}
    return raymerge.sweep(config, "s", ["weight[0]=0.5,1"], **options)  # type: ignore[arg-type]


def evaluate(*models: str, events: list[EvaluationEvent] | None = None, **options: str) -> list[Evaluation]:
    told = [] if events is None else events
    task = f"command:{sys.executable} -S -E sum.py {{model}}"
    return raymerge.evaluate(models, task, on_event=told.append, **options)  # type: ignore[arg-type]


def hash_weights(model: str) -> float:
    import hashlib

    return int(hashlib.sha256(read_files(Path(model))["model.safetensors"]).hexdigest()[:8], 16)


def test_a_spectrum_of_adapters_is_evaluated_and_drawn(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep_adapters()
    found = {each.model: each for each in evaluate("s")}
    assert list(found) == ["weight0-0.5", "weight0-1", "a", "b"]
    assert [each.state for each in found.values()] == ["complete"] * 4, found
    for name, adapter in (("weight0-1", "s/weight0-1"), ("a", "a")):
        raymerge.merge({"merge_method": "passthrough", "models": [{"model": f"base+{adapter}"}]}, f"out-{name}")
        assert found[name].other["sum"] == hash_weights(f"out-{name}")
    events: list[EvaluationEvent] = []
    monkeypatch.chdir(place / "s")
    (place / "s" / "sum.py").write_text(SCRIPT)
    again = evaluate(str(place / "s"), events=events)
    assert [each.digest for each in again] == [each.digest for each in found.values()], "known before they are merged"
    assert all(event.is_cached for event in events if isinstance(event, Evaluated))
    curve = raymerge.curve(place / "s")
    assert [model.name for model in curve.models if model.name in curve.views[0].scores] == list(found)


def test_a_worker_elsewhere_finds_base_and_adapter(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, point = plan_sum("x", ModelRef("base"), ModelRef("a"))
    monkeypatch.chdir(place / "a")
    with materialised("", record, point) as directory:
        assert (Path(directory) / "model.safetensors").exists()


def test_planned_adapters(place: Path) -> None:
    sweep_adapters(materialize="none")
    planned = evaluate("s")
    sweep_adapters()
    assert [each.state for each in planned] == ["complete"] * 4, planned[0].error
    assert [each.other["sum"] for each in evaluate("s")] == [each.other["sum"] for each in planned]


@pytest.mark.parametrize("base", [None, "base"])
def test_planned_adapters_are_evaluated_again_with_another_base(place: Path, base: str | None) -> None:
    options: dict[str, Any] = {} if base is None else {"base": base}
    sweep_adapters(materialize="none")
    events: list[EvaluationEvent] = []
    before = evaluate("s", **options)
    assert evaluate("s", events=events, **options) == before
    assert all(event.is_cached for event in events if isinstance(event, Evaluated)), "known before they are merged"
    write_tokenized(place / "base", 5, byte_level(TEXTS[0]))
    after = evaluate("s", **options)
    assert [each.state for each in after] == ["complete"] * 4, after[0].error
    assert not {each.other["sum"] for each in after} & {each.other["sum"] for each in before}
    assert not {each.digest for each in after} & {each.digest for each in before}


def test_the_base_of_adapters_can_be_named(place: Path) -> None:
    write_adapter(place / "c", draw_factors(MODULE, 32, 16), base_model_name_or_path="/gone/base/of/it")
    write_adapter(place / "d", draw_factors(MODULE, 32, 16), base_model_name_or_path=None)
    with pytest.raises(CheckpointError, match=r"c: a LoRA adapter, .* names a base that is not here: .*--base"):
        evaluate("c")
    with pytest.raises(CheckpointError, match=r"adapter_config.json does not say which model .*--base"):
        evaluate("d")
    with pytest.raises(ConfigError, match=r"base\+a: the base of adapters is a model without an adapter"):
        evaluate("d", base="base+a")
    (found,) = evaluate("d", base="base")
    assert found.state == "complete", found.error


def test_adapters_whose_base_is_gone_are_marked(place: Path) -> None:
    sweep_adapters()
    (place / "base").rename(place / "other")
    found = evaluate("s")
    assert [each.state for each in found] == ["failed"] * 4
    assert "names a base that is not here" in found[0].error
    assert [each.state for each in evaluate("s", base="other")] == ["complete"] * 4
