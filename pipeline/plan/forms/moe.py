"""`experts`: a mixture of experts, whose MLPs come from several dense models and all else from their base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from raymerge.ops.lazy import np
from raymerge.ops.registry import Value, find_op
from raymerge.pipeline.checkpoint.dtypes import DTYPES
from raymerge.pipeline.checkpoint.model_config import Json
from raymerge.pipeline.checkpoint.names import COMPUTED_BUFFER, split_name
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.checkpoint.source import PlannedTensor, RandomTensor
from raymerge.pipeline.checkpoint.values import encode
from raymerge.pipeline.checkpoint.views.view import StoredView
from raymerge.pipeline.config.merge_config import Expert, MergeConfig, Mixture
from raymerge.pipeline.config.values import Rule, Setting, Settings
from raymerge.pipeline.errors import TensorMismatchError
from raymerge.pipeline.messages import counted, listing
from raymerge.pipeline.plan.forms.form import Form, Input, Model, OutputTensor
from raymerge.pipeline.plan.forms.gates import ROUTER, Gates, MakeGates
from raymerge.pipeline.plan.forms.layer_kinds import group_layers
from raymerge.pipeline.plan.forms.layouts import BIASES, PROJECTIONS, Layout, choose_layout
from raymerge.pipeline.plan.sources.resolve import Scope
from raymerge.pipeline.stores.inline import make_file

_MLP = "mlp."
_NOISE = "noise"
"""Stands for a model's name where values are drawn."""
_SHOWN = 5


