"""Settings of the stores that the user may choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Library = Literal["auto", "fsspec"]
"""The library for object stores and the web: the fastest for each, or fsspec for all."""


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """The user's choices; the same in every process of a merge."""

    library: Library = "auto"
    private: bool = True
    """Whether a repository that is made on the Hub is private."""


DEFAULTS = StoreSettings()
