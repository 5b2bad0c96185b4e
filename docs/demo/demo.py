"""Trains three small language models, merges them in four ways with the command line, and compares their losses.

Usage: python docs/demo/demo.py DIRECTORY

Exits with 1 if the merges do not do what merging promises: a model that is better, over both kinds of text, than the
base and than either fine-tune.
"""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path

import torch
from commands import run_raymerge
from rich.console import Console
from rich.table import Table
from train import BASE, FINE_TUNES, WINDOW, read_texts, train_model
from training import train_family
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

CONFIGS = Path(__file__).resolve().parent
MERGES = ("linear", "slerp", "task_arithmetic", "ties")
PARENTS = ("base", "code", "prose")

Losses = dict[str, dict[str, float]]
"""Mean loss of each model on each kind of text, in nats per byte."""


def main(directory: Path) -> int:
    """Train, merge, measure, print and check; return the exit code."""
    started = time.monotonic()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    directory.mkdir(parents=True, exist_ok=True)

    print("Training a base on code and prose, then a fine-tune on each", flush=True)
    train_family(BASE, FINE_TUNES, train_model, directory)
    for merge in MERGES:
        config = os.path.relpath(CONFIGS / f"{merge}.yml", directory)
        run_raymerge("merge", config, merge, "--overwrite", cwd=directory)
        run_raymerge("verify", merge, cwd=directory)
    print("Measuring every model on text that none has seen", flush=True)
    texts = {name: text.held_out for name, text in read_texts().items()}
    losses = {model: measure_losses(directory / model, texts) for model in (*PARENTS, *MERGES)}

    print_table(losses)
    faults = find_faults(losses)
    for fault in faults:
        print(f"FAILED: {fault}")
    if not faults:
        print("Every merge is better over both texts than the base and either fine-tune.")
    print(f"{time.monotonic() - started:.0f} s in all; the models are in {directory}")
    return 1 if faults else 0


@torch.inference_mode()
def measure_losses(directory: Path, texts: dict[str, str]) -> dict[str, float]:
    """Return the model's mean loss on each text; NaN if what it generates is not finite."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    losses: dict[str, float] = {}
    for name, text in texts.items():
        tokens = torch.tensor(tokenizer.encode(text))
        windows = tokens.unfold(0, WINDOW, WINDOW)
        losses[name] = model(input_ids=windows, labels=windows).loss.item()
        generated = model.generate(
            windows[:1], max_new_tokens=16, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        if not all(bool(logits.isfinite().all()) for logits in generated.logits):
            losses[name] = math.nan
    return losses


def find_faults(losses: Losses) -> list[str]:
    """Return what the models fail to do, one sentence each."""
    faults = [
        f"the fine-tune on {text} is no better on it than the base"
        for text in (recipe.name for recipe in FINE_TUNES)
        if not losses[text][text] < losses["base"][text]
    ]
    faults += [
        f"{merge} is no better over both texts than {parent}"
        for merge in MERGES
        for parent in PARENTS
        if not mean(losses[merge]) < mean(losses[parent])
    ]
    return faults


def mean(by_text: dict[str, float]) -> float:
    """Return the mean over the texts."""
    return sum(by_text.values()) / len(by_text)


def print_table(losses: Losses) -> None:
    """Print every model's loss on both texts, and the mean."""
    print("Loss on held-out text, in nats per byte; lower is better")
    table = Table()
    table.add_column("model")
    for text in losses["base"]:
        table.add_column(text, justify="right")
    table.add_column("mean", justify="right")
    for model, by_text in losses.items():
        figures = (*by_text.values(), mean(by_text))
        table.add_row(model.replace("_", " "), *(f"{x:.3f}" for x in figures), end_section=model == PARENTS[-1])
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
