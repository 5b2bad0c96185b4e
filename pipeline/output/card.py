"""The model card: README.md of the output, with the front matter that the Hub reads."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

import yaml

from raymerge import __version__
from raymerge.ops.registry import Base, find_op
from raymerge.pipeline.plan.types import MergePlan

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


_MAX_TITLE_MODELS = 4


def make_card(plan: MergePlan) -> str:
    """Return the text of the card; it follows from the plan alone, as two outputs of one plan are the same."""
    op = find_op(plan.method)
    front = {
        "base_model": [model.path for model in plan.models if _HUB_NAME.fullmatch(model.path)],
        "library_name": "transformers",
        "tags": ["merge", "mergekit", "raymerge"],
    }
    if not front["base_model"]:
        del front["base_model"]
    method = f"[{op.title}]({op.reference})" if op.reference else op.title
    bases = _find_bases(plan) if op.base is Base.REQUIRED else []
    others = [str(model) for model in plan.models if str(model) not in bases] or [str(model) for model in plan.models]
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
        "---",
        f"# {_make_title(plan)}",
        "",
        f"A merge of language models, made with raymerge {__version__}.",
        "",
        f"Method: {method}{', with ' + ' and '.join(bases) + ' as base' if bases else ''}.",
        "",
        "Models:",
        "",
        *(f"- {_link(model)}" for model in others),
        "",
        "Config:",
        "",
        *_fenced(plan.config_text),
        "",
    ]
    return "\n".join(lines)


def _make_title(plan: MergePlan) -> str:
    names = [PurePosixPath(model.path).name or model.path for model in plan.models]
    if len(names) > _MAX_TITLE_MODELS:
        names[_MAX_TITLE_MODELS - 1 :] = [f"{len(names) - _MAX_TITLE_MODELS + 1} more"]
    return f"{' + '.join(names)} ({plan.method})"


def _find_bases(plan: MergePlan) -> list[str]:
    """The models that are somewhere the base, in order of appearance; slices may differ in theirs."""
    merges = (merge for task in plan.tasks for merge in task.merges)
    return list(dict.fromkeys(merge.sources[0].model for merge in merges if merge.op == plan.method))


def _link(model: str) -> str:
    return f"[{model}](https://huggingface.co/{model})" if _HUB_NAME.fullmatch(model) else f"`{model}`"


def _fenced(text: str) -> list[str]:
    """A YAML block whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}yaml", text.rstrip(), fence]
