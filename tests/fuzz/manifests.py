"""Mutated manifests and journals of models, and mutated invocations of `raymerge manifest`."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
from pathlib import Path
from random import Random
from typing import NamedTuple

import typer
import yaml
from typer.main import get_command

from raymerge import RaymergeError
from raymerge.pipeline import driver
from raymerge.pipeline.checkpoint.inspection.inspect import inspect
from raymerge.pipeline.checkpoint.manifest import MANIFEST
from raymerge.pipeline.cli.app import commands
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.output.journal import DIRECTORY, Journal
from raymerge.pipeline.output.verify import verify
from raymerge.pipeline.plan.results import ShardResult
from raymerge.pipeline.progress.events import Event
from raymerge.pipeline.stores.open import open_stores
from tests.checkpoints import write_config, write_llama
from tests.fuzz.campaign import Campaign, write
from tests.fuzz.mutation import NUMBERS, VALUES, dump, mutate, parse_pairs, spoil

_OPTIONS: dict[str, tuple[str, ...]] = {
    "--name": ("x", "X_y", "a" * 60, "it's", "é", "", "\t", "-x", "$(id)", "a\nb", "\udcff"),
    "--nodes": ("1", "0", "-1", "1e3", "9" * 30, "4.5", "٤"),
    "--gpus": ("0", "2", "-1", "x"),
    "--setup": ("pip install x", "echo 'a", "x\n#y", "hf_abcdefgh12345678", "\udcff", ""),
    "--env": ("A=b", "A=", "=b", "A", "é=1", "A=\U0001f600\u2028",
              "A=$HOME'\"", "TOKEN=hf_abcdefgh12345678", "A=\x1b[31m"),
    "--image": ("registry/x:1", "<image>", "example.com/x", "", " ", "a\u0085b"),
    "--wheel": ("https://h/x.whl", "/no/x.whl", "http://[::1", "s3://b/x.whl", "a" * 5000, "\udcff", "//"),
    "--cpus": ("8", "0", "1" * 400),
    "--node-memory": ("64GiB", "1B", "-1GiB", "1e400GiB", "NaN", "9" * 5000, "x", "64 GiB", "١GiB"),
    "--time": ("1:00:00", "0:00:00", "1:60:00", "99999:00:00", "x", "١:00:00", "1:00"),
    "--memory": ("8GiB", "0", "inf", "-8GiB"),
    "--workers": ("2", "0", "x"),
    "--partition": ("p", "a b", "'"),
    "--namespace": ("ns", "NS", "a" * 64),
    "--execution-role": ("arn:aws:iam::999999999999:role/starter", "arn:aws:iam::123456789012:role/x", "x"),
    "--env-secret": ("s3", "S", "A=arn:aws:secretsmanager:x:999999999999:secret:h"),
    "--attempts": ("3", "0", "11"),
    "--seed": ("0", "-1", "9" * 5000),
}  # fmt: skip
_KINDS = ("kuberay", "slurm", "aws-batch", "ray-up")
_OUTS = (
    "s3://bucket/out",
    "hf://me/x",
    "out",
    "http://[::1",
    "s3://",
    "gs://b/x y",
    "s3://k:hf_abcdefgh12345678@b",
    "\udcff",
)


class ManifestCase(NamedTuple):
    """A file in place of a model's manifest or journal, or the arguments of `raymerge manifest`."""

    name: str
    content: bytes
    arguments: tuple[str, ...] = ()


class Manifests(Campaign[ManifestCase]):
    """A finished model, an interrupted merge, and a config for schedulers."""

    def __init__(self, directory: Path) -> None:
        model = write_llama(directory / "m", 0, num_layers=1)
        self._config = {"merge_method": "passthrough", "models": [{"model": str(model)}]}
        self._portable = write_config(directory / "merge.yml", {**self._config, "models": [{"model": "org/a"}]})
        self._out, self._resumed = directory / "out", directory / "resumed"
        driver.merge(self._config, self._out)
        self._manifest = (self._out / MANIFEST).read_bytes()
        with contextlib.suppress(ConfigError):
            driver.merge(self._config, self._resumed, on_event=self._interrupt)
        self._journal = {path.name: path.read_bytes() for path in (self._resumed / DIRECTORY).glob("*.json")}
        self._printed = ""

    def _interrupt(self, event: Event) -> None:
        """Leave a journal as a merge does that ends once its shard is finished."""
        if isinstance(event, ShardResult):
            raise ConfigError("interrupted")

    def make(self, random: Random) -> ManifestCase:
        kind = random.random()
        if kind < 0.5:
            options = [
                x
                for name in random.sample([*_OPTIONS], random.randint(0, 4))
                for x in (name, random.choice(_OPTIONS[name]))
            ]
            sound = ["--no-plan", "--image", "registry/x:1", "--execution-role", "arn:aws:iam::999999999999:role/s"]
            kind_of_job = random.choice(_KINDS)
            sound = {"aws-batch": sound, "slurm": sound[:1]}.get(kind_of_job, sound[:3])
            out = random.choice(_OUTS) if random.random() < 0.3 else _OUTS[0]
            return ManifestCase("", b"", ("manifest", kind_of_job, str(self._portable), out, *sound, *options))
        name, content = random.choice([(MANIFEST, self._manifest), *self._journal.items()])
        values = (*VALUES, *NUMBERS, '"model.safetensors"', '"0"', '"/etc/passwd"', '"config.json/x"')
        return ManifestCase(name, spoil(dump(mutate(parse_pairs(content), random, values)), random))

    def attempt(self, case: ManifestCase) -> None:
        if case.arguments:
            self._call(case.arguments)
        elif case.name == MANIFEST:
            write(self._out / MANIFEST, case.content)
            inspect(self._out)
            with contextlib.suppress(RaymergeError):
                driver.check_output(driver.plan(self._config), self._out, overwrite=False)
            verify(self._out, workers=1)
        else:
            for name, content in self._journal.items():
                write(self._resumed / DIRECTORY / name, case.content if name == case.name else content)
            plan = driver.plan(self._config)
            driver.check_output(plan, self._resumed, overwrite=False)
            with open_stores() as stores:
                Journal(stores, str(self._resumed), plan.fingerprint).read_records(t.outputs[0] for t in plan.tasks)

    def _call(self, arguments: tuple[str, ...]) -> None:
        """Run the command line as its entry point does, and keep what it prints."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            try:
                get_command(commands).main(list(arguments), prog_name="raymerge", standalone_mode=False)
            except typer.TyperException as error:
                raise ConfigError(error.format_message() or "usage") from error
        self._printed = printed.getvalue()

    def explain_refusal(self, case: ManifestCase) -> str:
        if case.name == MANIFEST:
            stated, sound = (json.loads(content)["files"] for content in (case.content, self._manifest))
            return "" if stated == sound else "other files are stated than are there"
        if not case.arguments:
            return ""
        if case.arguments[1] == "slurm":
            shell = subprocess.run(["bash", "-n"], input=self._printed.encode(), capture_output=True, check=False)
            return shell.stderr.decode()
        try:
            return "" if all(isinstance(each, dict) for each in yaml.safe_load_all(self._printed)) else "no mappings"
        except yaml.YAMLError as error:
            return str(error)
