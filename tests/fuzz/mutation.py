"""Mutations of JSON and YAML that know its structure: a tree is changed here and there, then written as text."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

DEPTHS = (100, 300, 450, 900, 980, 10_000)
"""Of nested values: some may be read by one parser, and be too deep for what comes after it."""


class Raw(str):
    """A value that is written as it is, whether it is one or not."""

    __slots__ = ()


class Pairs(list[tuple[Any, Any]]):
    """A mapping, in which a key may be there twice."""


NUMBERS = (
    "-0", "-0.0", "0.0", "1e0", "1E400", "-1E400", "1e-400", "NaN", "Infinity", "-Infinity", "007", "-01", "+1", "1.",
    ".5", "0x10", "1_000", "-1", "-4", "2147483648", "4294967296", "9007199254740993", "9223372036854775807",
    "9223372036854775808", "18446744073709551615", "18446744073709551616", "18446744073709551620", "9" * 5000,
    "1" + "0" * 400, "1.0", "4.0", "3.5", "1e2",
)  # fmt: skip
VALUES = (
    "null", "true", "false", "nul", "True", "[]", "{}", "[[]]", "[{}]", '{"":{}}', '""', '" "', '"\\ud800"',
    '"\\ud83d\\ude00"', '"\\u0000"', '"a\\u0000b"', '"\\x"', '"\t"', '"\x7f\x1b[31m"', '"../../x"', '"/etc/passwd"',
    '"' + "a" * 300 + '"', '"a/b/../c"', '"~"', '"\u202e"', '"é\U0001f600"', "'x'", '"NaN"', '"0"', '"1e400"', "5",
    '"hf_abcdefgh12345678"', '{"a":1,"a":2}', "[1,2,3]", '["a",["b"]]', "//x", "/**/", ",", ":", '"',
)  # fmt: skip
HUGE = (
    *("[" * depth + "]" * depth for depth in DEPTHS), *('{"a":' * depth + "1" + "}" * depth for depth in DEPTHS),
    "[" * 9999, '"' + "x" * 300_000 + '"', "[" + "0," * 20_000 + "0]",
    "{" + ",".join(f'"{k}":{k}' for k in range(5000)) + "}",
)  # fmt: skip
YAML_VALUES = (
    "&a [*a]", "*missing", "&a {<<: *a}", "{<<: 5}", "{<<: [{a: 1}, {b: 2}]}", "!!python/object/apply:os.system [ls]",
    "!!binary aGk=", "!!set {a}", "!!timestamp 2001-01-01", "2001-01-01", "!!float abc", "!!int x", "0o17", "017",
    "0b1", "0b", "190:20:30", "~", "yes", "off", ".inf", "-.inf", ".nan", "=", "<<", "? [a]", "{? [a] : b}", "{yes: 1}",
    "{1: 2}", "{null: 1}", "{2001-01-01: 1}", "!x y", "!<tag:yaml.org,2002:str> 5", "%x", "@x", "`x", "\ud800",
    "|\n x", ">-\n x", "# x", "--- 1", "...", "\t", "1e-5", "1_0.5", "'it''s'", '"\\N"', "[a, b]: c", "{a: b: c}",
    "m0@", "@main", "m0+m1", "m0+", "m0@a@b", "http://[::1", "m1", "m0@main", "hf://m0", "s3://", "file:///", "/",
    "~/x", "regex:(", "regex:(a+)+$", "regex:\\1", "glob:[", "{filter: regex:(?=x), value: 1}", "[0, 1]", "[8, 0]",
    "[0, 8]", "[0, 0.5, 1]", "[{filter: mlp, value: 1}, 2]", "[{value: [0, 1]}]", "{filter: mlp}", "linear", "slerp",
    "ties", "{model: {path: m1, revision: 5}}", "{model: m1, lora: m2}", "float32", "bf16", "torch.float16", "int64",
)  # fmt: skip
LAUGHS = "{" + ", ".join(f"k{i}: &k{i} [{', '.join([f'*k{i - 1}' if i else 'ha'] * 9)}]" for i in range(9)) + "}"


def parse_pairs(text: str | bytes) -> Any:
    """Return JSON as a tree to mutate."""
    return json.loads(text, object_pairs_hook=Pairs)


def dump(tree: Any, ensure_ascii: bool = True) -> str:
    """Return a tree as JSON, or as YAML in braces."""
    if isinstance(tree, Raw):
        return tree
    if isinstance(tree, Pairs):
        items = (f"{key if isinstance(key, Raw) else json.dumps(key)}: {dump(value)}" for key, value in tree)
        return "{" + ", ".join(items) + "}"
    if isinstance(tree, list):
        return "[" + ", ".join(map(dump, tree)) + "]"
    return json.dumps(tree)


def mutate(tree: Any, random: Random, values: tuple[str, ...] = VALUES + NUMBERS, most: int = 3) -> Any:
    """Return a copy of a tree, changed in one to a few places."""
    tree = _copy(tree)
    for _ in range(random.choice([1] * 3 + list(range(2, most + 1)))):
        nodes = list(_list_nodes(tree))
        if not nodes:
            return _change(tree, tree, random, values)
        parent, position = random.choice(nodes)
        _mutate_at(parent, position, random, [each for each, _ in nodes], values)
    return tree


def _mutate_at(parent: Any, position: int, random: Random, others: list[Any], values: tuple[str, ...]) -> None:
    item = parent[position]
    key, value = item if isinstance(parent, Pairs) else (None, item)

    def put(changed: Any, name: Any = key) -> None:
        parent[position] = (name, changed) if isinstance(parent, Pairs) else changed

    kind = random.random()
    if kind < 0.55:
        put(_change(value, random.choice(others), random, values))
    elif kind < 0.65:
        del parent[position]
    elif kind < 0.75:
        parent.insert(random.randint(0, len(parent)), item)
    elif kind < 0.85 and len(parent) > 1:
        other = random.randrange(len(parent))
        if isinstance(parent, Pairs):
            put(parent[other][1])
        else:
            parent[position], parent[other] = parent[other], parent[position]
    elif isinstance(parent, Pairs):
        put(value, random.choice([_edit(str(key), random), Raw(random.choice(values)), random.choice(others[0])[0]])
            if isinstance(others[0], Pairs) and others[0] else _edit(str(key), random))  # fmt: skip
    else:
        put([value])


def _change(value: Any, other: Any, random: Random, values: tuple[str, ...]) -> Any:
    kind = random.random()
    if kind < 0.3 and type(value) in (int, float):
        return random.choice([value + 1, value - 1, -value, value * 2, float(value), str(value), Raw(f"-{value}")])
    if kind < 0.3 and isinstance(value, str):
        return _edit(value, random)
    if kind < 0.4:
        return _copy(other)
    if kind < 0.41:
        return Raw(random.choice(HUGE))
    if kind < 0.6:
        return Raw(random.choice(NUMBERS))
    return Raw(random.choice(values))


def _edit(text: str, random: Random) -> str:
    position = random.randint(0, len(text))
    sign = random.choice(["", "\0", " ", "/", ".", "é", "\U0001f600", "\ud800", "\x1b", "\n", "*", "@", "+", ":"])
    changes: list[Callable[[], str]] = [
        lambda: text[:position] + sign + text[position + (sign == "") :],
        lambda: text.swapcase(),
        lambda: text * 2,
        lambda: text[:position],
    ]
    return random.choice(changes)()


def _list_nodes(tree: Any) -> list[tuple[Any, int]]:
    """Return every place of a tree, as list and position in it."""
    found: list[tuple[Any, int]] = []
    todo = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, list):
            found += [(node, position) for position in range(len(node))]
            todo += [item[1] for item in node] if isinstance(node, Pairs) else node
    return found


def _copy(tree: Any) -> Any:
    if isinstance(tree, Pairs):
        return Pairs((key, _copy(value)) for key, value in tree)
    return [_copy(item) for item in tree] if isinstance(tree, list) else tree


def spoil(text: str, random: Random, share: float = 0.15) -> bytes:
    """Return text as bytes; a share of it damaged as text."""
    content = text.encode("utf-8", "surrogatepass")
    if random.random() >= share:
        return content
    position = random.randint(0, len(content))
    changes: list[Callable[[], bytes]] = [
        lambda: b"\xef\xbb\xbf" + content,
        lambda: text.encode("utf-16", "surrogatepass"),
        lambda: content[:position],
        lambda: (
            content[:position] + random.choice([b"\0", b"\xff", b"\xed\xa0\x80", b"\t", b"\n"]) + content[position:]
        ),
        lambda: content + random.choice([b"\0", b" ", b"\n", b"x", b"{}", b"\x1a"]),
        lambda: random.choice([b" ", b"\n\r\t", b"\x0c", b"\xc2\xa0", b"#"]) + content,
        lambda: bytes([*content[:position], random.randrange(256), *content[position + 1 :]]),
        lambda: content[position:],
        lambda: content.replace(b'"', b"'"),
        lambda: b"",
    ]
    return random.choice(changes)()
