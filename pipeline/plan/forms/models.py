"""`models`: whole models, merged tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from raymerge.ops.registry import find_op
from raymerge.pipeline.checkpoint.names import natural_key
from raymerge.pipeline.checkpoint.views.tying import is_head
from raymerge.pipeline.config.merge_config import MergeConfig
from raymerge.pipeline.errors import TensorMismatchError
from raymerge.pipeline.messages import counted
from raymerge.pipeline.plan.forms.form import Form, Input, Model, OutputTensor, say_architectures
from raymerge.pipeline.plan.sources.accounts import count_tensors
from raymerge.pipeline.plan.sources.resolve import Scope


class WholeModels(Form):
    """Every tensor with the same name in every model."""

    @staticmethod
    def is_used(config: MergeConfig) -> bool:
        """Tell whether there are entries under `models`."""
        return bool(config.models)

    def list_tensors(self) -> Iterator[OutputTensor]:
        """Yield the tensors in natural order of their names."""
        refs = [entry.model for entry in self.config.entries]
        _check_depths([self.models[ref] for ref in refs])
        self.share_head(refs, refs)
        owned = [frozenset(self.models[ref].view.names()) for ref in refs]
        rest = self._list_rest()
        scope = self.make_scope(self.config.base_model, ())
        names = dict.fromkeys([*(name for ref in refs for name in self.models[ref].view.names()), *rest])
        copied = []
        for name in sorted(names, key=natural_key):
            has = [name in names for names in owned]
            output = self._make_tensor(name, has, scope, is_rest=name in rest)
            if output.inputs[0].view.ref == self.config.copy_rest_from and output.scope is not scope:
                copied.append(name)
            yield output
        if copied:
            self.notes.append(f"copied from {self.config.copy_rest_from}: {count_tensors(copied)}")

    def explain_unused(self, model: Model, name: str) -> str:
        """Return the rule for a model that only lends its files."""
        if self.config.copy_rest_from == model.ref:
            return "the merged models have these"
        return "the model is named, but none of its tensors is merged"

    def _list_rest(self) -> frozenset[str]:
        """Return the tensors of the model from which the rest is copied; whether there is a head follows the others."""
        if self.config.copy_rest_from is None:
            return frozenset()
        names = self.models[self.config.copy_rest_from].view.names()
        return frozenset(name for name in names if not is_head(name))

    def _make_tensor(self, name: str, has: Sequence[bool], scope: Scope, *, is_rest: bool) -> OutputTensor:
        """Return an output tensor.

        Args:
            name: of the tensor.
            has: for each entry, whether its model has it.
            scope: of merged tensors.
            is_rest: whether the model from which the rest is copied has it.
        """
        entries, giver = self.config.entries, self.config.copy_rest_from
        taken = [entry for entry in entries if name not in self.models[entry.model].lacks]
        inputs = [Input(self.models[entry.model].view, name, (entry.parameters,)) for entry in taken]
        is_copied = len(inputs) == 1 < len(entries)
        if giver is not None and is_rest:
            others = [entry.model for entry, is_there in zip(entries, has, strict=True) if is_there]
            is_without_base = any(entry.model == scope.base and entry not in taken for entry in entries)
            if is_without_base or (len(others) < len(entries) and set(others) <= {giver}):
                is_copied, inputs = True, [Input(self.models[giver].view, name)]
        elif giver is not None and not is_head(name):  # its config.json has no place for this one
            inputs.append(Input(self.models[giver].view, name))
        if is_copied:
            inputs = [Input(inputs[0].view, name)]
            scope = replace(scope, op=find_op("passthrough"), base=None, settings=())
        return OutputTensor(name, self.donor.layers.position(name), tuple(inputs), scope)


def _check_depths(models: Sequence[Model]) -> None:
    first = models[0]
    for model in models[1:]:
        if model.layers.num_layers != first.layers.num_layers:
            advice = say_architectures(first, model) or "name the layers to merge with `slices`"
            raise TensorMismatchError(
                f"{first.ref} has {counted(first.layers.num_layers, 'layer')} and {model.ref} has"
                f" {model.layers.num_layers}; {advice}"
            )
