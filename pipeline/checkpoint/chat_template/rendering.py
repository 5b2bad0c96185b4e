"""Checks a chat template: whether it parses, ends, and makes something of a conversation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_SANDBOX = Path(__file__).parent / "sandbox.py"
_PATIENCE_SECONDS = 60
"""The process has 2 s of the processor; on a machine with a lot to do they take longer."""
_VARIABLES = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "SYSTEMROOT")
"""Environment variables that Python needs; the process of a template gets no others."""

_TALK = (("user", "What is 2 + 2?"), ("assistant", "4"), ("user", "And 3 + 3?"))
_PLAIN = [{"role": role, "content": text} for role, text in _TALK]
_CONVERSATIONS = (
    [{"role": "system", "content": "Be brief."}, *_PLAIN],
    _PLAIN,
    [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in _TALK],
)
"""The same with a system message, which some templates refuse, without, and as models that see images have it."""


@dataclass(frozen=True, slots=True)
class Rendering:
    """The result of a template."""

    text: str
    """Empty where there is none."""
    problem: str
    """Empty if all is well."""
    is_fatal: bool
    """Whether no conversation could be rendered: it does not parse, does not end, or grows without bounds."""


def render(template: str, tokens: Mapping[str, str]) -> Rendering:
    """Render a conversation by a template that nobody trusts.

    Args:
        template: in Jinja.
        tokens: special tokens by the names that templates have for them, such as bos_token.
    """
    request = json.dumps({"template": template, "conversations": _CONVERSATIONS, "tokens": tokens})
    environment = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    command = [sys.executable, "-P", str(_SANDBOX)]
    try:
        done = subprocess.run(
            command, input=request, capture_output=True, text=True, timeout=_PATIENCE_SECONDS, env=environment
        )
    except subprocess.TimeoutExpired:
        return _fail("it does not end")
    if done.returncode:
        if done.returncode < 0:
            return _fail("it does not end within the 2 s and 1 GiB that it gets for four messages")
        return _fail(f"it cannot be rendered here: {done.stderr.strip().rpartition(chr(10))[2][:300]}")
    answer = json.loads(done.stdout)
    match answer.get("problem"):
        case None:
            is_empty = not answer["rendered"].strip()
            return Rendering(answer["rendered"], "it makes nothing of a conversation" if is_empty else "", False)
        case "syntax":
            return _fail(f"it is no Jinja: {answer['said']}")
        case "size":
            return _fail(f"it takes {answer['said']} for four messages")
    return Rendering("", f"it refuses a plain conversation: {answer['said']}", is_fatal=False)


def _fail(problem: str) -> Rendering:
    return Rendering("", problem, is_fatal=True)
