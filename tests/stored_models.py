"""Models in stores, and merges of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raymerge import merge
from raymerge.pipeline.stores.open import open_stores
from tests.checkpoints import read_files
from tests.servers.s3 import Store

OWN_FILES = ("raymerge_manifest.json", "README.md", "mergekit_config.yml")
"""These say where the inputs lie."""


def make_config(models: list[str], **more: Any) -> dict[str, Any]:
    """Return a merge by ties; the first model is the base."""
    return {
        "merge_method": "ties",
        "base_model": models[0],
        "models": [{"model": model, "parameters": {"weight": 0.5, "density": 0.6}} for model in models[1:]],
        **more,
    }


def upload(server: Store, bucket: str, prefix: str, directory: Path) -> str:
    """Put a directory below a prefix of a bucket, and return its URL."""
    client = server.client()
    for name, content in read_files(directory).items():
        client.put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=content)
    return f"s3://{bucket}/{prefix}"


def download(url: str) -> dict[str, bytes]:
    """Return the bytes of every file of an output, by relative name."""
    with open_stores() as stores:
        storage = stores.at(url)
        return {name: storage.read(f"{url}/{name}", 2**30) for name in storage.list(url)}


def without_own(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return the files that are the same wherever inputs and output lie."""
    return {name: content for name, content in files.items() if name not in OWN_FILES}


def merge_locally(family: Sequence[Path], out: Path, *, shard_size: str) -> dict[str, bytes]:
    """Merge models on local disk; return the files that the merge has wherever inputs and output lie."""
    merge(make_config(list(map(str, family))), out, shard_size=shard_size)
    return without_own(read_files(out))
