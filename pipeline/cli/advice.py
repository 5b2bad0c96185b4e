"""Advice for command lines of mergekit's, and for words in another order."""

from __future__ import annotations

import re
from pathlib import Path

import typer

from raymerge.pipeline.messages import find_near

_INSTEAD = {
    "cuda": "write `--gpu-memory 16GiB` to merge on GPUs",
    "device": "write `--gpu-memory 16GiB` to merge on GPUs",
    "multi-gpu": "`--gpu-memory 16GiB` merges on all GPUs, with that much of each",
    "out-shard-size": "write `--shard-size 5GB`, in bytes",
    "random-seed": "write `--seed`",
    "num-threads": "write `--workers`",
    "j": "write `--workers`",
    "intermediate-dir": "write `--keep-intermediates DIR`, or leave it out where nobody needs them",
    "I": "write `--keep-intermediates DIR`, or leave it out where nobody needs them",
    "out-path": "give the output after the config: raymerge merge CONFIG OUT",
    "low-cpu-memory": "write `--memory 4GiB`, which bounds what tensors take",
    "trust-remote-code": "leave it out: no code of a model is run",
    "lazy-unpickle": "leave it out: pickles are not read",
} | dict.fromkeys(
    (
        *("allow-crimes", "async-write", "clone-tensors", "copy-tokenizer", "gpu-rich", "lora-merge-cache"),
        *("i-understand-this-is-not-useful-without-training", "lora-merge-dtype", "read-to-gpu", "safe-serialization"),
        *("transformers-cache", "unsafe-truncate-embeddings", "write-model-card", "write-threads"),
    ),
    "leave it out",
)
"""By mergekit's option, what does the same; docs/mergekit.md says why most need nothing."""
_CONFIGS = (".yml", ".yaml", ".json")


def describe_mistake(error: typer.TyperException) -> str:
    """Explain a mistake in the command line, with the nearest option or value in place of all similar ones."""
    message = error.format_message()
    if possibilities := getattr(error, "possibilities", None):  # the nearest first
        option = getattr(error, "option_name", None)
        if option is not None:
            return f"No such option: {option}; did you mean {possibilities[0]}?"
    message = message.replace(": Value error, ", ": ", 1)
    value = re.search(r": '(.*)' is not one of (.+)\.$", message, re.DOTALL)
    if value is not None and (near := find_near(value[1], re.findall("'([^']+)'", value[2]))):
        return f"{message.removesuffix('.')}; did you mean {near!r}?"
    return message


def advise(error: typer.TyperException) -> str | None:
    """Return what to do about a mistake in the command line; None where the message says it already."""
    option = str(getattr(error, "option_name", None) or "").lstrip("-")
    for name in (option, option.removeprefix("no-")):
        if name in _INSTEAD:
            return f"that is an option of mergekit; {_INSTEAD[name] if name == option else 'leave it out'}"
    word = re.match(r"No such command '(.+)'\.", error.format_message())
    if word is not None and word[1].lower().endswith(_CONFIGS):
        return f"the command comes first: raymerge merge {word[1]} OUT"
    return None


def is_in_other_order(config: Path, out: str) -> bool:
    """Tell whether somebody gave the output before the config."""
    return not config.is_file() and out.lower().endswith(_CONFIGS) and Path(out).is_file()
