"""Mutated configurations, planned on small models, against what mergekit 0.1.5 and PyYAML refuse."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from random import Random
from typing import Any

import yaml

from raymerge import RaymergeError
from raymerge.pipeline import driver
from raymerge.pipeline.checkpoint.dtypes import DTYPE_NAMES
from raymerge.pipeline.plan.report import format_plan, plan_json
from tests.checkpoints import write_llama
from tests.documents import PAGES, ROOT, read_blocks
from tests.fuzz.campaign import Campaign, write
from tests.fuzz.mutation import LAUGHS, NUMBERS, VALUES, YAML_VALUES, dump, mutate, parse_pairs, spoil

NUM_LAYERS = 4
_SHARED = ROOT.parent / "shared/cases/configs"
_FORMS = ("models", "slices", "modules")


class Configs(Campaign[bytes]):
    """Configurations of the repository, its docs, and those that users write, where they are at hand."""

    def __init__(self, directory: Path) -> None:
        self._before = Path.cwd()
        os.chdir(directory)
        self._environ = dict(os.environ)
        os.environ["HF_HUB_OFFLINE"] = "1"
        for k in range(6):
            write_llama(directory / f"m{k}", k, NUM_LAYERS)
        paths = [*sorted((ROOT / "configs").glob("*.y*ml")), *sorted(_SHARED.glob("*.yml"))]
        texts = [path.read_text() for path in paths] + [text for page in PAGES for text in read_blocks(page, "yaml")]
        documents = [document for text in texts for document in yaml.safe_load_all(text)]
        self._seeds = [_adapt(each) for each in documents if isinstance(each, dict) and "merge_method" in str(each)]
        self._path = directory / "merge.yml"
        self._sound = [seed for seed in self._seeds if self._is_sound(seed)]

    def _is_sound(self, seed: dict[str, Any]) -> bool:
        try:
            self.attempt(json.dumps(seed).encode())
        except RaymergeError:
            return False
        return True

    def close(self) -> None:
        os.chdir(self._before)
        os.environ.clear()
        os.environ.update(self._environ)

    def make(self, random: Random) -> bytes:
        seed = random.choice(self._sound if random.random() < 0.7 else self._seeds)
        if random.random() < 0.2:
            lines = yaml.safe_dump(seed, sort_keys=False).splitlines(keepends=True)
            for _ in range(random.randint(1, 3)):
                line, other = random.randrange(len(lines)), random.choice(lines)
                lines[line] = random.choice(["", lines[line] * 2, "  " + lines[line], lines[line][1:], other])
            return spoil("".join(lines), random, 0.5)
        tree = mutate(parse_pairs(json.dumps(seed)), random, YAML_VALUES * 2 + VALUES + NUMBERS)
        return spoil(LAUGHS if random.random() < 0.01 else dump(tree), random, 0.05)

    def attempt(self, case: bytes) -> None:
        write(self._path, case)
        plan = driver.plan(self._path)
        format_plan(plan, verbose=True)
        json.loads(plan_json(plan), parse_constant=_refuse)

    def explain_refusal(self, case: bytes) -> str:
        try:
            content = yaml.load(case.decode(), _Loader)
            return _explain(content)
        except (ValueError, TypeError, yaml.YAMLError) as error:
            return str(error)


class _Loader(yaml.SafeLoader):
    """YAML as mergekit reads it, but that a date is what is written: it is a name here."""


_Loader.add_constructor("tag:yaml.org,2002:timestamp", lambda loader, node: node.value)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _adapt(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config for the small models: their names, and as many layers as they have."""
    names: dict[str, str] = {}
    ranges: list[list[int]] = []

    def walk(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {name: walk(item, name) for name, item in value.items()}
        if key == "layer_range":
            ranges.append(list(value))
            return ranges[-1]
        if isinstance(value, list):
            return [walk(item, "") for item in value]
        is_model = isinstance(value, str) and key in ("model", "base_model", "source_model", "path")
        return names.setdefault(value, f"m{len(names) % 6}") if is_model else value

    adapted = walk(config, "")
    factor = NUM_LAYERS / max([NUM_LAYERS, *(stop for _, stop in ranges)])
    for each in ranges:
        start = math.floor(each[0] * factor)
        each[:] = [start, min(NUM_LAYERS, start + max(1, math.floor((each[1] - each[0]) * factor)))]
    assert isinstance(adapted, dict)
    return adapted


def _explain(config: Any) -> str:
    """Return why mergekit refuses a config, as far as its data go; empty where it does not, or is stricter than we."""
    if not isinstance(config, dict) or not isinstance(config.get("merge_method"), str):
        return "no mapping with a merge_method"
    if len([form for form in _FORMS if config.get(form)]) != 1:
        return "not one of models, slices and modules"
    for key in ("dtype", "out_dtype"):
        if config.get(key) is not None and config[key].removeprefix("torch.") not in (*DTYPE_NAMES, "auto"):
            return f"{key} {config[key]!r}"
    names = [_name(entry["model"]) for entry in config.get("models") or ()]
    if len(set(names)) < len(names):
        return "a model twice"
    for part in (config, *(config.get("models") or ()), *_list_sources(config)):
        for name, value in (part.get("parameters") or {}).items():
            if not _is_setting(value):
                return f"{name}: {value!r}"
    for slices in config.get("slices") or ():
        ranges = [source.get("layer_range", [0, NUM_LAYERS]) for source in slices["sources"]]
        lengths = {stop - start for start, stop in ranges}
        if len(lengths) != 1:
            return "sources of other lengths"
    return ""


def _list_sources(config: dict[str, Any]) -> list[dict[str, Any]]:
    slices = config.get("slices") or ()
    return [*slices, *(source for each in slices for source in each["sources"])]


def _name(model: Any) -> str:
    """Return one name for one model; raises TypeError where it is none."""
    if isinstance(model, dict):
        inner = model["model"] if isinstance(model.get("model"), dict) else {"path": model.get("model")}
        return f"{_name(inner['path'])}@{inner.get('revision') or ''}"
    if not isinstance(model, str) or model.count("+") > 1 or model.count("@") > 2:
        raise TypeError(f"{model!r} is no model")
    return model if "@" in model else f"{model}@"


def _is_setting(value: Any) -> bool:
    if isinstance(value, list):
        kinds = {isinstance(item, dict) for item in value}
        return len(kinds) < 2 and all(map(_is_setting, value))
    if isinstance(value, dict):
        return "value" in value and _is_setting(value["value"]) and isinstance(value.get("filter", ""), str | None)
    return value is None or isinstance(value, bool | int | float | str)
