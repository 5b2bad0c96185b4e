"""Models of every architecture that transformers can make without a download: merged, stacked, pruned, and loaded."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.models.auto import modeling_auto
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as ARCHITECTURES

from raymerge import RaymergeError, merge
from raymerge.pipeline.progress.events import Event, Warned
from tests.architectures import load, make_config

MAX_PARAMETERS = 3_000_000
NUM_PARTS = 12
"""Each takes a minute or less on a slow machine."""
ENOUGH = 9
"""Causal models of each part that these sizes make small ones of: 159 in all with transformers 5.23.

The others want sizes that fit together otherwise, or packages that are not here. There are no further exceptions.
"""
ENOUGH_OTHERS = 14
"""The same of multimodal models, encoder-decoders and bare ones: 260 in all, 97 of them for conditional generation."""


def list_causal() -> list[str]:
    return list(dict.fromkeys(names if isinstance(names, str) else names[0] for names in ARCHITECTURES.values()))


def list_small(names: Iterable[str]) -> list[Any]:
    return [kind for kind in (getattr(transformers, name) for name in names) if is_small(kind)]


def is_small(kind: Any) -> bool:
    """Tell whether a class takes these sizes and makes a small model of them, with the packages that are here."""
    try:
        with torch.device("meta"):
            model = kind(make_config(kind.config_class))
    except Exception:  # of any kind
        return False
    return bool(sum(parameter.numel() for parameter in model.parameters()) < MAX_PARAMETERS)


def list_others() -> list[str]:
    """Return multimodal and encoder-decoder classes, and bare models of what has none of these and no causal one."""
    names: dict[str, str] = {}
    for table, content in vars(modeling_auto).items():
        if table.startswith("MODEL") and table.endswith("MAPPING_NAMES"):
            for kind, found in content.items():
                names |= dict.fromkeys([found] if isinstance(found, str) else found, kind)
    whole = {name: kind for name, kind in names.items() if name.endswith("ForConditionalGeneration")}
    covered = {*whole.values(), *ARCHITECTURES}
    bare = [name for name, kind in names.items() if name.endswith("Model") and kind not in covered]
    return [name for name in (*whole, *bare) if hasattr(transformers, name)]


def check_whole_merges(kind: Any, directory: Path) -> None:
    """Merge a model with itself, and make sure that it is the same model."""
    model, said = load(kind, directory / "a")
    expected = model.state_dict()
    shutil.copytree(directory / "a", directory / "b")
    models = [{"model": str(directory / name)} for name in ("a", "b")]
    for method, more in (("linear", {"weight": 1}), ("slerp", {"t": 0.5})):
        base = {"base_model": models[0]["model"]} if method == "slerp" else {}
        merge({"merge_method": method, "models": models, "parameters": more, **base}, directory / method, workers=1)
    merged, said_of_merged = load(kind, directory / "linear")
    assert said_of_merged == said
    assert_same(merged.state_dict(), expected)
    assert_same(*(load_file(directory / method / "model.safetensors") for method in ("slerp", "linear")))


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, x in found.items() if not torch.equal(x, expected[name])] == []


def check_stacks(kind: Any, directory: Path) -> None:
    """Stack and prune a model's layers: what transformers then loads is whole, or else there was a warning."""
    _, said = load(kind, directory / "a")
    for name, ranges in (("stack", ([0, 2], [1, 4])), ("prune", ([0, 1], [3, 4]))):
        slices = [{"sources": [{"model": str(directory / "a"), "layer_range": each}]} for each in ranges]
        told: list[Event] = []
        try:
            merge({"merge_method": "passthrough", "slices": slices}, directory / name, workers=1, on_event=told.append)
        except RaymergeError:
            continue
        if any(isinstance(event, Warned) for event in told):
            continue
        assert load(kind, directory / name)[1] == said, name


def check_all(kinds: Iterable[Any], checks: Iterable[Callable[[Any, Path], None]], directory: Path) -> list[str]:
    """Return what is wrong, of all classes."""
    problems = []
    for kind in kinds:
        torch.manual_seed(1)
        kind(make_config(kind.config_class)).save_pretrained(directory / "a")
        for check in checks:
            try:
                check(kind, directory)
            except Exception as error:  # of any kind: every architecture is to be tried
                problems.append(f"{kind.__name__}, {check.__name__}: {type(error).__name__}: {str(error)[:500]}")
        shutil.rmtree(directory)
    return problems


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_every_causal_language_model(part: int, tmp_path: Path) -> None:
    kinds = list_small(list_causal()[part::NUM_PARTS])
    assert len(kinds) >= ENOUGH
    assert check_all(kinds, (check_whole_merges, check_stacks), tmp_path / "models") == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_multimodal_models_encoder_decoders_and_bare_ones(part: int, tmp_path: Path) -> None:
    kinds = list_small(list_others()[part::NUM_PARTS])
    assert len(kinds) >= ENOUGH_OTHERS
    assert check_all(kinds, (check_whole_merges,), tmp_path / "models") == []
