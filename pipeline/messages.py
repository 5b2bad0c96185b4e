"""Parts of messages: values, lists of names, counts and suggestions, as people read them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterable


def shown(value: object) -> str:
    """Return a value as messages show it: as YAML would say it, on one line, not too long.

    >>> shown(True), shown(None), shown({"filter": "mlp"})
    ('true', 'nothing', '{"filter": "mlp"}')
    """
    if value is None:
        return "nothing"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def listing(items: Iterable[object], most: int = 3, *, separator: str = ", ") -> str:
    r"""Return the first items, and how many there are besides.

    >>> listing("abc"), listing("abcde"), listing("abcde", 2, separator="\n")
    ('a, b, c', 'a, b, c and 2 more', 'a\nb\nand 3 more')

    Args:
        items: strings, or objects whose `str` is their name.
        most: as many are shown.
        separator: between two items; if it ends a line, how many more there are gets a line of its own.
    """
    names = [str(item) for item in items]
    listed = separator.join(names[:most])
    if len(names) <= most:
        return listed
    return listed + (separator if "\n" in separator else " ") + f"and {len(names) - most:,} more"


def escaped(text: str) -> str:
    r"""Return a name from outside without what a terminal would take for a command, or what is no UTF-8.

    >>> escaped("notes.md"), escaped("a\nb")
    ('notes.md', "'a\\nb'")
    """
    return text if text.isprintable() else ascii(text)


def flag(name: str) -> str:
    """Return an option as the command line has it, by its name in the API.

    >>> flag("best_under_tokens")
    '--best-under-tokens'
    """
    return f"--{name.replace('_', '-')}"


def counted(number: int, noun: str) -> str:
    """Return a number of things.

    >>> counted(1, "shard"), counted(0, "shard"), counted(1200, "tensor")
    ('1 shard', '0 shards', '1,200 tensors')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def find_near(name: str, allowed: Collection[str], cutoff: float = 0.6) -> str | None:
    """Return the name that was probably meant, if there is one.

    >>> find_near("wieght", ["weight", "normalize"]), find_near("base", ["base_model"]), find_near("x", ["y"])
    ('weight', 'base_model', None)
    """
    near = difflib.get_close_matches(name.lower(), allowed, n=1, cutoff=cutoff)
    if not near and len(name) > 3:
        near = [other for other in allowed if name.lower() in other or (len(other) > 3 and other in name.lower())]
    return near[0] if near else None


def suggest(name: str, allowed: Collection[str], cutoff: float = 0.6) -> str:
    """Return advice on a name that is not among the allowed ones.

    >>> suggest("wieght", ["weight", "normalize"])
    "did you mean 'weight'? Allowed: weight, normalize"
    >>> suggest("bogus", [])
    'nothing is allowed here; remove it'
    """
    if not allowed:
        return "nothing is allowed here; remove it"
    near = find_near(name, allowed, cutoff)
    question = f"did you mean {near!r}? " if near else ""
    return f"{question}Allowed: {', '.join(allowed)}"
