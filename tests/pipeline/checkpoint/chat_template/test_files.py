from __future__ import annotations

import json

import pytest

from raymerge.pipeline.checkpoint.chat_template.files import find_template, find_tokens, remove_template
from raymerge.pipeline.errors import CheckpointError

URL = "org/a/tokenizer_config.json"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("one", "one"),
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ({"default": "d", "rag": "r"}, "d"),
        ([{"name": "rag", "template": "r"}], None),
        (["one", 2], None),
        (3, None),
        (None, None),
    ],
)
def test_templates_in_configs(written: object, expected: str | None) -> None:
    text = json.dumps({"chat_template": written, "a": "ü"})
    assert find_template(text, URL) == expected
    assert json.loads(remove_template(text, URL)) == {"a": "ü"}


def test_a_config_without_one_stays_as_it_is() -> None:
    assert remove_template('{"a":1}', URL) == '{"a":1}'


def test_special_tokens() -> None:
    config = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "lstrip": False},
        "add_bos_token": True,
        "x_token": 1,
    }
    found = find_tokens(json.dumps(config), URL)
    assert found == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "", "pad_token": ""}


@pytest.mark.parametrize("text", ["", "[]", "{" * 300])
def test_what_is_no_config(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"org/a/tokenizer_config\.json: "):
        find_template(text, URL)


def test_half_a_pair_of_surrogates_is_kept_beside_a_template_and_refused_in_one() -> None:
    assert json.loads(remove_template(r'{"chat_template": "a", "b": "\ud800 \ud83d\ude00"}', URL)) == {"b": "\ud800 😀"}
    with pytest.raises(CheckpointError, match="chat_template is not text"):
        find_template(r'{"chat_template": "{{ messages }} \ud800"}', URL)
