"""Merges in plain float64 numpy, and how far a checkpoint is from them.

`python benchmarks/reference.py MERGE OUT INPUT...` prints the comparison as JSON. The formulas are those of the
papers as mergekit 0.1.5 applies them; of magnitudes that tie at the cut, those with the lowest index are kept.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Spec = dict[str, Any]
"""The fields of a `merges.Merge`."""

MANTISSA_BITS = 7
"""Of bf16, as stored."""
SMALLEST_RESULT = 2.0**-40
"""Relative to the largest operand; below it, the reference's own rounding shows."""


def linear(spec: Spec, xs: Sequence[Array]) -> Array:
    """Return the weighted mean."""
    return _sum(w * x for w, x in zip(spec["weights"], xs, strict=True)) / float(sum(spec["weights"]))


def slerp(spec: Spec, xs: Sequence[Array]) -> Array:
    """Return the spherical interpolation, or the straight one where the two are nearly parallel."""
    a, b = xs
    t: float = spec["shared"]["t"]
    norms = [norm if norm > 1e-8 else 1.0 for norm in (np.linalg.norm(a), np.linalg.norm(b))]
    cosine = float(np.clip(np.sum(a / norms[0] * (b / norms[1])), -1, 1))
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    result: Array = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
    return result


def task_arithmetic(spec: Spec, xs: Sequence[Array]) -> Array:
    """Return the base plus the weighted sum of the deltas."""
    mixed = _sum(w * (x - xs[0]) for w, x in zip(spec["weights"], xs[1:], strict=True))
    return xs[0] + float(spec["shared"].get("lambda", 1)) * mixed


def ties(spec: Spec, xs: Sequence[Array]) -> Array:
    """Return trim, elect sign, disjoint weighted mean."""
    deltas = [keep_largest(x - xs[0], d) for x, d in zip(xs[1:], spec["densities"], strict=True)]
    mixed, divisor = _elect(deltas, spec["weights"])
    return xs[0] + mixed / np.where(divisor == 0, 1, divisor)


def dare_ties(spec: Spec, xs: Sequence[Array]) -> Array:
    """Return what is left of dare_ties at density 1: elect sign, sum."""
    return xs[0] + _elect([x - xs[0] for x in xs[1:]], spec["weights"])[0]


def passthrough(spec: Spec, xs: Sequence[Array]) -> Array:
    """Return the scaled input."""
    return xs[0] * float(spec["shared"]["scale"])


METHODS: dict[str, Callable[[Spec, Sequence[Array]], Array]] = {
    "linear": linear,
    "slerp": slerp,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "dare_linear": task_arithmetic,
    "dare_ties": dare_ties,
    "passthrough": passthrough,
}


def keep_largest(delta: Array, density: float) -> Array:
    """Return the delta with all but its largest magnitudes set to zero.

    >>> keep_largest(np.array([1.0, -3.0, 3.0, 0.5]), 0.25)
    array([ 0., -3.,  0.,  0.])
    """
    kept = np.zeros_like(delta)
    order = np.argsort(-np.abs(delta), kind="stable")[: num_kept(delta.size, density)]
    kept[order] = delta[order]
    return kept


def num_kept(num_elements: int, density: float) -> int:
    """Return how many elements of a tensor survive."""
    return num_elements if density >= 1 else max(1, int(density * num_elements))


def is_decided(spec: Spec, xs: Sequence[Array]) -> NDArray[np.bool_]:
    """Return where no implementation has a choice: not where a magnitude equals the cut, seen in bf16."""
    decided = np.ones(xs[0].shape, dtype=bool)
    if spec["method"] == "ties":
        for x, density in zip(xs[1:], spec["densities"], strict=True):
            magnitude = np.abs(x - xs[0])
            cut = np.partition(magnitude, -num_kept(magnitude.size, density))[-num_kept(magnitude.size, density)]
            decided &= np.abs(magnitude - cut) > ulp(np.maximum(magnitude, cut))
    return decided


