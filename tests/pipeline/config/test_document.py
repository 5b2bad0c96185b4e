from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from raymerge.pipeline.config import document
from raymerge.pipeline.config.document import MAX_NBYTES, Document, read_documents
from raymerge.pipeline.errors import ConfigError


def read_one(source: Any) -> Document:
    (document,) = read_documents(source)
    return document


def parse_yaml(text: str) -> dict[str, object]:
    return read_one(text).content


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)
MERGE_BOMB = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: [x, 2.5, true, null]", {"a": 1, "b": ["x", 2.5, True, None]}),
        ("a: 1e-5\nb: 1.0e-5", {"a": "1e-5", "b": 1e-5}),
        ("revision: 2024-05-13", {"revision": "2024-05-13"}),
        ("a: &x {k: 1}\nb: *x\nc: *x", {"a": {"k": 1}, "b": {"k": 1}, "c": {"k": 1}}),
        ("a: &x {k: 1, l: 2}\nb: {<<: *x, k: 3}", {"a": {"k": 1, "l": 2}, "b": {"k": 3, "l": 2}}),
        ("a: !!float 1\nb: !!str 1", {"a": 1.0, "b": "1"}),
        ("---\na: 1\n...\n", {"a": 1}),
        ("\ufeffa: 1", {"a": 1}),
        ("# comment\na: 模型", {"a": "模型"}),
        ('{\n\t"a": [1e-5,\t2],\n\t"b": "c\\td"\n}', {"a": ["1e-5", 2], "b": "c\td"}),
    ],
)
def test_plain_yaml_is_read(text: str, expected: object) -> None:
    assert parse_yaml(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the config is empty"),
        ("# only a comment\n", "the config is empty"),
        ("---\n", "the config is empty"),
        ("~", "line 1.*not an empty document"),
        ("merge", "line 1.*not a single value; there is no file of this name either"),
        ("merge.yml", "cannot read the config merge.yml: No such file"),
        ("dir/Merge.YAML", "cannot read the config dir/Merge.YAML: No such file"),
        ("- a\n- b", "line 1.*not a list"),
        ("a: 1\n---\n- b", "line 3.*not a list"),
        ("a: 1\n---\nb: 2\nb: 3", "line 4.*the key 'b' is there already, on line 3"),
        ("a: 1\nb: [1, 2\nc: 3", "line 3"),
        ("a: 1\n\tb: 2", "line 2"),
        ("a: 1\nb: \x00", "line 2: character #x0000"),
        ("a: !!python/object/apply:os.system [ls]", r"line 1.*the tag !!python/object/apply:os.system is not allowed"),
        ("a: 1\nb: !model x", "line 2.*the tag !model is not allowed"),
        ("a: !!binary aGk=", "the tag !!binary is not allowed"),
        ("a: !!int x", "line 1.*'x' is not a value of its type"),
        ("a: !!map x", "line 1"),
        ("a: 0x_", "line 1.*'0x_' is not a value"),
        pytest.param(f"a: {'9' * 5000}", "line 1.*is not a value", id="huge number"),
        ("a: 1\nb: 2\na: 3", "line 3.*'a' is there already, on line 1"),
        ("m:\n  - k: 1\n    k: 1", "line 3.*'k' is there already, on line 2"),
        ("1: x", "line 1.*a key must be a string"),
        ("yes: x", "a key must be a string"),
        ("? [a, b]\n: x", "a key must be a string"),
        ("a: *nowhere", "line 1.*undefined alias"),
        ("a: 1\nb: &x [1, *x]", "line 2.*an alias refers to what contains it"),
        ("a: &x {k: *x}", "an alias refers to what contains it"),
        ("a: &x {<<: *x}", "an alias refers to what contains it"),
        ("a: {<<: 3}", "line 1"),
        pytest.param(BOMB, "line 5.*more than 50000 values", id="bomb"),
        pytest.param(MERGE_BOMB, "more than 50000 values", id="merge bomb"),
        pytest.param("a: " + "[" * 3000, "nested too deeply", id="deep"),
        pytest.param("a: " + "x" * MAX_NBYTES, "longer than", id="long"),
    ],
)
def test_anything_else_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_yaml(text)


def test_several_documents() -> None:
    text = "---\na: 1\n---\n# nothing\n---\nb: 2\n---\n"
    documents = read_documents(text)
    assert [document.content for document in documents] == [{"a": 1}, {"b": 2}]
    assert {document.text for document in documents} == {text}


