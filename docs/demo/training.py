"""Trains the models of the demos: a base and, side by side, its fine-tunes, by AdamW on a rate that rises and falls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import torch
from transformers import LlamaForCausalLM

_SHOWN = 50
"""Steps from one line of progress to the next."""

Recipe = TypeVar("Recipe")


def train_family(
    base: Recipe, fine_tunes: Sequence[Recipe], train_model: Callable[[Recipe, Path], None], directory: Path
) -> None:
    """Train a base and then, side by side, its fine-tunes, each into a directory of its name.

    Args:
        base: recipe of the base.
        fine_tunes: recipes of its fine-tunes.
        train_model: trains the model of a recipe and saves it; a function of a module, as other processes call it.
        directory: for all models.
    """
    train_model(base, directory)
    with ProcessPoolExecutor(len(fine_tunes), mp_context=get_context("spawn")) as pool:
        for _ in pool.map(train_model, fine_tunes, [directory] * len(fine_tunes)):
            pass


def train(
    model: LlamaForCausalLM,
    name: str,
    num_steps: int,
    learning_rate: float,
    draw: Callable[[], tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """Train a model in place.

    Args:
        model: float32.
        name: shown with the progress.
        num_steps: updates, of one batch each.
        learning_rate: the largest; it is reached after a tenth of the steps.
        draw: returns a batch: tokens and labels, both (rows, length).
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=learning_rate, total_steps=num_steps, pct_start=0.1, anneal_strategy="linear"
    )
    for step in range(1, num_steps + 1):
        tokens, labels = draw()
        loss = model(input_ids=tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % _SHOWN == 0:
            print(f"  {name:<9}  step {step} of {num_steps}  loss {loss.item():.2f}", flush=True)
