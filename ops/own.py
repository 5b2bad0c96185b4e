"""Ops of the user's own: a Python file that declares them as the files of this package do."""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from raymerge.ops.errors import OpFileError, find_line
from raymerge.ops.registry import Op, list_declared, load_ops

_LOADING = threading.Lock()
"""Held while a file is run: another thread would find its module half made."""


@dataclass(frozen=True)
class OwnOps:
    """A file of ops as it was read.

    Its module is called by what it holds, so that two files do not meet in a process, and unpickling makes the module:
    whatever refers to it can be unpickled after it, in a process or on a machine that has no such file.
    """

    path: str
    """Path of the file, for messages."""
    source: str = field(repr=False)

    @cached_property
    def identity(self) -> str:
        """Hash of its content."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    @cached_property
    def ops(self) -> Mapping[str, Op]:
        """The ops that it declares, by name; see `load`."""
        return self.load()

    def __reduce__(self) -> tuple[Any, ...]:
        return _remake, (self.path, self.source)

    def load(self) -> Mapping[str, Op]:
        """Run the file, unless this process has, and return the ops that it declares, by name.

        Raises:
            OpFileError: it cannot be run, declares nothing, or redefines a name.
        """
        name = f"raymerge_own_ops_{self.identity[:16]}"
        with _LOADING:
            if name not in sys.modules:
                self._run(name)
        declared = list_declared(name)
        if not declared:
            raise OpFileError(f"{self.path} declares no op; put @merge_op before the function that is one")
        if taken := sorted(declared.keys() & load_ops().keys()):
            raise OpFileError(f"{self.path} declares {', '.join(taken)}, and there is a method of that name; rename it")
        return {name: replace(op, origin=f"sha256:{self.identity}") for name, op in declared.items()}

    def _run(self, name: str) -> None:
        module = ModuleType(name, f"Ops of {self.path}.")
        module.__file__ = self.path
        sys.modules[name] = module  # dataclasses look themselves up there
        try:
            exec(compile(self.source, self.path, "exec"), vars(module))
        except BaseException as error:
            del sys.modules[name]
            if not isinstance(error, Exception | SystemExit):
                raise
            what = error.msg if isinstance(error, SyntaxError) else error
            where = f"{self.path}{find_line(error, self.path)}"
            raise OpFileError(f"{where}: {type(error).__name__}: {what}") from error


def read_own_ops(path: str | Path) -> OwnOps:
    """Read a file of ops, and run it.

    Raises:
        OpFileError: it cannot be read or run, declares nothing, or redefines a name.
    """
    try:
        own = OwnOps(str(path), Path(path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise OpFileError(f"cannot read the ops in {path}: {why}") from error
    own.load()
    return own


def _remake(path: str, source: str) -> OwnOps:
    own = OwnOps(path, source)
    own.load()
    return own
