"""Refuses configs and outputs that mean something else on the machines of a cluster."""

from __future__ import annotations

from pathlib import PurePath

from raymerge.pipeline.checkpoint.checkpoint import is_repository
from raymerge.pipeline.config.merge_config import MergeConfig
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.redact import redact
from raymerge.pipeline.urls import scheme_of


def check_portable(config: MergeConfig, out: str, *, shared_filesystem: bool) -> None:
    """Make sure that the machines of a cluster find what a merge is to read and write, as far as this one can tell.

    Args:
        config: of the merge.
        out: path or URL of the output.
        shared_filesystem: whether absolute paths mean the same files everywhere.

    Raises:
        ConfigError: it names paths of this machine, or has a credential in it.
    """
    names = [out, *(model.path for model in config.referenced_models if not is_repository(model.path))]
    paths = [name for name in names if scheme_of(name) == "file"]
    if paths and not shared_filesystem:
        raise ConfigError(
            f"{', '.join(paths)}: paths of this machine, which the cluster does not have; use URLs such as"
            " s3://bucket/model, or say --shared-filesystem if the paths mean the same files everywhere"
        )
    relative = [path for path in paths if "://" not in path and not PurePath(path).is_absolute()]
    if relative:
        raise ConfigError(
            f"{', '.join(relative)}: relative paths, and on the cluster they would begin elsewhere; write absolute ones"
        )
    for where, text in (("the output", out), ("the config", config.text)):
        if redact(text) != text:
            raise ConfigError(
                f"{where} has a credential in it, which everybody who may see the cluster could read; take it out, and"
                " give the cluster's machines theirs: a role, the environment, or files in the home directory"
            )
