"""The loss of held-out text: how well a model predicts each token from those before it."""

from __future__ import annotations

import glob
import hashlib
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.evaluation.evaluator import EvaluationError, Evaluator, Model, Place, Task
from raymerge.pipeline.evaluation.figures import Figures, estimate_loss
from raymerge.pipeline.evaluation.generation.engine import EngineError
from raymerge.pipeline.evaluation.options import EvaluateOptions
from raymerge.pipeline.evaluation.samples import Sample
from raymerge.pipeline.messages import counted
from raymerge.pipeline.urls import suggest_file

_MAX_NBYTES = 2**30
BITS = "bits_per_byte"
"""Name of a figure."""
_MAX_NATS = 43.0
"""Per token, for a perplexity that can be read again."""


@dataclass(frozen=True)
class LossTask(Task):
    """Texts, cut into windows."""

    libraries = ("transformers",)

    name: str
    digest: str
    texts: Mapping[str, str] = field(repr=False)
    """By the names of their files."""
    window: int
    limit: int | None
    dtype: str
    batch_size: int

    @property
    def sampling(self) -> Mapping[str, object]:
        """The window, and what else decides the loss."""
        shown = {"unit": "token", "window": self.window, "dtype": self.dtype}
        return shown if self.limit is None else {**shown, "limit": self.limit}

    @property
    def num_samples(self) -> int:
        """Unknown before the text is tokenised."""
        return self.limit or 0

    def is_wanted(self, sample: Sample) -> bool:
        """Tell whether a window is one of the first."""
        return self.limit is None or sample.number < self.limit

    def run(
        self, model: Model, place: Place, finished: Collection[tuple[str, int]], keep: Callable[[Sample], None]
    ) -> None:
        """Measure the loss of each window; `number` of a sample is that of the window in its file."""
        request = {
            "kind": "loss",
            "model": model.directory,
            "digest": model.digest,
            "dtype": self.dtype,
            "texts": self.texts,
            "window": self.window,
            "limit": self.limit,
            "finished": sorted(finished),
            "batch_size": self.batch_size,
        }
        try:
            for answer in place.engine.ask(request, place.check):
                keep(Sample(answer["item"], answer["number"], None, measures=answer["measures"]))
        except EngineError as error:
            raise EvaluationError(str(error)) from error

    def summarise(self, samples: Collection[Sample]) -> Figures:
        """Return nats per token, bits per byte, and the number of tokens."""
        measures = [sample.measures for sample in samples]
        sums, counts = [each["nats"] for each in measures], [int(each["tokens"]) for each in measures]
        if not counts:
            num_signs = sum(map(len, self.texts.values()))
            raise EvaluationError(
                f"the model's tokenizer makes fewer than two tokens of the {counted(num_signs, 'character')} of"
                f" {self.name}: there is nothing to predict; it is too short, or the tokenizer lacks its characters"
            )
        if not all(map(math.isfinite, sums)):
            raise EvaluationError(f"{self.name}: the loss is not finite; look for NaN in the weights, or try float32")
        other = {"tokens": float(sum(counts)), "perplexity": math.exp(min(math.fsum(sums) / sum(counts), _MAX_NATS))}
        if nbytes := sum(each.get("bytes", 0) for each in measures):
            other[BITS] = math.fsum(sums) / math.log(2) / nbytes
        return Figures(num_items=len(counts), num_samples=1, loss=estimate_loss(sums, counts), other=other)


class Losses(Evaluator):
    """`loss:FILE`: the loss of a text file, or of all that a pattern matches."""

    prefix = "loss:"

    def prepare(self, name: str, options: EvaluateOptions) -> Task:
        """Read the texts; windows never reach from one file into another."""
        if options.samples is not None or options.temperature is not None:
            raise ConfigError(f"--task loss:{name}: nothing is sampled; leave --samples and --temperature out")
        if options.backend != "transformers":
            raise ConfigError(
                f"--task loss:{name}: {options.backend} only generates; leave --backend out for this task"
            )
        paths = sorted(glob.glob(name)) if glob.has_magic(name) and not Path(name).exists() else [name]  # noqa: PTH207
        if not paths:
            raise ConfigError(f"--task loss:{name}: no file matches")
        texts = {Path(path).name if len(paths) == 1 else path: _read(path) for path in paths}
        digest = hashlib.sha256(repr(sorted(texts.items())).encode("utf-8", "surrogatepass")).hexdigest()
        limit, dtype, batch_size = options.limit, options.dtype, options.batch_size
        return LossTask(f"loss:{Path(name).name}", digest, texts, options.window, limit, dtype, batch_size)


def _read(path: str) -> str:
    try:
        if Path(path).stat().st_size > _MAX_NBYTES:
            raise ConfigError(f"--task loss:{path}: more than {_MAX_NBYTES:,} bytes; give a part of it")
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--task loss:{path}: {error.strerror}{suggest_file(Path(path))}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--task loss:{path}: it is not UTF-8 text: {error}") from error
    if not text.strip():
        raise ConfigError(f"--task loss:{path}: it is empty")
    return text
