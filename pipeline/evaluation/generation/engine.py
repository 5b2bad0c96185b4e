"""A process that has models in memory, and is asked to generate or to measure losses."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import wait
from typing import IO, Any

from raymerge.pipeline.decoding import parse_json
from raymerge.pipeline.errors import MergeError
from raymerge.pipeline.evaluation.generation.child import Child

_MODULES = {
    "transformers": "raymerge.pipeline.evaluation.generation.transformers_worker",
    "vllm": "raymerge.pipeline.evaluation.generation.vllm_worker",
    "lm-eval": "raymerge.pipeline.evaluation.generation.lm_eval_worker",
    "inspect": "raymerge.pipeline.evaluation.generation.inspect_worker",
}
"""The modules that are such a process, by backend."""
_LOOK_SECONDS = 0.5
"""Between calls of `check` while a process has nothing to tell."""
_TAIL_LINES = 3
_TAIL_CHARS = 600


class EngineError(MergeError):
    """The library cannot do it with this model, or its process has died."""


class Engine:
    """Such a process; started when it is first asked, and again after it has died."""

    def __init__(self, backend: str, environment: Mapping[str, str] | None = None, timeout: float = math.inf) -> None:
        """Begin.

        Args:
            backend: which library it uses.
            environment: variables that it has besides.
            timeout: seconds after which it is given up if it tells nothing.
        """
        self._module = _MODULES[backend]
        self._is_fresh_for_each = backend == "vllm"  # which does not let go of a model's memory
        self._digest = ""
        self.timeout = timeout
        """Seconds after which it is given up if it tells nothing."""
        self.environment = dict(environment or {})
        """Variables that it has besides; a command gets them, too."""
        self._child: Child | None = None
        self._errors: IO[bytes] | None = None

    def ask(self, request: Mapping[str, Any], check: Callable[[], None]) -> Iterator[dict[str, Any]]:
        """Yield the answers to a request, as they come.

        Args:
            request: JSON.
            check: called after each answer, and now and then while there is none; raises when the run is to end.

        Raises:
            EngineError: the request has failed; the next one may not.
        """
        if self._is_fresh_for_each and self._digest != request["digest"]:
            self.close()
            self._digest = request["digest"]
        process = self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write((json.dumps(request) + "\n").encode())
            process.stdin.flush()
            for line in self._read_lines(process.stdout, check):
                answer: dict[str, Any] = parse_json(line)
                if answer.get("done"):
                    return
                if "failed" in answer:
                    raise EngineError(str(answer["failed"]))
                yield answer
                check()
        except BrokenPipeError:
            pass
        except GeneratorExit:
            self.close()  # it is still at work
            raise
        except BaseException as error:
            if not isinstance(error, EngineError):
                self.close()
            raise
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # its number stays its own until all is ended
        tail = self._read_tail()
        self.close()
        code = process.returncode
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise EngineError(f"the process that had the model {how}{': ' if tail else ''}{tail}")

    def _read_lines(self, pipe: IO[bytes], check: Callable[[], None]) -> Iterator[bytes]:
        """Yield what the process prints, line by line.

        Raises:
            EngineError: it has printed nothing for too long.
        """
        begun = b""
        heard_at = time.monotonic()
        while True:
            if not wait([pipe.fileno()], _LOOK_SECONDS):
                check()
                if time.monotonic() - heard_at > self.timeout:
                    self.close()
                    raise EngineError(f"the model's process has told nothing for {self.timeout:g} s (--timeout)")
                continue
            heard_at = time.monotonic()
            piece = os.read(pipe.fileno(), 2**20)
            if not piece:
                return
            *lines, begun = (begun + piece).split(b"\n")
            yield from lines

    def close(self) -> None:
        """End the process and those that it has started: vLLM's hold a GPU's memory."""
        if self._child is not None:
            self._child.end()
            self._child = None
        if self._errors is not None:
            self._errors.close()
            self._errors = None

    def _start(self) -> subprocess.Popen[bytes]:
        if self._child is None:
            self._errors = tempfile.TemporaryFile(prefix="raymerge-")  # noqa: SIM115  # closed with the process
            self._child = Child(
                [sys.executable, "-P", "-m", self._module],  # modules of the working directory are not ours
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                environment={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **self.environment},
            )
        return self._child.process

    def _read_tail(self) -> str:
        assert self._errors is not None
        self._errors.seek(0)
        text = self._errors.read().decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return " | ".join(lines[-_TAIL_LINES:])[-_TAIL_CHARS:]
