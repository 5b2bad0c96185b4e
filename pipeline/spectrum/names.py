"""Names of points: valid as directories, keys of a bucket and parts of a Hub repository's name."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from raymerge.pipeline.config.sections.sweep import MAX_NAME_LENGTH, NAME
from raymerge.pipeline.errors import ConfigError

_MAX_VALUE_LENGTH = 24
_RESERVED = ("evaluations", "curve", "spectrum")
"""Files and directories beside the models."""


def name_settings(settings: Sequence[Mapping[str, object]]) -> list[str]:
    """Return a name for each point of a grid, which follows from its own settings alone wherever these tell it apart.

    >>> name_settings([{"t": 0.1}, {"t": 0.2}]), name_settings([{"density": 0.3, "weight1": -1.0}])
    (['t-0.1', 't-0.2'], ['density-0.3_weight1-neg1'])
    >>> name_settings([{"t": [0, 0.5, 1]}, {"base_model": "org/a.b"}, {"merge_method": "ties", "density": 0.5}])
    ['t-0_0.5_1', 'base_model-a.b', 'ties_density-0.5']

    Args:
        settings: of each point, its value for each path by the path's label.
    """
    names = ["_".join(_name_setting(label, value) for label, value in each.items()) for each in settings]
    counts = Counter(name.casefold() for name in names)
    return [
        name if counts[name.casefold()] == 1 and len(name) <= MAX_NAME_LENGTH else _shorten(name, each)
        for name, each in zip(names, settings, strict=True)
    ]


def check_name(where: str, name: str) -> None:
    """Refuse a name of a point that no directory, key or repository can have everywhere.

    Raises:
        ConfigError: saying what a name may consist of.
    """
    if len(name) > MAX_NAME_LENGTH or not re.fullmatch(NAME, name):
        raise ConfigError(
            f"{where}: {name!r} cannot name a model; a name has at most {MAX_NAME_LENGTH} letters, digits, `-`, `_` and"
            " `.`, and begins and ends with a letter or digit"
        )
    if "--" in name or ".." in name:
        raise ConfigError(f"{where}: {name!r} has `--` or `..`, which the Hub refuses; write one of them")
    if name.partition(".")[0].casefold() in _RESERVED:
        raise ConfigError(f"{where}: {name!r} is kept for what lies beside the models; choose another name")


def name_models(models: Sequence[str], taken: Collection[str]) -> list[str]:
    """Return a short name for each model: the last part of its path, with a number where others are called that.

    >>> name_models(["org/think", "/data/think/", "org/answer@main"], ["answer"])
    ['think', 'think-2', 'answer-2']
    """
    used = {name.casefold() for name in taken}
    names = []
    for model in models:
        short = _clean(model.partition("@")[0].rstrip("/").rpartition("/")[2])
        numbered = (f"{short}-{k}" for k in itertools.count(2))
        name = next(each for each in itertools.chain([short], numbered) if each.casefold() not in used)
        used.add(name.casefold())
        names.append(name)
    return names


def _name_setting(label: str, value: object) -> str:
    name = _name_value(value)
    return name if label == "merge_method" else f"{_clean(label)}-{name}"


def _name_value(value: object) -> str:
    text = _write(value)
    if len(text) <= _MAX_VALUE_LENGTH:
        return text
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def _write(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        text = f"{abs(value):.15g}".replace("e-", "em").replace("e+", "e")
        return f"neg{text}" if value < 0 else text
    if isinstance(value, list):
        return "_".join(map(_write, value)) or "empty"
    if isinstance(value, str):
        return _clean(value.partition("@")[0].rstrip("/").rpartition("/")[2])
    return _clean(json.dumps(value, sort_keys=True))


def _clean(text: str) -> str:
    """Return a text with nothing in it that names may not have.

    >>> _clean("regex:[13].mlp"), _clean("--")
    ('regex-13-.mlp', 'x')
    """
    text = re.sub(r"[^A-Za-z0-9._-]+", "-", text)
    text = re.sub(r"\.{2,}", ".", re.sub(r"-{2,}", "-", text))
    return text.strip("._-") or "x"


def _shorten(name: str, settings: Mapping[str, object]) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return f"{name[: MAX_NAME_LENGTH - 9].strip('._-')}-{digest}"
