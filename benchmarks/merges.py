"""The merges that are measured, and the two tools' command lines for them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints import family_paths
from processes import Usage, measure

OFFLINE = {"HF_HUB_OFFLINE": "1"}
"""Keeps mergekit from asking the Hub about local paths; raymerge gets it too."""


@dataclass(frozen=True)
class Merge:
    """A merge method with its parameters, for whichever family of checkpoints."""

    method: str
    weights: tuple[float, ...] = ()
    """One for each fine-tune; empty where the method has none."""
    densities: tuple[float, ...] = ()
    """Likewise."""
    shared: dict[str, float] = field(default_factory=dict)
    """Parameters of the whole merge."""
    has_base: bool = False
    num_models: int = 0
    """Fine-tunes, where neither weights nor densities count them."""

    @property
    def num_tunes(self) -> int:
        """How many fine-tunes are merged."""
        return len(self.weights) or self.num_models

    def inputs(self, checkpoints: Path, family: str) -> list[Path]:
        """Return the directories to merge: the base first if the merge has one, then the fine-tunes."""
        paths = family_paths(checkpoints, family, self.num_tunes)
        return paths if self.has_base else paths[1:]

    def to_yaml(self, inputs: Sequence[Path], dtype: str = "bfloat16", out_dtype: str = "bfloat16") -> str:
        """Return the mergekit config (JSON, which is YAML too)."""
        tunes = inputs[1:] if self.has_base else inputs
        models = []
        for number, path in enumerate(tunes):
            parameters = {}
            if self.weights:
                parameters["weight"] = self.weights[number]
            if self.densities:
                parameters["density"] = self.densities[number]
            models.append({"model": str(path), "parameters": parameters})
        config: dict[str, object] = {"merge_method": self.method, "dtype": dtype, "out_dtype": out_dtype}
        if self.has_base:
            config["base_model"] = str(inputs[0])
        if self.method == "slerp":
            models.insert(0, {"model": str(inputs[0]), "parameters": {}})
        if self.shared:
            config["parameters"] = self.shared
        return json.dumps(config | {"models": models}, indent=2) + "\n"


@dataclass(frozen=True)
class Bench:
    """Where things are and how often to measure."""

    workdir: Path
    raymerge: Path
    mergekit: Path | None
    """None: only raymerge and the floor are measured."""
    repeats: int
    peer_repeats: int
    """Of mergekit's runs; its ties alone takes minutes."""

    @property
    def checkpoints(self) -> Path:
        """Where the inputs are kept from one run to the next."""
        return self.workdir / "checkpoints"

    def make_family(self, name: str, count: int) -> list[Path]:
        """Make what is missing of a family, in a process of its own, and return its directories, the base first."""
        script = Path(__file__).with_name("checkpoints.py")
        subprocess.run([sys.executable, script, self.checkpoints, name, str(count)], check=True)
        return family_paths(self.checkpoints, name, count)

    def write_config(self, merge: Merge, family: str, dtype: str = "bfloat16", out_dtype: str = "bfloat16") -> Path:
        """Make the inputs and write the config; return its path."""
        self.make_family(family, merge.num_tunes)
        text = merge.to_yaml(merge.inputs(self.checkpoints, family), dtype, out_dtype)
        path = self.workdir / f"{merge.method}-{merge.num_tunes}-{family}-{dtype}.yml"
        path.write_text(text)
        return path

    def plan(self, config: Path, *options: str, env: dict[str, str] | None = None) -> dict[str, Any]:
        """Return the output of `raymerge plan --json`, run in a process of its own, as this one has to stay small."""
        command: list[str | Path] = [self.raymerge, "plan", config, "--json", *options]
        environment = os.environ | OFFLINE | (env or {})
        plan: dict[str, Any] = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout
        )
        return plan

    def run_raymerge(
        self, config: Path, *options: str, env: dict[str, str] | None = None, is_sampled: bool = False
    ) -> Usage:
        """Merge into `raymerge_out`, which was emptied before."""
        self.clear(self.raymerge_out)
        command: list[str | Path] = [self.raymerge, "merge", config, self.raymerge_out, "-q", *options]
        return self._measure("raymerge", command, env=env, is_sampled=is_sampled)

    def run_mergekit(self, config: Path) -> Usage:
        """Merge into `mergekit_out`, which was emptied before.

        With mergekit's defaults: its options for threads and asynchronous writes made no difference on the CPU.
        """
        if self.mergekit is None:
            raise AssertionError("there is no mergekit to run")
        self.clear(self.mergekit_out)
        return self._measure("mergekit", [self.mergekit, config, self.mergekit_out, "--random-seed", "0"])

    def run_floor(self, inputs: Sequence[Path]) -> tuple[Usage, Usage]:
        """Read all inputs and write one output: `cat` of the one, `cp` of the first input, which is as large.

        The second figure adds waiting until the copy is on the disk, as raymerge waits for its output.
        """
        out = self.workdir / "out-floor"
        self.clear(out)
        out.mkdir()
        read = self._measure("cat", ["sh", "-c", 'cat "$@" > /dev/null', "sh", *weights(inputs)])
        write = self._measure("cp", ["cp", "--reflink=never", *weights(inputs[:1]), out])
        sync = self._measure("sync", ["sync", *weights([out])])
        self.clear(out)
        return read + write, read + write + sync

    def run_copy(self, models: Sequence[Path]) -> Usage:
        """Copy the weights of models, and wait until they are on the disk."""
        out = self.workdir / "out-floor"
        self.clear(out)
        out.mkdir()
        copied = self._measure("cp", ["cp", "--reflink=never", *weights(models), out])
        synced = self._measure("sync", ["sync", *weights([out])])
        self.clear(out)
        return copied + synced

    def warm(self, inputs: Sequence[Path]) -> None:
        """Read the inputs into the page cache, and wait for what earlier runs still had to write."""
        os.sync()
        subprocess.run(["sh", "-c", 'cat "$@" > /dev/null', "sh", *weights(inputs)], check=True)

    def cool(self, inputs: Sequence[Path]) -> None:
        """Drop the inputs from the page cache, and wait for what earlier runs still had to write."""
        os.sync()
        for path in weights(inputs):
            with path.open("rb") as file:
                os.fsync(file.fileno())  # pages that wait to be written are not dropped
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def clear(self, out: Path) -> None:
        """Delete an output directory."""
        shutil.rmtree(out, ignore_errors=True)

    @property
    def raymerge_out(self) -> Path:
        """Where raymerge writes."""
        return self.workdir / "out-raymerge"

    @property
    def mergekit_out(self) -> Path:
        """Where mergekit writes."""
        return self.workdir / "out-mergekit"

    def _measure(
        self, tool: str, command: Sequence[str | Path], env: dict[str, str] | None = None, is_sampled: bool = False
    ) -> Usage:
        log = self.workdir / f"{tool}.log"
        return measure(command, log=log, env=OFFLINE | (env or {}), is_sampled=is_sampled)


def weights(models: Sequence[Path]) -> list[Path]:
    """Return the weight files of these checkpoints."""
    return [file for model in models for file in sorted(model.glob("*.safetensors"))]


LINEAR = Merge("linear", weights=(0.5, 0.3, 0.2))
TASK_ARITHMETIC = Merge("task_arithmetic", weights=(0.5, 0.3, 0.2), has_base=True)
SLERP = Merge("slerp", shared={"t": 0.4}, has_base=True, num_models=1)
TIES = Merge("ties", weights=(0.5, 0.3, 0.2), densities=(0.5,) * 3, has_base=True)
DARE_TIES = Merge("dare_ties", weights=(0.5, 0.3, 0.2), densities=(0.5,) * 3, has_base=True)
DARE_LINEAR = Merge("dare_linear", weights=(0.5, 0.3, 0.2), densities=(0.5,) * 3, has_base=True)
PASSTHROUGH = Merge("passthrough", num_models=1)
