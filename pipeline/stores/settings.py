"""What the user may choose of the stores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Library = Literal["auto", "fsspec"]
"""What serves object stores and the web: the fastest library for each, or fsspec for all."""


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """What the user may choose; the same in every process of a merge."""

    library: Library = "auto"
    private: bool = True
    """Whether a repository that is made on the Hub is private."""


DEFAULTS = StoreSettings()
