"""Checks here what would fail on the machines of a cluster, before a merge is sent there."""

from __future__ import annotations

from functools import partial
from pathlib import Path, PurePath

from raymerge.ops.own import read_own_ops
from raymerge.pipeline.checkpoint.checkpoint import is_repository
from raymerge.pipeline.checkpoint.find import find_models
from raymerge.pipeline.cli.console import say
from raymerge.pipeline.config.merge_config import MergeConfig
from raymerge.pipeline.config.reader import load_config
from raymerge.pipeline.errors import CheckpointError, ConfigError, FetchError
from raymerge.pipeline.options import MergeOptions
from raymerge.pipeline.redact import redact
from raymerge.pipeline.stores.open import open_stores
from raymerge.pipeline.stores.settings import StoreSettings
from raymerge.pipeline.urls import scheme_of


def load_portable(config: Path, out: str, options: MergeOptions, *, with_plan: bool) -> MergeConfig:
    """Return the config of a merge that other machines can carry out; its warnings are printed.

    Args:
        config: its file.
        out: path or URL of the output.
        options: of the merge.
        with_plan: whether to plan it here, for which the headers of its inputs are read.

    Raises:
        RaymergeError: whatever would go wrong there, as far as it can be known here.
    """
    own = None if options.ops is None else read_own_ops(options.ops)
    with open_stores(StoreSettings(options.storage)) as stores:
        loaded = load_config(config, strict=options.strict, own=own, find=partial(find_models, stores))
    check_portable(loaded, out, shared_filesystem=options.shared_filesystem)
    warnings = loaded.warnings
    if with_plan:
        from raymerge.pipeline import driver

        try:
            warnings = driver.plan(config, options, out=out).warnings
        except (CheckpointError, FetchError) as error:
            raise type(error)(f"{error}; if only the cluster's machines can read it, say --no-plan") from None
    for warning in warnings:
        say(redact(f"warning: {warning}"))
    return loaded


def check_portable(config: MergeConfig, out: str, *, shared_filesystem: bool) -> None:
    """Refuse inputs and outputs that the machines of a cluster would not find, as far as this one can tell.

    Args:
        config: of the merge.
        out: path or URL of the output.
        shared_filesystem: whether absolute paths mean the same files everywhere.

    Raises:
        ConfigError: it names paths of this machine, or has a credential in it.
    """
    parts = (part for model in config.input_models for part in (model, model.adapter))
    models = (*filter(None, parts), *config.statistics_places)
    names = [out, *(model.path for model in models if not is_repository(model.path))]
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
    if config.chat_template is not None and config.chat_template.is_file and not shared_filesystem:
        raise ConfigError(
            f"chat_template: {config.chat_template.origin} is a file of this machine, which the cluster does not have;"
            " write its text in the config, after `chat_template: |`"
        )
    for where, text in (("the output", out), ("the config", config.text)):
        if redact(text) != text:
            raise ConfigError(
                f"{where} has a credential in it, which everybody who may see the cluster could read; take it out, and"
                " give the cluster's machines theirs: a role, the environment, or files in the home directory"
            )
