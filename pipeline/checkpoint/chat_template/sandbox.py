"""Renders a chat template in a process of its own: `python -P sandbox.py`, JSON on stdin and stdout.

Knows the library and Jinja, and nothing of raymerge, so that the process starts in a tenth of a second.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

_CPU_SECONDS = 2
_MAX_NBYTES = 2**30
"""Limit of the address space, in bytes."""
_MAX_LENGTH = 2**20
"""Characters that a template may make of a conversation of a few words."""


def render(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a template makes of a conversation, or why it makes nothing.

    Args:
        request: `template`; `conversations`, of which the first that it takes counts; and `tokens` by their names.
    """
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import CallBlock, Node
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, around what an assistant says."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return CallBlock(self.call_method("_pass"), [], [], body).set_lineno(line)

        def _pass(self, caller: Any) -> Any:
            return caller()

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    environment.filters["tojson"] = _to_json
    try:
        template = environment.from_string(request["template"])
    except jinja2.TemplateSyntaxError as error:
        return {"problem": "syntax", "said": f"line {error.lineno}: {error.message}"}
    except RecursionError:
        return {"problem": "syntax", "said": "it is nested too deeply"}
    said = ""
    for messages in request["conversations"]:
        try:
            pieces, length = [], 0
            for piece in template.generate(messages=messages, add_generation_prompt=True, **request["tokens"]):
                pieces.append(piece)
                length += len(piece)
                if length > _MAX_LENGTH:
                    return {"problem": "size", "said": f"more than {_MAX_LENGTH:,} characters"}
            return {"rendered": "".join(pieces)}
        except MemoryError:
            return {"problem": "size", "said": "more memory than there is for it"}
        except Exception as error:
            said = said or f"{type(error).__name__}: {error}"[:300]
    return {"problem": "refusal", "said": said}


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)


def main() -> None:
    """Read a request, and write what came of it."""
    try:
        import resource
    except ImportError:  # Windows: the parent's patience is the only bound
        pass
    else:
        import jinja2.sandbox  # noqa: F401  with the files that it needs

        resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS + 1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        if sys.platform == "linux":
            resource.setrlimit(resource.RLIMIT_AS, (_MAX_NBYTES, _MAX_NBYTES))
    json.dump(render(json.load(sys.stdin)), sys.stdout)


if __name__ == "__main__":
    main()
