"""Several documents: which uses which, and what cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from raymerge.pipeline.config.merge_config import MergeConfig
from raymerge.pipeline.config.reader import load_config
from raymerge.pipeline.errors import ConfigError


def write(*documents: tuple[str | None, str]) -> str:
    """Return the YAML of documents, each with its name and the models that it uses."""
    texts = []
    for name, models in documents:
        entries = "".join(f"- model: {model}\n" for model in models.split())
        texts.append((f"name: {name}\n" if name else "") + "merge_method: karcher\nmodels:\n" + entries)
    return "---\n".join(texts)


def load(*documents: tuple[str | None, str], strict: bool = True) -> MergeConfig:
    return load_config(write(*documents), strict=strict)


def test_documents_come_before_those_that_use_them() -> None:
    config = load((None, "c org/x"), ("c", "b a org/z"), ("a", "org/x org/y"), ("b", "a org/y"))
    assert [step.name for step in config.steps] == ["a", "b", "c"]
    assert [str(model) for model in config.referenced_models] == ["c", "org/x"]
    assert [str(model) for model in config.input_models] == ["org/x", "org/y", "org/z"]
    assert "karcher" in config.text
    assert config.text.count("---") == 3


def test_the_output_is_the_document_that_no_other_uses() -> None:
    config = load(("b", "a org/z"), ("a", "org/x org/y"))
    assert (config.name, [step.name for step in config.steps]) == ("b", ["a"])


def test_a_document_that_nobody_uses() -> None:
    config = load(("a", "org/x"), ("b", "org/y"), (None, "a org/z"), strict=False)
    assert [step.name for step in config.steps] == ["a"]
    assert config.warnings == ("line 6: b: no document uses it, so it is not made",)


def test_a_single_document_does_not_use_itself() -> None:
    assert load(("org/a", "org/a org/b")).steps == ()


@pytest.mark.parametrize(
    ("documents", "told"),
    [
        (
            [("a", "b org/x"), ("b", "a org/y"), (None, "a org/z")],
            ["line 4: models[0].model: a uses b", "line 10: models[0].model: b uses a", "made of itself"],
        ),
        ([("a", "org/x a"), (None, "a org/z")], ["line 5: models[1].model: a uses a"]),
        (
            [("a", "org/x"), ("a", "org/y"), (None, "a org/z")],
            ["line 1: a document is called 'a'", "line 6: and so is this one; rename one"],
        ),
        (
            [(None, "org/x"), ("a", "org/y"), (None, "a org/z")],
            ["line 1: a document without a name is the output", "line 10: a document without a name"],
        ),
        (
            [("a", "org/x"), ("b", "org/y")],
            ["line 1: no document uses a", "line 6: no document uses b", "only one can be the output"],
        ),
        ([("step1", "org/x"), (None, "stpe1 org/z")], ["'stpe1' is no document, nor a directory", "mean 'step1'?"]),
        ([("a", "org/x"), (None, f"{'a' * 5000} org/z")], ["line 8: models[0].model: 'aaa", "aa' is no document"]),
        ([("a", "org/x"), (None, "a@main org/z")], ["line 8: models[0].model: a is a document, and has no revisions"]),
        ([("a", "org/x"), (None, "a+org/lora org/z")], ["line 8: models[0].model: an adapter for the output of a is"]),
        ([("a", "org/x org/x"), (None, "a b org/z")], ["line 5: models[1].model: org/x is listed already"]),
    ],
)
def test_what_cannot_be(documents: list[tuple[str | None, str]], told: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        load(*documents)
    for part in told:
        assert part in str(refused.value)


def test_the_mistakes_of_all_documents_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "merge.yml"
    path.write_text(write(("a", "org/x"), (None, "a org/z")).replace("karcher", "karhcer"))
    with pytest.raises(ConfigError) as refused:
        load_config(path)
    assert [line.partition(": ")[0] for line in str(refused.value).splitlines()[::2]] == [f"{path}:2", f"{path}:6"]
    path.write_text(path.read_text().replace("merge_method: karhcer", "dtype: bf16"))
    with pytest.raises(ConfigError) as refused:
        load_config(path)
    assert [line.partition(": ")[0] for line in str(refused.value).splitlines()[::2]] == [f"{path}:1", f"{path}:6"]
