"""README and docs as a reader takes them: commands to type, files to write, Python to run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = tuple(
    str(path.relative_to(ROOT))
    for path in [*ROOT.glob("*.md"), *sorted(ROOT.glob("docs/*.md")), *ROOT.glob("benchmarks/*.md")]
)

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_OPERATORS = {"|", ">", "&&", ";", "||", ">>", "<"}


def read_blocks(page: str, language: str) -> list[str]:
    """Return the fenced blocks of a language on a page."""
    return [text for kind, text in _FENCE.findall((ROOT / page).read_text()) if kind == language]


def read_commands(page: str, program: str) -> list[list[str]]:
    """Return the commands of a program on a page: the words after its name, up to the next operator of the shell."""
    return [words[1:] for words in _read_words(page) if words[0] == program]


def _read_words(page: str) -> Iterator[list[str]]:
    """Yield the words of each command in what is indented as code."""
    text = _FENCE.sub("", (ROOT / page).read_text())
    for line in re.findall(r"^ {4}(?! )(.*)$", text, re.MULTILINE):
        lexer = shlex.shlex(re.sub(r"(^|\s)#.*", "", line), posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        words: list[str] = []
        try:
            for word in lexer:
                if word in _OPERATORS:
                    if words:
                        yield words
                    words = []
                else:
                    words.append(word)
        except ValueError:  # YAML or output with an odd quote in it
            continue
        if words:
            yield words
