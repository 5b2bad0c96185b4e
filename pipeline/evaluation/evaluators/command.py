"""Any command that evaluates a model and prints JSON."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from raymerge.pipeline.decoding import decode, is_decodable, parse_json
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.evaluation.evaluator import EvaluationError, Evaluator, Model, Place, Task
from raymerge.pipeline.evaluation.figures import Figures, summarise
from raymerge.pipeline.evaluation.generation.child import Child
from raymerge.pipeline.evaluation.options import EvaluateOptions
from raymerge.pipeline.evaluation.results import Estimate, Tokens
from raymerge.pipeline.evaluation.samples import Sample
from raymerge.pipeline.messages import shown, suggest

_MODEL = "{model}"
_NAME = re.compile(r"([\w.-]+)=(.*)", re.DOTALL)
_LOOK_SECONDS = 0.2
_OUTPUT_NBYTES = 64 * 2**20
_TAIL_CHARS = 600
_TAIL_LINES = 12
_MAX_SCRIPT_NBYTES = 16 * 2**20
_WHOLE = "command"
"""Item of the one sample that a command is."""
_FIGURES = ("accuracy", "tokens", "loss", "thinking", "cut_off", "num_items", "num_samples", "other", "samples")


@dataclass(frozen=True)
class CommandTask(Task):
    """A command, word by word."""

    last = _WHOLE

    name: str
    digest: str
    words: tuple[str, ...]
    timeout: float

    @property
    def sampling(self) -> Mapping[str, object]:
        """Nothing but the command decides."""
        return {}

    @property
    def num_samples(self) -> int:
        """Unknown."""
        return 0

    def run(
        self, model: Model, place: Place, finished: Collection[tuple[str, int]], keep: Callable[[Sample], None]
    ) -> None:
        """Run the command, and keep what it printed: all or nothing."""
        if (_WHOLE, 0) in finished:
            return
        words = [word.replace(_MODEL, model.directory).replace("{name}", model.name) for word in self.words]
        found = parse_output(self._call(words, model, place))
        for sample in found.samples:
            keep(sample)
        keep(Sample(_WHOLE, 0, None, measures=found.measures))

    def summarise(self, samples: Collection[Sample]) -> Figures:
        """Return the figures that it printed, and those of the samples that it printed."""
        [whole] = [sample for sample in samples if sample.item == _WHOLE]
        return make_figures(whole.measures, [sample for sample in samples if sample.item != _WHOLE])

    def _call(self, words: list[str], model: Model, place: Place) -> str:
        """Return what a command prints.

        Raises:
            EvaluationError: it cannot be run, fails, or takes too long.
        """
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
            environment = {**os.environ, **place.engine.environment}
            try:
                child = Child(words, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, environment=environment)
            except OSError as error:
                raise EvaluationError(
                    f"{error.filename} cannot be run: {error.strerror}; no shell runs the command: for a shell's own"
                    " commands, && and pipes write sh -c '...'"
                ) from error
            try:
                begun, process = time.monotonic(), child.process
                while process.poll() is None:
                    place.check()
                    if time.monotonic() - begun > self.timeout:
                        tail = _tail(stderr=errors, stdout=out)
                        raise EvaluationError(f"the command has not ended after {self.timeout:g} s (--timeout){tail}")
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(_LOOK_SECONDS)
            finally:
                child.end()
            if code := process.returncode:
                how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
                raise EvaluationError(f"the command {how}{_tail(stderr=errors, stdout=out)}")
            text = _read(out)
            if find_json(text) is None:
                raise EvaluationError(
                    'the command has printed no JSON object at its end, such as {"accuracy": 0.5}'
                    f"{_tail(stdout=out, stderr=errors)}"
                )
            return text


@dataclass(frozen=True, slots=True)
class Printed:
    """What a command has printed."""

    measures: Mapping[str, float]
    samples: tuple[Sample, ...]


def find_json(text: str) -> dict[str, Any] | None:
    r"""Return the JSON object that a text ends with, on one line or several; None where there is none.

    >>> find_json('loading\n{"accuracy": 0.5}\n'), find_json("done")
    ({'accuracy': 0.5}, None)
    """
    text = text.rstrip()
    if not text.endswith("}"):
        return None
    starts = [match.start() for match in re.finditer(r"^\{", text, re.MULTILINE)]
    for start in reversed(starts[-1000:]):
        with suppress(ValueError):
            value = parse_json(text[start:])
            return value if isinstance(value, dict) else None
    return None


def parse_output(text: str) -> Printed:
    """Return the figures and samples that a command has printed.

    Raises:
        EvaluationError: they are of the wrong kind, or out of range.
    """
    content = find_json(text) or {}
    measures: dict[str, float] = {}
    samples: list[Sample] = []
    for key, value in content.items():
        if key == "samples":
            samples = [_parse_sample(each, number) for number, each in enumerate(_as_list(value))]
        elif key == "other" and isinstance(value, dict):
            measures |= {f"other.{name}": _number(f"other.{name}", each) for name, each in value.items()}
        elif isinstance(value, dict) and key in ("accuracy", "loss", "tokens"):
            measures |= {f"{key}.{part}": _number(f"{key}.{part}", each) for part, each in value.items()}
        elif isinstance(value, bool) or not isinstance(value, int | float):
            if key in _FIGURES:
                raise EvaluationError(f"the command has printed {key}: {shown(value)}; a number is needed")
        else:
            measures[key if key in _FIGURES else f"other.{key}"] = _number(key, value)
    for key in ("accuracy", "accuracy.mean", "accuracy.low", "accuracy.high", "thinking", "cut_off"):
        if not 0 <= (value := measures.get(key, 0.0)) <= 1:
            raise EvaluationError(f"the command has printed {key}: {value:g}; a share from 0 to 1 is needed")
    if not measures and not samples:
        raise EvaluationError(
            f"the command has printed {shown(content)}; an object with some of {', '.join(_FIGURES)} is needed"
        )
    return Printed(measures, tuple(samples))


def make_figures(measures: Mapping[str, float], samples: Collection[Sample]) -> Figures:
    """Return the figures that a command has printed; those that it has not follow from its samples."""
    found = summarise(samples) if samples else Figures(0, 0)
    num_items = int(measures.get("num_items", found.num_items))
    tokens = _parts(measures, "tokens")
    other = {key.removeprefix("other."): value for key, value in measures.items() if key.startswith("other.")}
    return Figures(
        num_items=num_items,
        num_samples=int(measures.get("num_samples", found.num_samples or 1)),
        accuracy=_estimate(measures, "accuracy") or found.accuracy,
        tokens=Tokens(tokens["mean"], tokens.get("median", tokens["mean"]), tokens.get("p95", tokens["mean"]))
        if "mean" in tokens
        else found.tokens,
        loss=_estimate(measures, "loss"),
        thinking=measures.get("thinking", found.thinking),
        cut_off=measures.get("cut_off", found.cut_off),
        other={**found.other, **other},
    )


class Commands(Evaluator):
    """`command:...`: any command that prints JSON at its end."""

    prefix = "command:"

    def prepare(self, name: str, options: EvaluateOptions) -> Task:
        """Split a command as a shell does; `NAME=` before it is the task's name."""
        keys = ("limit", "max_new_tokens", "samples", "seed", "temperature")
        if given := [key for key in keys if getattr(options, key) is not None]:
            raise ConfigError(f"--{given[0].replace('_', '-')} has no meaning for a command; write it into the command")
        match = _NAME.fullmatch(name)
        called, text = (match[1], match[2]) if match and "/" not in match[1] else ("", name)
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise ConfigError(f"--command {text!r}: {error}") from error
        if not any(_MODEL in word for word in words):
            places = re.findall(r"\{\w+\}", text)
            hint = f"; {places[0]}: {suggest(places[0], [_MODEL, '{name}'])}" if places else ""
            raise ConfigError(f"--command {text!r} has no {{model}}, where the model's directory goes{hint}")
        files = [Path(word) for word in words if _MODEL not in word and _is_script(Path(word))]
        content = [text, *(hashlib.sha256(path.read_bytes()).hexdigest() for path in files)]
        scripts = [path.stem for path in files if path.suffix] or [Path(words[0]).name]
        digest = hashlib.sha256("\0".join(content).encode()).hexdigest()
        return CommandTask(called or scripts[0], digest, tuple(words), options.timeout)


