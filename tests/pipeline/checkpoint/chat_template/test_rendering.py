from __future__ import annotations

import pytest

from raymerge.pipeline.checkpoint.chat_template.builtin import BUILTIN
from raymerge.pipeline.checkpoint.chat_template.rendering import render

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
EXPECTED = {
    "alpaca": "<s>Be brief.\n\n### Instruction:\nWhat is 2 + 2?\n\n### Response:\n4</s>\n\n"
    "### Instruction:\nAnd 3 + 3?\n\n### Response:\n",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n"
    "<|im_start|>assistant\n4<|im_end|>\n<|im_start|>user\nAnd 3 + 3?<|im_end|>\n<|im_start|>assistant\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]What is 2 + 2?\n[|assistant|]4[|endofturn|]\n"
    "[|user|]And 3 + 3?\n[|assistant|]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhat is 2 + 2?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n4<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nAnd 3 + 3?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Be brief.\n\nWhat is 2 + 2? [/INST] 4</s>[INST] And 3 + 3? [/INST]",
}


def test_those_with_a_name() -> None:
    assert {name: render(text, TOKENS).text for name, text in BUILTIN.items()} == EXPECTED


@pytest.mark.parametrize(
    ("template", "problem", "is_fatal"),
    [
        ("{% for m in messages %}", "it is no Jinja: line 1: Unexpected end of template", True),
        ("{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "it is no Jinja: it is nested too deeply", True),
        ("{{ 'a' * 10**10 }}", "it takes more memory than there is for it", True),
        ("{% for i in range(99999) %}{{ 'eleven more' }}{% endfor %}", "it takes more than 1,048,576 characters", True),
        ("{{ raise_exception('no') }}", "it refuses a plain conversation: ValueError: no", False),
        ("{{ ''.__class__.__mro__ }}", "it refuses a plain conversation: SecurityError", False),
        ("{% include '/etc/passwd' %}", "it refuses a plain conversation: TypeError: no loader", False),
        ("{# nothing at all #}", "it makes nothing of a conversation", False),
    ],
)
def test_those_that_do_not_work(template: str, problem: str, is_fatal: bool) -> None:
    rendering = render(template, TOKENS)
    assert rendering.problem.startswith(problem)
    assert rendering.is_fatal == is_fatal


@pytest.mark.slow
def test_loops_end() -> None:
    rendering = render("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", {})
    assert rendering.is_fatal
    assert rendering.problem.startswith("it does not end")


def test_what_transformers_has_besides_jinja() -> None:
    text = "{% generation %}{{ messages | tojson }}{% endgeneration %}{% for m in messages %}{% break %}{% endfor %}"
    assert render(text + "{{ strftime_now('%Y') }}", {}).text.startswith('[{"role": "system", "content": "Be brief."}')


def test_templates_that_want_no_system_message_or_parts_of_a_message() -> None:
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}"
    assert render(refusing, {}).text == "What is 2 + 2?"
    assert render("{{ messages[0]['content'][0]['text'].strip() }}", {}).text == "What is 2 + 2?"
