"""The model card: README.md of the output, with the front matter that the Hub reads."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from urllib.parse import quote

import yaml

from raymerge import __version__
from raymerge.ops.registry import Base, Op
from raymerge.pipeline.messages import listing
from raymerge.pipeline.plan.types import InputModel, MergePlan, PlannedOutput, TensorMerge
from raymerge.pipeline.urls import repository_of

_MAX_TITLE_MODELS = 4


def make_card(plan: MergePlan, output: PlannedOutput) -> str:
    """Return the text of the card; it follows from the plan alone, as two outputs of one plan are the same."""
    op = plan.op
    is_of_diffusers = not plan.is_adapter and any(network.stem != "model" for network in plan.networks)
    kind, library = ("diffusion models", "diffusers") if is_of_diffusers else ("language models", "transformers")
    if plan.is_adapter:
        kind, library = "LoRA adapters", "peft"
    adapters = {adapter.files.model: _describe(adapter.files) for adapter in plan.adapters}
    names = {
        str(item.model): _describe(item) + (f" with {adapters[item.model.adapter]}" if item.model.adapter else "")
        for item in plan.inputs
    }
    repositories = list(
        dict.fromkeys(repository for item in plan.directories if (repository := repository_of(item.url)))
    )
    front = {
        **({"base_model": repositories, "base_model_relation": "merge"} if repositories else {}),
        "library_name": library,
        "tags": ["merge", "mergekit", "raymerge"],
    }
    method = f"[{op.title}]({op.reference})" if op.reference else op.title
    bases = [] if op.base is Base.INPUT or plan.is_adapter else _find_bases(plan)
    others = [model for model in names if model not in bases] or list(names)
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
        "---",
        f"# {_make_title(plan)}",
        "",
        f"A merge of {kind}, made with raymerge {__version__}.",
        "",
        f"Method: {method}{', with ' + ' and '.join(bases) + ' as base' if bases else ''}.",
        "",
        "Adapters:" if plan.is_adapter else "Models:",
        "",
        *(f"- {names[model]}" for model in others),
        "",
        "Config:",
        "",
        *_fenced(output.config_text),
        "",
    ]
    return "\n".join(lines)


def _make_title(plan: MergePlan) -> str:
    names = [
        PurePosixPath(part.path).name or part.path for model in plan.models for part in (model, model.adapter) if part
    ]
    return f"{listing(names, _MAX_TITLE_MODELS, separator=' + ')} ({plan.method})"


def _find_bases(plan: MergePlan) -> list[str]:
    """The models that are somewhere the base, in order of appearance; slices may differ in theirs."""
    merges = (merge for task in plan.tasks for merge in task.merges)
    return list(
        dict.fromkeys(
            merge.sources[0].model for merge in merges if merge.op == plan.method and _has_base(plan.op, merge)
        )
    )


def _has_base(op: Op, merge: TensorMerge) -> bool:
    """Return whether the first source is a base; where that is optional, no parameter of models has a value for it."""
    values = (value for _, value in merge.variants[0].parameters if isinstance(value, tuple))
    return op.base is Base.REQUIRED or any(len(value) < len(merge.tensors) for value in values)


def _describe(item: InputModel) -> str:
    """Return a model's name; a link if it was read from a repository of the Hub, whatever else is called like one."""
    repository = repository_of(item.url)
    if repository is None:
        return f"`{item.model.without_adapter}`"
    tree = f"/tree/{quote(item.model.revision, safe='')}" if item.model.revision else ""
    return f"[{item.model.without_adapter}](https://huggingface.co/{repository}{tree})"


def _fenced(text: str) -> list[str]:
    """A YAML block whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}yaml", text.rstrip(), fence]
