"""`models`: whole models, merged tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from raymerge.ops.registry import find_op
from raymerge.pipeline.checkpoint.names import natural_key
from raymerge.pipeline.config.merge_config import MergeConfig
from raymerge.pipeline.errors import TensorMismatchError
from raymerge.pipeline.messages import counted
from raymerge.pipeline.plan.forms.form import Form, Input, Model, OutputTensor


class WholeModels(Form):
    """Every tensor with the same name in every model."""

    @staticmethod
    def is_used(config: MergeConfig) -> bool:
        """Tell whether there are entries under `models`."""
        return bool(config.models)

    def list_tensors(self) -> Iterator[OutputTensor]:
        """Yield the tensors in natural order of their names."""
        entries = self.config.entries
        refs = [entry.model for entry in entries]
        _check_depths([self.models[ref] for ref in refs])
        self.share_head(refs, refs)
        views = [self.models[ref].view for ref in refs]
        scope = self.make_scope(self.config.base_model, ())
        copying = replace(scope, op=find_op("passthrough"), base=None, settings=())
        names = dict.fromkeys(name for view in views for name in view.names())
        for name in sorted(names, key=natural_key):
            inputs = [
                Input(view, name, (entry.parameters,))
                for view, entry in zip(views, entries, strict=True)
                if name not in self.models[entry.model].lacks
            ]
            is_copied = len(inputs) == 1 < len(views)
            if is_copied:
                inputs = [Input(inputs[0].view, name)]
            position = self.donor.layers.position(name)
            yield OutputTensor(name, position, tuple(inputs), copying if is_copied else scope)

    def explain_unused(self, model: Model, name: str) -> str:
        """Return the rule for a model that only lends its files."""
        return "the model is named, but none of its tensors is merged"


def _check_depths(models: Sequence[Model]) -> None:
    first = models[0]
    for model in models[1:]:
        if model.layers.num_layers != first.layers.num_layers:
            raise TensorMismatchError(
                f"{first.ref} has {counted(first.layers.num_layers, 'layer')} and {model.ref} has"
                f" {model.layers.num_layers}; name the layers to merge with `slices`"
            )
