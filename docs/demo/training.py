"""The training loop of the demos: AdamW, on a learning rate that rises and falls."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import LlamaForCausalLM

_SHOWN = 50
"""Steps from one line of progress to the next."""


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
