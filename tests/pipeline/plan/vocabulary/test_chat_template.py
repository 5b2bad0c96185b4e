"""The chat template of an output, in the files that loaders read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raymerge import merge, plan
from raymerge.pipeline.checkpoint.chat_template.builtin import BUILTIN
from raymerge.pipeline.errors import ConfigError
from tests.checkpoints import write_llama
from tests.tokenized_models import TEXTS, byte_level, write_tokenized

TEMPLATES = [f"{name} {{% for m in messages %}}{{{{ m['content'] }}}}{{% endfor %}}" for name in "abc"]


def write_models(directory: Path, *templates: str | None) -> list[str]:
    """Write a model for each template: the first in chat_template.jinja, the others in tokenizer_config.json."""
    models = [write_llama(directory / f"model{k}", k, num_layers=1) for k in range(len(templates))]
    for k, (model, template) in enumerate(zip(models, templates, strict=True)):
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
        if template is not None and k == 0:
            (model / "chat_template.jinja").write_text(template)
            config["chat_template"] = "stale: transformers reads the file"
        elif template is not None:
            config["chat_template"] = template
        (model / "tokenizer_config.json").write_text(json.dumps(config))
    return [str(model) for model in models]


def linear(models: list[str], template: str) -> dict[str, Any]:
    entries = [{"model": model} for model in models]
    return {"merge_method": "linear", "models": entries, "parameters": {"weight": 1}, "chat_template": template}


def test_one_with_a_name_takes_the_place_of_all_others(tmp_path: Path) -> None:
    models = write_models(tmp_path, TEMPLATES[0], None)
    donor = Path(models[0])
    (donor / "chat_template.json").write_text(json.dumps({"chat_template": "stale"}))
    (donor / "additional_chat_templates").mkdir()
    (donor / "additional_chat_templates" / "rag.jinja").write_text("stale")
    out = tmp_path / "out"
    report = merge(linear(models, "chatml"), out, workers=1)
    assert report.warnings == ()
    assert (out / "chat_template.jinja").read_text() == BUILTIN["chatml"]
    assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())
    assert not (out / "chat_template.json").exists()
    assert not (out / "additional_chat_templates").exists()
    assert plan(linear(models, "chatml")).notes == (
        "chat_template: chatml",
        "chat_template: it takes the place of additional_chat_templates/rag.jinja, too",
    )


def test_auto_is_what_most_models_have(tmp_path: Path) -> None:
    a, b, c = TEMPLATES
    models = write_models(tmp_path, a, b, f"\n{b}\n", None, c)
    out = tmp_path / "out"
    merge(linear(models, "auto"), out, workers=1)
    assert (out / "chat_template.jinja").read_text() == b
    assert plan(linear(models, "auto")).notes == (f"chat_template: that of {models[1]}, which 2 of 5 models have",)


def test_auto_goes_by_the_order_of_models_where_several_are_as_common(tmp_path: Path) -> None:
    models = write_models(tmp_path, TEMPLATES[0], TEMPLATES[1])
    made = plan(linear(models, "auto"))
    assert made.notes == (f"chat_template: that of {models[0]}, which 1 of 2 models have",)
    assert made.outputs[0].side_files == plan({**linear(models, "auto"), "chat_template": None}).outputs[0].side_files
    base_second = {**linear(models, "auto"), "base_model": models[1]}
    assert plan(base_second).notes == (f"chat_template: that of {models[1]}, which 1 of 2 models have",)


def test_auto_where_no_model_has_one(tmp_path: Path) -> None:
    models = write_models(tmp_path, None, None)
    assert plan(linear(models, "auto")).warnings == ("chat_template: auto, and no model has one; the output gets none",)


def test_text_of_the_config_decides_the_fingerprint(tmp_path: Path) -> None:
    models = write_models(tmp_path, None, None)
    one, other = (plan(linear(models, template)) for template in TEMPLATES[:2])
    assert one.notes == ("chat_template: the config's",)
    assert one.fingerprint != other.fingerprint


def test_what_does_not_work_is_refused_before_anything_runs(tmp_path: Path) -> None:
    only_tools = "{{ raise_exception('only tools') }}"
    models = write_models(tmp_path, None, "{% for", only_tools)
    with pytest.raises(ConfigError, match=r"chat_template \(the config's\): it is no Jinja: line 2: "):
        plan(linear(models, "{% for m in messages %}\n{{ m['content'] }"))
    with pytest.raises(ConfigError, match=r"the config's\): it refuses a plain conversation: UndefinedError"):
        plan(linear(models, "{{ messages[0]['content'] + nobody.knows }}"))
    with pytest.raises(ConfigError, match=r"that of .*model1\): it is no Jinja: line 1: .*leave chat_template out"):
        plan(linear(models[:2], "auto"))
    (warning,) = plan(linear([models[0], models[2]], "auto")).warnings
    assert "it refuses a plain conversation: ValueError: only tools" in warning


def test_marks_of_turns_that_are_no_tokens(tmp_path: Path) -> None:
    tokenizer = byte_level(TEXTS[0], 270)
    tokenizer.add_special_tokens(["<|im_end|>"])
    config = linear([str(write_tokenized(tmp_path / "a", 0, tokenizer))], "chatml")
    assert plan(config).warnings == (
        "chat_template (chatml): <|im_start|>: no tokens of the output's tokenizer, which takes them apart like other"
        " text; add them under `tokenizer.tokens`, or choose another template",
    )
    added = {"source": "base", "tokens": {"<|im_start|>": {"source": {"kind": "zero"}}}}
    assert plan({**config, "tokenizer": added}).warnings == ()
    assert plan({**config, "chat_template": "mistral"}).warnings == ()
    (warning,) = plan({**config, "chat_template": "exaone"}).warnings
    assert "[|system|], [|endofturn|], [|user|], [|assistant|]: no" in warning


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILTIN)
def test_transformers_reads_it(name: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer

    donors = write_models(tmp_path, TEMPLATES[0], None)
    Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>")).save(f"{donors[0]}/tokenizer.json")
    merge(linear(donors, name), tmp_path / "out", workers=1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == BUILTIN[name]
    said = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    assert "Hello" in said