class MixtureOfExperts(Form):
    """The base with several MLPs in each layer, and a router that chooses among them."""

    def __init__(self, config: MergeConfig, models: Mapping[ModelRef, Model], make_gates: MakeGates, seed: int) -> None:
        """Look at a mixture.

        Args:
            config: the merge.
            models: every model that it names, the base first.
            make_gates: makes weights of routers; called once all else is known to fit.
            seed: of the merge, for noise.
        """
        super().__init__(config, models)
        assert config.mixture is not None
        self._mixture: Mixture = config.mixture
        self._make_gates = make_gates
        self._seed = seed
        rests = group_layers(self.donor).get(0, ())
        kept = [rest for rest in rests if not rest.startswith(_MLP) and not rest.endswith(COMPUTED_BUFFER)]
        family = str(self.donor.config.get("model_type"))
        self._layout: Layout = choose_layout(self._mixture, self.donor.ref, family, kept)
        self._has_biases = any(rest in BIASES for rest in kept)

    @staticmethod
    def is_used(config: MergeConfig) -> bool:
        """Tell whether there are experts."""
        return config.mixture is not None

    def list_tensors(self) -> Iterator[OutputTensor]:
        """Yield what the base gives, and for each layer its router and its experts."""
        self._check_experts()
        self.share_head([self.donor.ref], [self.donor.ref])
        base = self.models[self.donor.ref]
        scope = replace(self.make_scope(base.ref, ()), op=find_op("passthrough"), base=None)
        for name in base.view.names():
            split = split_name(name)
            if split is None or split.stack != base.layers.main or not split.rest.startswith(_MLP):
                yield OutputTensor(name, 0.0, (Input(base.view, name),), scope)
        gates = self._make_gates()
        for layer in range(base.layers.num_layers):
            made = {tensor.name: tensor for tensor in self._make_routers(gates, base, layer)}
            if self._layout.needs_biases and not self._has_biases:
                made |= {tensor.name: tensor for tensor in self._make_biases(base, layer)}
            view = StoredView(ModelRef(ROUTER), made)
            yield from (OutputTensor(name, 0.0, (Input(view, name),), scope) for name in made)
            yield from self._list_experts(base, layer, scope)

    def make_config(self, config: Json) -> Json:
        """Have the base's config.json describe a mixture."""
        sizes = [self._find_size(expert) for expert in (*self._mixture.experts, *self._mixture.shared_experts)]
        config, warnings = self._layout.make_config(config, self._mixture, sizes[0], sizes[-1])
        self.warnings += warnings
        return config

    def explain_unused(self, model: Model, name: str) -> str:
        """Return which part of a model goes into no mixture."""
        if model.ref != self.donor.ref:
            return "an expert gives its MLPs; all else comes from the base"
        return "the base's MLPs make way for those of the experts, and it is none of them"

    def _list_experts(self, base: Model, layer: int, scope: Scope) -> Iterator[OutputTensor]:
        layout, prefix = self._layout, f"{base.layers.main}{layer}."
        for number, expert in enumerate(self._mixture.experts):
            names = {part: f"{prefix}{layout.experts.format(number)}{own}" for part, own in layout.projections.items()}
            yield from self._list_expert(expert, base, layer, names, scope)
        for expert in self._mixture.shared_experts:
            names = {part: f"{prefix}{layout.shared}{part}" for part in PROJECTIONS}
            yield from self._list_expert(expert, base, layer, names, scope)

    def _list_expert(
        self, expert: Expert, base: Model, layer: int, names: Mapping[str, str], scope: Scope
    ) -> Iterator[OutputTensor]:
        """Yield the three matrices of one expert in one layer, under the names that they get."""
        model = self.models[expert.model]
        for projection in PROJECTIONS:
            name = f"{model.layers.main}{layer}.{_MLP}{projection}.weight"
            out = f"{names[projection]}.weight"
            scale = expert.residual_scale if projection == "down_proj" else 1.0
            source = model.view.find(name)
            like = base.view.find(f"{base.layers.main}{layer}.{_MLP}{projection}.weight") or source
            its = replace(scope, out_dtype=scope.out_dtype or (like.dtype if like else None))
            if not expert.noise_scale or source is None:
                yield OutputTensor(out, 0.0, (Input(model.view, name, (_set("scale", scale),)),), its)
                continue
            noise = StoredView(
                ModelRef(_NOISE), {out: RandomTensor(_NOISE, out, source.dtype, source.shape, self._seed)}
            )
            inputs = (
                Input(model.view, name, (_set("weight", scale),)),
                Input(noise, out, (_set("weight", scale * expert.noise_scale),)),
            )
            its = replace(its, op=find_op("linear"), settings=(_set("normalize", False),))
            yield OutputTensor(out, 0.0, inputs, its)

    def _make_routers(self, gates: Gates, base: Model, layer: int) -> Iterator[PlannedTensor]:
        """Yield a layer's router, and that of its shared expert if it has one."""
        prefix, num_experts = f"{base.layers.main}{layer}.", len(self._mixture.experts)
        dtype = self._find_dtype(base, f"{prefix}{_MLP}{PROJECTIONS[0]}.weight")
        rows = slice(0, num_experts)
        yield gates.make_tensor(prefix + self._layout.router, layer, rows, dtype)
        if self._layout.shared_router:
            rows = slice(num_experts, num_experts + 1)
            yield gates.make_tensor(prefix + self._layout.shared_router, layer, rows, dtype)

    def _make_biases(self, base: Model, layer: int) -> Iterator[PlannedTensor]:
        """Yield zeros for the biases that the mixture has and its base has not."""
        for rest in BIASES:
            name = f"{base.layers.main}{layer}.{rest}"
            weight = base.view.find(name.removesuffix("bias") + "weight")
            if weight is not None:
                dtype = self.config.out_dtype or self.config.dtype or weight.dtype
                content = encode(np.zeros(weight.shape[0], np.float32), dtype)
                yield PlannedTensor(ROUTER, name, dtype, weight.shape[:1], make_file(content), 0, len(content))

    def _find_dtype(self, base: Model, name: str) -> str:
        stored = base.view.find(name)
        return self.config.out_dtype or self.config.dtype or (stored.dtype if stored else "F32")

    def _find_shapes(self, model: Model, layer: int) -> dict[str, tuple[int, ...] | None]:
        """Return the shapes of a layer's MLP, by name; None for a matrix that is not there."""
        names = [f"{model.layers.main}{layer}.{_MLP}{projection}.weight" for projection in PROJECTIONS]
        return {name: source.shape if (source := model.view.find(name)) else None for name in names}

    def _find_size(self, expert: Expert) -> int:
        """Return the rows of an expert's gate projection."""
        shape = next(iter(self._find_shapes(self.models[expert.model], 0).values()))
        return shape[0] if shape else 0

    def _check_experts(self) -> None:
        """Refuse models that do not go into one mixture.

        Raises:
            TensorMismatchError: an expert is of another family, or has other layers or shapes.
        """
        mixture = self._mixture
        labelled = [
            *((f"experts[{k}]", expert, mixture.experts[0]) for k, expert in enumerate(mixture.experts)),
            *(
                (f"shared_experts[{k}]", expert, expert if self._layout.shared_router else mixture.experts[0])
                for k, expert in enumerate(mixture.shared_experts)
            ),
        ]
        problems = [
            f"{label}: {problem}" for label, expert, like in labelled if (problem := self._explain_misfit(expert, like))
        ]
        if problems:
            raise TensorMismatchError(
                "the experts do not fit into one mixture:\n  " + listing(problems, _SHOWN, separator="\n  ")
            )

    def _explain_misfit(self, expert: Expert, like: Expert) -> str:
        """Return why an expert does not go with the base, or with an expert before it; empty where it does."""
        base, model, layout = self.donor, self.models[expert.model], self._layout
        family = model.config.get("model_type")
        if family not in layout.families:
            return (
                f"{model.ref} is of the family {family}, and {layout.title} is made of {' or '.join(layout.families)}"
                f" models, such as {base.ref}"
            )
        if model.layers.num_layers != base.layers.num_layers:
            layers = counted(model.layers.num_layers, "layer")
            return f"{model.ref} has {layers}, and {base.ref} has {base.layers.num_layers}"
        hidden, size = base.width("hidden_size") or 0, self._find_size(like)
        rests = group_layers(model)
        for layer in range(base.layers.num_layers):
            shapes = self._find_shapes(model, layer)
            for (name, shape), fits in zip(
                shapes.items(), [(size, hidden), (size, hidden), (hidden, size)], strict=True
            ):
                if shape is None:
                    return f"{name} is not in {model.ref}"
                if shape != fits:
                    return (
                        f"{name} is {list(shape)} in {model.ref}, and {list(fits)} is needed: hidden_size is {hidden}"
                        f" in {base.ref}, and experts have {size} rows, as in {like.model}"
                    )
            for source in filter(None, map(model.view.find, shapes)):
                if not DTYPES[source.dtype].is_mergeable:
                    return f"{source.name} is {source.dtype} in {model.ref}, and a floating-point dtype is needed"
            names = (f"{model.layers.main}{layer}.{rest}" for rest in rests[layer] if rest.startswith(_MLP))
            if extra := [name for name in names if name not in shapes]:
                return f"{layout.title} has no place for {extra[0]} of {model.ref}"
        return ""


def _set(name: str, value: Value) -> Settings:
    """Return a parameter with one value for all tensors."""
    return {name: Setting((Rule(None, (value,)),))}
