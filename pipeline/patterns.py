"""Regular expressions of users, searched in time that is linear in the text."""

from __future__ import annotations

from functools import lru_cache

import re2


@lru_cache(maxsize=64)
def compile_pattern(pattern: str) -> re2.Pattern:
    """Return a regular expression of RE2, which has neither look-around nor back-references.

    >>> compile_pattern("a(b")
    Traceback (most recent call last):
    ...
    ValueError: missing ): a(b

    Raises:
        ValueError: it is none, saying why; the library's own log keeps quiet.
    """
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(pattern, options)
    except re2.error as error:
        raise ValueError(error.args[0].decode(errors="replace") if error.args else "too large") from error
