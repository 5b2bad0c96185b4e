"""The campaigns by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.fuzz.campaign import Campaign
from tests.fuzz.configs import Configs
from tests.fuzz.headers import Headers
from tests.fuzz.hubs import Hubs
from tests.fuzz.manifests import Manifests
from tests.fuzz.models import ModelFiles, TokenizerFiles

CAMPAIGNS: Mapping[str, Callable[[Path], Campaign[Any]]] = {
    "configs": Configs,
    "headers": Headers,
    "hubs": Hubs,
    "manifests": Manifests,
    "models": ModelFiles,
    "tokenizers": TokenizerFiles,
}
"""Each is given an empty directory."""
