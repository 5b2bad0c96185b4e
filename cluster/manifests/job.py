"""A merge as a job of a scheduler, from which every kind of manifest is made."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import yaml

from raymerge.cluster.errors import ManifestError
from raymerge.cluster.ray.session import SETTINGS, STORE_NBYTES

CONFIG_FILE = "merge.yml"
"""Name of the config on the head."""

_PLACEHOLDER = re.compile(
    r"\b(?:123456789012|012345678901|111122223333|444455556666|777788889999|000000000000)\b"  # AWS's examples
    r"|\bexample\.(?:com|org|net)\b|<[^<>]*>"
)

_OVERHEAD_NBYTES = 2 * 2**30
"""Memory of a node that Ray itself takes, and on the head the driver."""


@dataclass(frozen=True, slots=True)
class Wheel:
    """The wheel of raymerge that the machines install before Ray starts."""

    source: str
    """URL from which pip fetches it, or path on this machine of the file that is sent along."""
    content: bytes | None
    """Content of the file that is sent along; None where pip fetches it."""

    @property
    def name(self) -> str:
        """The file's name, from which pip knows what it is."""
        return PurePosixPath(urlsplit(self.source).path).name


@dataclass(frozen=True, slots=True)
class Job:
    """A merge, and the number of machines it runs on."""

    name: str
    config: str
    """The config's YAML."""
    arguments: tuple[str, ...]
    """Arguments of `raymerge merge` after the config."""
    wheel: Wheel | None
    """None where the machines have raymerge."""
    setup: str
    """Shell commands that run on every machine before Ray starts; may be empty."""
    environment: tuple[tuple[str, str], ...]
    """Names and values for all machines; no secrets."""
    num_nodes: int
    """Machines that merge."""
    comment: str
    """Text of the first lines: how the manifest was made, and how to run it."""

    def command(self, config: str) -> str:
        """Return the command line of the merge, for a shell.

        Args:
            config: path of the config on the head.
        """
        return shlex.join(["raymerge", "merge", config, *self.arguments])

    def preparation(self, directory: str = "") -> str:
        """Return the shell commands that run on every machine before Ray starts.

        Args:
            directory: where the machines find a wheel that is sent along.
        """
        if self.wheel is None:
            return self.setup
        source = self.wheel.source if self.wheel.content is None else f"{directory}/{self.wheel.name}"
        before = f"{{ {self.setup}\n}} && " if self.setup else ""
        return f"{before}pip install --quiet {shlex.quote(source)}"

    def variables(self) -> dict[str, str]:
        """Return the environment of all machines: Ray's settings, which it reads when it starts, and the job's own."""
        return SETTINGS | dict(self.environment)


@dataclass(frozen=True, slots=True)
class NodeSize:
    """Size of each machine that merges."""

    num_cpus: int
    mem_nbytes: int
    num_gpus: int

    @property
    def work_nbytes(self) -> int:
        """Memory that Ray may give to work, in bytes."""
        return self.mem_nbytes - _OVERHEAD_NBYTES

    def ray_options(self) -> dict[str, str]:
        """Return the options of `ray start` for a share of a machine, whose size Ray cannot detect."""
        return {
            "num-cpus": str(self.num_cpus),
            "num-gpus": str(self.num_gpus),
            "memory": str(self.work_nbytes),
            "object-store-memory": str(STORE_NBYTES),
        }


def read_start_script() -> str:
    """Return the script that every node runs where nothing else starts Ray."""
    script = files("raymerge.cluster.manifests").joinpath("start_node.sh").read_text("utf-8")
    return script.partition("\n")[2]  # less the line that names the shell


def start_variables(job: Job, size: NodeSize) -> dict[str, str]:
    """Return the environment of that script, except for what the scheduler adds when the job runs."""
    return {
        **job.variables(),
        "RAY_AUTH_MODE": "token",
        "RAYMERGE_SETUP": job.preparation(),
        "RAYMERGE_COMMAND": job.command(CONFIG_FILE),
        "RAYMERGE_RAY_OPTIONS": shlex.join(f"--{name}={value}" for name, value in size.ray_options().items()),
    }


def check_values(target: Any, wheel: Wheel | None) -> None:
    """Refuse placeholders: values that only stand for the user's.

    Args:
        target: dataclass of what only one kind of manifest needs.
        wheel: what the machines install.

    Raises:
        ManifestError: naming the field and the placeholder.
    """
    for field, value in {**asdict(target), "wheel": wheel and wheel.source}.items():
        if found := _PLACEHOLDER.search(str(value)):
            raise ManifestError(f"has {found[0]} in it, which stands for a value of yours: put that there", field)


def comment_lines(text: str) -> str:
    r"""Return a text as comments of a shell script or YAML.

    >>> comment_lines("a\nb")
    '# a\n# b\n'
    """
    return "".join(f"# {line}".rstrip() + "\n" for line in text.splitlines())


def dump_documents(comment: str, *documents: Mapping[str, object]) -> str:
    """Return a YAML file; texts of several lines stay readable."""
    dumped = (yaml.dump(dict(document), Dumper=_Dumper, sort_keys=False, width=120) for document in documents)
    return comment_lines(comment) + "---\n".join(dumped)


def check_nbytes(what: str, nbytes: int, most: int) -> None:
    """Check a size against a scheduler's limit.

    Raises:
        ManifestError: it does not.
    """
    if nbytes > most:
        raise ManifestError(
            f"{what} would have {nbytes:,} bytes with the config in it, and {most:,} are allowed; leave comments out of"
            " the config, or merge on a cluster that runs already"
        )


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as they are."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)
