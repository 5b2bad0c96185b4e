"""Zip files, named by their content, in which this package and the merge's config are sent to a cluster."""

from __future__ import annotations

import hashlib
import io
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import raymerge

_SUFFIXES = (".py", ".sh")

_EPOCH = (1980, 1, 1, 0, 0, 0)
"""Time stamp of every file in a zip file, so that the same content gives the same name."""


@dataclass(frozen=True, slots=True)
class Package:
    """A zip file that Ray unpacks for the workers of a job."""

    content: bytes

    @property
    def name(self) -> str:
        """Return the file's name, a hash of its content: a cluster that has it is not sent it again."""
        return f"_ray_pkg_{hashlib.sha256(self.content).hexdigest()[:32]}.zip"

    @property
    def uri(self) -> str:
        """Return the URI for a runtime environment."""
        return f"gcs://{self.name}"


def pack_raymerge() -> Package:
    """Return the package that runs here; on workers it takes precedence over an installed one."""
    root = Path(next(iter(raymerge.__path__)))
    files = {}
    for directory, names, file_names in os.walk(root, followlinks=True):  # an editable install consists of links
        names[:] = sorted(name for name in names if name != "__pycache__")
        for name in sorted(file_names):
            path = Path(directory, name)
            if name.startswith(".") or not (path.suffix in _SUFFIXES or name == "py.typed"):
                continue  # what an editor or a tool has left there
            files[f"raymerge/{path.relative_to(root).as_posix()}"] = path.read_bytes()
    return pack_files(files)


def pack_files(files: Mapping[str, bytes]) -> Package:
    """Return files as a package.

    Args:
        files: their content by name.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name, _EPOCH)
            info.external_attr = 0o644 << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, content)
    return Package(buffer.getvalue())


def list_requirements() -> list[str]:
    """Return the requirements of raymerge besides Ray, which a cluster has, as pip understands them."""
    needs = [need for need in metadata.requires("raymerge") or () if "extra ==" not in need.partition(";")[2]]
    return [need for need in needs if not re.match(r"ray\b", need)]