def _is_script(path: Path) -> bool:
    try:
        return path.is_file() and path.stat().st_size <= _MAX_SCRIPT_NBYTES
    except OSError:
        return False


def _parse_sample(value: object, number: int) -> Sample:
    try:
        fields = {"item": str(number), "number": 0, "score": None, **dict(value)}  # type: ignore[call-overload]
        sample: Sample = decode({**fields, "item": str(fields["item"])}, Sample)
    except (TypeError, KeyError, ValueError) as error:
        raise EvaluationError(f"the command has printed the sample {shown(value)}: {error}") from error
    return sample


def _as_list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise EvaluationError(f"the command has printed samples: {shown(value)}; a list is needed")
    return value


def _number(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not is_decodable(value):
        raise EvaluationError(
            f"the command has printed {key}: {shown(value)}; a finite number is needed, below 2^63 in size"
        )
    return float(value)


def _parts(measures: Mapping[str, float], key: str) -> dict[str, float]:
    found = {"mean": measures[key]} if key in measures else {}
    return found | {
        name.removeprefix(f"{key}."): value for name, value in measures.items() if name.startswith(f"{key}.")
    }


def _estimate(measures: Mapping[str, float], key: str) -> Estimate | None:
    parts = _parts(measures, key)
    if "mean" not in parts:
        return None
    return Estimate(parts["mean"], parts.get("low", parts["mean"]), parts.get("high", parts["mean"]))


def _read(file: IO[bytes]) -> str:
    nbytes = file.seek(0, os.SEEK_END)
    file.seek(max(0, nbytes - _OUTPUT_NBYTES))
    return file.read().decode(errors="replace")


def _tail(**files: IO[bytes]) -> str:
    """Return the end of a command's output for a message: the last line, then more on lines of their own."""
    printed = {name: _list_last(file) for name, file in files.items()}
    lasts = [lines[-1].strip() for lines in printed.values() if lines]
    if not lasts:
        return "; it has printed nothing"
    parts = [f": {lasts[0][-_TAIL_CHARS:]}"]
    for name, lines in printed.items():
        if len(lines) > 1 or (lines and len(lasts) > 1):
            parts += [f"    the end of its {name}:", *(f"      {line[-_TAIL_CHARS:]}" for line in lines)]
    return "\n".join(parts)


def _list_last(file: IO[bytes]) -> list[str]:
    return [line.rstrip() for line in _read(file).splitlines() if line.strip()][-_TAIL_LINES:]
