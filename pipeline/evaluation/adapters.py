"""LoRA adapters as models: each is applied to its base by a merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from raymerge import __version__
from raymerge.pipeline.checkpoint.files import ADAPTER_CONFIG
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.checkpoint.weights import read_json
from raymerge.pipeline.errors import CheckpointError, ConfigError
from raymerge.pipeline.spectrum.places import parse_ref
from raymerge.pipeline.spectrum.record import Point, Spectrum
from raymerge.pipeline.stores.open import Stores

_MAX_NBYTES = 2**20


def find_base(stores: Stores, adapter: str, wanted: str | None) -> ModelRef:
    """Return the model that an adapter goes with: the one that is wanted, or that its config names.

    Args:
        stores: that have it.
        adapter: its directory.
        wanted: the base of all adapters, if the user names one.

    Raises:
        CheckpointError: its config names none, or cannot be read.
        ConfigError: the base is named with an adapter of its own.
    """
    url = f"{adapter}/{ADAPTER_CONFIG}"
    name = wanted or read_json(stores.at(url), url, _MAX_NBYTES).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{url} does not say which model the adapter was trained on; give it as --base")
    base = parse_ref(name)
    if base.adapter is not None:
        raise ConfigError(f"{name}: the base of adapters is a model without an adapter; merge it into one first")
    return base


def plan_sum(name: str, base: ModelRef, adapter: ModelRef) -> tuple[Spectrum, Point]:
    """Return a record with the model that an adapter and its base come to, as a point that is planned.

    Paths count from the current directory, also for a worker that runs in another one.
    """
    point = Point(name, "", {}, _make_config(base, adapter), "", "planned", "")
    return Spectrum(__version__, "", (), (), (point,), started_in=str(Path.cwd())), point


def _make_config(base: ModelRef, adapter: ModelRef) -> str:
    """Return the config of a merge that applies an adapter.

    >>> print(_make_config(ModelRef("org/base"), ModelRef("/a+b")), end="")
    merge_method: passthrough
    models:
    - model:
        model:
          path: org/base
        lora:
          path: /a+b
    """
    model: dict[str, Any] = {"model": _write(base), "lora": _write(adapter)}
    return yaml.safe_dump({"merge_method": "passthrough", "models": [{"model": model}]}, sort_keys=False)


def _write(ref: ModelRef) -> dict[str, str]:
    return {"path": ref.path} | ({"revision": ref.revision} if ref.revision else {})
