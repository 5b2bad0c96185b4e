"""The ways to write a merge: each comes to a list of output tensors, after which all take one path."""

from __future__ import annotations

from collections.abc import Mapping

from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.config.merge_config import MergeConfig
from raymerge.pipeline.plan.forms.form import Form, Model
from raymerge.pipeline.plan.forms.gates import MakeGates
from raymerge.pipeline.plan.forms.models import WholeModels
from raymerge.pipeline.plan.forms.modules import ModuleByModule
from raymerge.pipeline.plan.forms.moe import MixtureOfExperts
from raymerge.pipeline.plan.forms.slices import Slices

_FORMS: tuple[type[Form], ...] = (ModuleByModule, WholeModels, Slices)


def open_form(
    config: MergeConfig, models: Mapping[ModelRef, Model], make_gates: MakeGates | None = None, seed: int = 0
) -> Form:
    """Return the form that a config is written in.

    Args:
        config: the merge, in exactly one form.
        models: the donor first.
        make_gates: makes weights of routers, for a mixture of experts.
        seed: of the merge.
    """
    if make_gates is not None and MixtureOfExperts.is_used(config):
        return MixtureOfExperts(config, models, make_gates, seed)
    form = next(form for form in _FORMS if form.is_used(config))
    return form(config, models)
