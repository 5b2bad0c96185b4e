"""Sizes as people write them."""

from __future__ import annotations

import re

from raymerge.pipeline.errors import ConfigError

_UNITS = {
    "": 1, "B": 1,
    "K": 10**3, "KB": 10**3, "M": 10**6, "MB": 10**6, "G": 10**9, "GB": 10**9, "T": 10**12, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([A-Za-z]*)\s*")


def parse_nbytes(text: str) -> int:
    """Return a size in bytes.

    >>> parse_nbytes("4GiB"), parse_nbytes("1.5 GB"), parse_nbytes("1000")
    (4294967296, 1500000000, 1000)

    Raises:
        ConfigError: it is not a number with a unit, or not positive.
    """
    match = _SIZE.fullmatch(text)
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigError(f"{text!r} is not a size; write 512MiB, 4GiB or 5GB")
    nbytes = int(float(match[1]) * _UNITS[match[2].upper()])
    if nbytes <= 0:
        raise ConfigError(f"{text!r} is not a size above zero")
    return nbytes


def format_nbytes(nbytes: float) -> str:
    """Return a size for people, in powers of ten.

    >>> format_nbytes(987_654_321), format_nbytes(15_200_000_000), format_nbytes(12)
    ('988 MB', '15.2 GB', '12 B')
    """
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= factor:
            value = nbytes / factor
            return f"{value:.3g} {unit}" if value < 999.5 else f"{value:.0f} {unit}"
    return f"{nbytes:.0f} B"


def format_speed(nbytes: float, seconds: float = 1.0) -> str:
    """Return a speed for people.

    >>> format_speed(987_654_321), format_speed(458_000, 0.5)
    ('988 MB/s', '916 kB/s')
    """
    return f"{format_nbytes(nbytes / max(seconds, 1e-6))}/s"


def format_seconds(seconds: float) -> str:
    """Return a time for people; from a minute on, in hours, minutes and seconds.

    >>> format_seconds(2.34), format_seconds(42.4), format_seconds(83.4), format_seconds(7390)
    ('2.3 s', '42 s', '0:01:23', '2:03:10')
    """
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{int(seconds)} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def format_memory(nbytes: int) -> str:
    """Return a memory size in the unit that `--memory` is given in, rounded up.

    >>> format_memory(536_870_912), format_memory(536_870_913)
    ('512MiB', '513MiB')
    """
    return f"{-(-nbytes // 2**20)}MiB"
