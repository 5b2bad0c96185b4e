"""Trials as text for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_SHARES = ("accuracy", "thinking", "cut_off")


def format_settings(settings: Mapping[str, object]) -> str:
    """Return the values of paths on a line.

    >>> format_settings({"t": 0.25, "merge_method": "ties"})
    't 0.25, merge_method ties'
    """
    return ", ".join(
        f"{path} {value:g}" if isinstance(value, float) else f"{path} {value}" for path, value in settings.items()
    )


def format_values(names: Sequence[str], values: Sequence[float]) -> str:
    """Return the values of objectives on a line.

    >>> format_values(["accuracy", "tokens"], [0.5, 31.25])
    'accuracy 50.0%, tokens 31.2'
    """
    return ", ".join(
        f"{name} {value:.1%}"
        if name in _SHARES
        else f"{name} {value:,.4g}"
        if name == "loss"
        else f"{name} {value:,.1f}"
        for name, value in zip(names, values, strict=True)
    )