def test_values_are_counted_while_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, "MAX_NODES", 100)
    monkeypatch.setattr(yaml.SafeLoader, "construct_document", pytest.fail)
    with pytest.raises(ConfigError, match="line 1, column 296: there are more than 100 values"):
        parse_yaml("a: [" + "1, " * 50_000 + "1]")


def test_a_message_shows_the_first_problems() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml("\n".join(f"{k}: 1" for k in range(80)))
    lines = str(caught.value).splitlines()
    assert (lines[-2:], len(lines)) == (["   50 | 49: 1", "and 30 more"], 101)


def test_aliases_may_be_used_as_long_as_they_stay_small() -> None:
    text = "a: &a [1, 2, 3]\nb: [" + ", ".join(["*a"] * 1000) + "]"
    assert parse_yaml(text)["b"] == [[1, 2, 3]] * 1000


def test_a_file_is_kept_verbatim_and_named_in_messages(tmp_path: Path) -> None:
    path = tmp_path / "merge.yml"
    text = "# mine\na:   'x'  # spaced\n"
    path.write_text(text)
    document = read_one(path)
    assert (document.text, document.content, document.file) == (text, {"a": "x"}, path)
    path.write_text("a: 1\na: 2")
    with pytest.raises(ConfigError, match=r"merge\.yml:2: the key 'a'.*\n    2 \| a: 2$"):
        read_one(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a: 1\nb: \xff", "line 2: not UTF-8"),
        ("a: 1".encode("utf-16"), "line 1: not UTF-8"),
        pytest.param(b"a: " + b"x" * MAX_NBYTES, "larger than 1048576 bytes", id="long"),
    ],
)
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "merge.yml"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        read_one(path)


def test_a_file_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the config .*missing\.yml: No such file"):
        read_one(tmp_path / "missing.yml")
    (tmp_path / "slerp.yml").touch()
    with pytest.raises(ConfigError, match=r"slrp\.yml: No such file or directory; did you mean .*/slerp\.yml\?"):
        read_one(tmp_path / "slrp.yml")
    with pytest.raises(ConfigError, match="cannot read the config"):
        read_one(tmp_path)


def test_a_parsed_config_becomes_text_that_says_the_same() -> None:
    config = {"merge_method": "linear", "list": (1, 2), "number": 1e-05, "text": "1e-5"}
    document = read_one(config)
    assert document.content == {**config, "list": [1, 2]}
    assert list(document.content) == list(config)
    assert parse_yaml(document.text) == document.content


def test_a_parsed_config_that_yaml_cannot_say_is_refused() -> None:
    with pytest.raises(ConfigError, match="YAML cannot say"):
        read_one({"model": Path("x")})
    loop: dict[str, object] = {}
    loop["self"] = loop
    with pytest.raises(ConfigError, match="contains it"):
        read_one(loop)


def test_a_string_that_names_a_file_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("merge.yml", "merge.YAML", "merge.conf", "dir.yml/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a: 1\n")
        assert read_one(name).file == Path(name)
        assert read_one(str(tmp_path / name)).content == {"a": 1}
    assert read_one("a: merge.yml\n").content == {"a": "merge.yml"}
    assert read_one("{a: 1}").file is None


def test_all_of_what_yaml_itself_does_not_mind_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        read_one("a: 1\na: 2\nb: !model x\n3: !!int y\n")
    assert [line.partition(":")[0] for line in str(refused.value).splitlines()[::2]] == [
        "line 2",
        "line 3",
        "line 4",
        "line 4",
    ]


def test_of_a_key_given_twice_the_last_one_is_left_whatever_keys_are() -> None:
    (found,) = read_documents("a: {&k weight: 1, b: 2, *k : 3}\n", last_counts=True)
    assert found.content == {"a": {"weight": 3, "b": 2}}
    assert found.repeated == (("weight: is there already, on line 1; the last one counts", 1),)
    with pytest.raises(ConfigError, match="line 1: a key must be a string"):
        read_documents("? !!str [a]\n: 1\n", last_counts=True)
    with pytest.raises(ConfigError, match="the key '<<' is there already, on line 1; keep one"):
        read_documents("<<: {a: 1}\n<<: {a: 2}\n", last_counts=True)
