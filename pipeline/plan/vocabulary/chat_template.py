"""The chat template of an output: which one it gets, whether it works, and the files that have it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from raymerge.pipeline.checkpoint.chat_template.files import (
    OTHERS,
    PROCESSOR_TEMPLATE,
    TEMPLATE,
    choose_template,
    find_tokens,
    read_template,
    remove_template,
)
from raymerge.pipeline.checkpoint.chat_template.rendering import render
from raymerge.pipeline.checkpoint.checkpoint import Checkpoint
from raymerge.pipeline.checkpoint.files import TOKENIZER, TOKENIZER_CONFIG, is_tokenizer
from raymerge.pipeline.config.sections.chat_template import TemplateChoice
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.messages import counted, escaped, listing
from raymerge.pipeline.plan.out_files import Copied, SideFile, Written
from raymerge.pipeline.stores.open import Stores

_MAX_NBYTES = 64 * 2**20
_MARKS = re.compile(r"<\|[^<>|\s]{1,40}\|>|\[\|[^][|\s]{1,40}\|\]")
"""Marks of turns that models know as single tokens, such as <|im_start|> and [|user|]."""
_SHOWN = 4


def set_chat_template(
    stores: Stores,
    choice: TemplateChoice,
    checkpoints: Sequence[Checkpoint],
    files: Sequence[SideFile],
    *,
    are_donors: bool = True,
) -> tuple[list[SideFile], list[str], list[str]]:
    """Return an output's side files with the chat template that its config asks for, warnings, and notes.

    Args:
        stores: of the inputs.
        choice: what the config asks for.
        checkpoints: the inputs, the donor first.
        files: the side files without it: those of the donor, or of a tokenizer of the output's own.
        are_donors: whether the tokenizer among them is the donor's, so that its template is there already.

    Raises:
        ConfigError: the template does not parse or does not end, or refuses a plain conversation.
        CheckpointError: a model's file of it is no JSON.
    """
    text, whose = choice.text, choice.origin or "the config's"
    notes = []
    if text is None:
        templates = [read_template(stores, checkpoint) for checkpoint in checkpoints]
        position = choose_template(templates)
        if position is None:
            return [*files], ["chat_template: auto, and no model has one; the output gets none"], []
        text = templates[position] or ""
        same = sum((other or "").strip() == text.strip() for other in templates)
        whose = f"that of {checkpoints[position].model}"
        notes.append(f"chat_template: {whose}, which {same} of {counted(len(templates), 'model')} have")
        if text == templates[0] and are_donors:
            return [*files], [], notes
    else:
        notes.append(f"chat_template: {whose}")
    configs = {file.name: _read(stores, file) for file in files if file.name == TOKENIZER_CONFIG}
    config = configs.get(TOKENIZER_CONFIG, "{}")
    rendering = render(text, find_tokens(config, TOKENIZER_CONFIG))
    warnings = []
    if rendering.problem:
        problem = f"chat_template ({whose}): {rendering.problem}"
        if rendering.is_fatal or choice.text is not None:
            raise ConfigError(f"{problem}; correct it, or leave chat_template out to keep the donor's")
        warnings.append(problem)
    if not any(is_tokenizer(file.name) for file in files):
        warnings.append(f"chat_template: the output has no tokenizer, so nothing but {TEMPLATE} has the template")
    if lacking := _list_lacking(stores, rendering.text, files):
        warnings.append(
            f"chat_template ({whose}): {listing(map(escaped, lacking), _SHOWN)}: no tokens of the output's tokenizer,"
            " which takes them apart like other text; add them under `tokenizer.tokens`, or choose another template"
        )
    replaced = [file.name for file in files if file.name.startswith(OTHERS)]
    if replaced:
        notes.append(f"chat_template: it takes the place of {', '.join(replaced)}, too")
    kept = [file for file in files if file.name not in (TEMPLATE, PROCESSOR_TEMPLATE, *replaced)]
    without = remove_template(config, TOKENIZER_CONFIG)
    if without != config:
        kept = [Written(file.name, without) if file.name == TOKENIZER_CONFIG else file for file in kept]
    return [*kept, Written(TEMPLATE, text)], warnings, notes


def _list_lacking(stores: Stores, text: str, files: Sequence[SideFile]) -> list[str]:
    """Return the marks in a rendered conversation that tokenizer.json does not have, in their order there."""
    marks = dict.fromkeys(_MARKS.findall(text))
    tokenizer = next((file for file in files if file.name == TOKENIZER), None)
    if not marks or tokenizer is None:
        return []
    content = _read(stores, tokenizer)
    return [mark for mark in marks if f'"{mark}"' not in content]


def _read(stores: Stores, file: SideFile) -> str:
    if isinstance(file, Copied):
        return stores.at(file.source.url).read(file.source.url, _MAX_NBYTES).decode(errors="replace")
    return file.text
