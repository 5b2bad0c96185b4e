"""Several documents: written to a file, and merged one by one to compare."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from raymerge import merge
from tests.checkpoints import read_files, read_tensors

Documents = Mapping[str, dict[str, Any]]
"""By name; the last one is the output, and has none in the file."""

_TELLS_OF_RUN = re.compile(r"\.raymerge/|README\.md|mergekit_config\.yml|raymerge_|model.*\.safetensors")
"""Files that name the inputs, and those that are compared tensor by tensor."""


def write(documents: Documents, file: str = "merge.yml") -> str:
    """Write the documents to a file; return its name."""
    *steps, (_, last) = documents.items()
    parts = [{"name": name, **document} for name, document in steps]
    Path(file).write_text("---\n".join(yaml.safe_dump(part, sort_keys=False) for part in [*parts, last]))
    return file


def merge_separately(documents: Documents, **options: Any) -> Path:
    """Merge one document after the other, each into a directory of its name; return the last one's."""
    for name, document in documents.items():
        merge(document, name, workers=1, **options)
    return Path([*documents][-1])


def check_same(documents: Documents, **options: Any) -> None:
    """Compare one merge of all documents, to `fused`, with separate ones, to directories of their names."""
    merge(write(documents), "fused", **options)
    expected = read_tensors(merge_separately(documents))
    found = read_tensors(Path("fused"))
    assert found.keys() == expected.keys()
    assert [name for name in expected if not is_same(found[name], expected[name])] == []
    files, wanted = (
        {name: content for name, content in read_files(Path(out)).items() if not _TELLS_OF_RUN.match(name)}
        for out in ("fused", [*documents][-1])
    )
    assert files == wanted


def is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether two tensors have the same bits; a NaN is a NaN."""
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(as_bits(one), as_bits(other))


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def entries(*names: str, **parameters: list[Any]) -> list[dict[str, Any]]:
    """Return entries of models, each with its value of each parameter."""
    return [
        {"model": name, "parameters": {key: values[k] for key, values in parameters.items()}}
        for k, name in enumerate(names)
    ]