def ulp(values: Array) -> Array:
    """Return the distance of bf16 numbers around each value.

    >>> ulp(np.array([1.0, 1.99, -2.0])) * 2**7
    array([1., 1., 2.])
    """
    exponent = np.frexp(values)[1]
    distance: Array = np.ldexp(1.0, np.maximum(exponent - 1 - MANTISSA_BITS, -133))
    return distance


def compare(spec: Spec, out: Path, inputs: Sequence[Path]) -> dict[str, Any]:
    """Return the largest errors over all tensors of an output.

    `error` is the distance to the reference and `excess` what of it exceeds half an ulp of the reference, both
    relative to the largest operand at that element (where operands cancel, the result is no measure of them);
    `_of_result`: relative to the result itself, unless that is so small that float64 is no measure of it either.
    `decided`: the same where no implementation has a choice.
    """
    result = read_checkpoint(out)
    sources = [read_checkpoint(path) for path in inputs]
    if set(result) != set(sources[0]):
        raise ValueError(f"other tensors in the output: {sorted(set(result) ^ set(sources[0]))}")
    everywhere, decided, num_undecided = _Largest(), _Largest(), 0
    for name, values in result.items():
        xs = [source[name] for source in sources]
        reference = METHODS[spec["method"]](spec, xs)
        operand = np.maximum.reduce([np.abs(x) for x in xs])
        mask = is_decided(spec, xs)
        everywhere.add(values, reference, operand)
        decided.add(values[mask], reference[mask], operand[mask])
        num_undecided += int(mask.size - np.count_nonzero(mask))
    return {**vars(everywhere), "decided": vars(decided), "num_undecided": num_undecided}


class _Largest:
    """The largest errors so far."""

    def __init__(self) -> None:
        self.error = 0.0
        self.excess = 0.0
        self.error_of_result = 0.0
        self.excess_of_result = 0.0

    def add(self, values: Array, reference: Array, operand: Array) -> None:
        error = np.abs(values - reference)
        if not np.all(np.isfinite(error)):
            raise ValueError("the output is not finite")
        excess = np.maximum(error - ulp(reference) / 2, 0)
        self.error = max(self.error, _largest_ratio(error, operand))
        self.excess = max(self.excess, _largest_ratio(excess, operand))
        result = np.where(np.abs(reference) > SMALLEST_RESULT * operand, np.abs(reference), np.inf)
        self.error_of_result = max(self.error_of_result, _largest_ratio(error, result))
        self.excess_of_result = max(self.excess_of_result, _largest_ratio(excess, result))


def _largest_ratio(numerator: Array, denominator: Array) -> float:
    ratios = np.divide(numerator, denominator, out=np.zeros_like(numerator), where=numerator > 0)
    return float(ratios.max(initial=0.0))


def read_checkpoint(path: Path) -> dict[str, Array]:
    """Return every tensor of a bf16 checkpoint, flat.

    Raises:
        ValueError: a tensor has another dtype.
    """
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        content = file.read_bytes()
        begin = 8 + int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8:begin]).items():
            if name == "__metadata__":
                continue
            if entry["dtype"] != "BF16":
                raise ValueError(f"{file}: {name} is {entry['dtype']}, not BF16")
            start, stop = (begin + offset for offset in entry["data_offsets"])
            bits = np.frombuffer(content[start:stop], dtype="<u2").astype(np.uint32) << 16
            tensors[name] = bits.view(np.float32).astype(np.float64)
    return tensors


def _elect(deltas: Sequence[Array], weights: Sequence[float]) -> tuple[Array, Array]:
    """Return the sum of what agrees with the majority's sign, and the sum of the weights that agree."""
    weighted = [w * delta for w, delta in zip(weights, deltas, strict=True)]
    majority = np.where(_sum(weighted) >= 0, 1.0, -1.0)
    agree = [np.sign(each) == majority for each in weighted]
    mixed = _sum(each * mask for each, mask in zip(weighted, agree, strict=True))
    return mixed, _sum(w * mask for w, mask in zip(weights, agree, strict=True))


def _sum(terms: Any) -> Array:
    total: Array = np.sum(list(terms), axis=0)
    return total


if __name__ == "__main__":
    print(json.dumps(compare(json.loads(sys.argv[1]), Path(sys.argv[2]), [Path(each) for each in sys.argv[3:]])))
