"""Hidden states of prompts: those that enter each layer of a model.

They are computed by transformers, an extra that nothing else of the product imports, in a process of its own, layer by
layer: one layer's weights are in memory at a time, read from wherever the model is.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raymerge.ops.lazy import np
from raymerge.pipeline.checkpoint.model_config import Json
from raymerge.pipeline.checkpoint.source import Source
from raymerge.pipeline.checkpoint.values import read_rows, read_tensor
from raymerge.pipeline.errors import CheckpointError
from raymerge.pipeline.stores.open import Stores

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

NUM_TOKENS = 2048
"""Tokens that go through a layer at once, unless one prompt has more."""
_VALUES_PER_TOKEN = 6
"""Vectors of the hidden size that a layer has in memory for each token, and half as many of the MLP's size."""
_LARGE_NBYTES = 2**20
"""Blocks of this size go back to the system when they are freed; a heap would keep them in pieces."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request for hidden states."""

    stores: Stores
    config: Json
    """The model's config.json."""
    embedding: Source
    layers: tuple[Mapping[str, Source], ...]
    """The tensors of each layer, by their names in it."""
    prompts: tuple[tuple[int, ...], ...]
    """Tokens of each prompt."""
    takes_mean: bool
    """Whether all of a prompt's tokens count, or the last one alone."""

    @property
    def projected_mem(self) -> int:
        """Memory for weights and activations, in float32, in bytes."""
        layer = max(sum(4 * source.num_elements for source in layer.values()) for layer in self.layers)
        widest = max(source.num_elements for layer in self.layers for source in layer.values())
        hidden = self.embedding.shape[1]
        num_tokens = max(NUM_TOKENS, *map(len, self.prompts))
        activations = 4 * num_tokens * _VALUES_PER_TOKEN * (hidden + widest // hidden // 2)
        return layer + 3 * 4 * widest + activations


def is_available() -> bool:
    """Tell whether transformers is installed."""
    return importlib.util.find_spec("transformers") is not None


def measure_hidden_states(model: str, request: Request) -> Floats:
    """Return a vector for each layer and prompt, of shape [layers, prompts, hidden size].

    Args:
        model: for messages.
        request: what to compute.

    Raises:
        CheckpointError: transformers cannot compute it.
    """
    command = [sys.executable, "-P", "-m", __name__]  # modules of the working directory are not ours
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "MALLOC_MMAP_THRESHOLD_": str(_LARGE_NBYTES),
    }
    done = subprocess.run(command, input=pickle.dumps(request), capture_output=True, check=False, env=environment)
    if done.returncode:
        lines = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        why = lines[-1].strip() if lines else f"exit code {done.returncode}"
        raise CheckpointError(
            f"{model}: transformers cannot compute what it makes of the prompts: {why}; `gate_mode: cheap_embed` does"
            " without"
        )
    shape = len(request.layers), len(request.prompts), request.embedding.shape[1]
    found: Floats = np.frombuffer(done.stdout, np.float32).reshape(shape)
    return found


def compute(request: Request) -> torch.Tensor:
    """Return what `measure_hidden_states` does, in this process."""
    import torch
    import transformers

    fields = {key: value for key, value in request.config.items() if key not in ("auto_map", "model_type")}
    config = transformers.AutoConfig.for_model(request.config["model_type"], **fields)
    with torch.device("meta"):
        model: Any = transformers.AutoModel.from_config(config, dtype=torch.float32)
    model.eval()
    model.rotary_emb = type(model.rotary_emb)(config=config)  # its buffers are computed, and stored nowhere
    tokens = sorted({token for prompt in request.prompts for token in prompt})
    rows = read_rows(request.stores, request.embedding, tokens)
    vectors = {token: torch.from_numpy(row).float() for token, row in rows.items()}
    found = torch.zeros(len(request.layers), len(request.prompts), request.embedding.shape[1])
    for group in _group(request.prompts):
        longest = max(len(request.prompts[k]) for k in group)
        inputs = torch.zeros(len(group), longest, request.embedding.shape[1])
        for row, k in enumerate(group):  # what follows a prompt's end has no effect on what is before it
            inputs[row, : len(request.prompts[k])] = torch.stack([vectors[token] for token in request.prompts[k]])
        _run(model, request, inputs, group, found)
    return found


class _DoneError(Exception):
    """The input of the last layer is there."""


def _run(model: Any, request: Request, inputs: torch.Tensor, group: Sequence[int], found: torch.Tensor) -> None:
    """Enter what some prompts come to before each layer."""
    import torch

    last = len(request.layers) - 1

    def enter(number: int, layer: Any, hidden: torch.Tensor) -> None:
        for row, k in enumerate(group):
            own = hidden[row, : len(request.prompts[k])]
            found[number, k] = own.mean(0) if request.takes_mean else own[-1]
        if number == last:
            raise _DoneError
        state = {name: read_tensor(request.stores, source) for name, source in request.layers[number].items()}
        layer.load_state_dict(state, assign=True)

    hooks = []
    for number, layer in enumerate(model.layers):

        def before(module: Any, arguments: Any, keywords: Any, number: int = number) -> None:
            enter(number, module, arguments[0] if arguments else keywords["hidden_states"])

        def after(module: Any, arguments: Any, output: Any) -> None:
            module.to("meta")

        hooks += [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
    try:
        with torch.inference_mode():
            model(inputs_embeds=inputs, use_cache=False)
    except _DoneError:
        pass
    finally:
        for hook in hooks:
            hook.remove()


def _group(prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Yield the positions of prompts that go through the model together."""
    group: list[int] = []
    for k, prompt in enumerate(prompts):
        longest = max([len(prompt), *(len(prompts[other]) for other in group)])
        if group and longest * (len(group) + 1) > NUM_TOKENS:
            yield group
            group = []
        group.append(k)
    if group:
        yield group


if __name__ == "__main__":
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever libraries print is no answer
    with answer:
        answer.write(compute(pickle.load(sys.stdin.buffer)).numpy().tobytes())
