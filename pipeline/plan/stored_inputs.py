"""All that a merge reads: models, statistics and adapters, with their headers in one table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from raymerge.pipeline.checkpoint.adapters.adapter import Adapter, open_adapters
from raymerge.pipeline.checkpoint.adapters.modules import names_other_model
from raymerge.pipeline.checkpoint.checkpoint import Checkpoint, resolve_models
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.checkpoint.source import StoredTensor
from raymerge.pipeline.checkpoint.statistics import StatisticsFiles, find_statistics, index_statistics
from raymerge.pipeline.checkpoint.views.tying import has_own_head
from raymerge.pipeline.checkpoint.views.view import StoredView, View
from raymerge.pipeline.config.merge_config import MergeConfig
from raymerge.pipeline.plan.components import Parts, pair_components
from raymerge.pipeline.plan.forms.form import Model
from raymerge.pipeline.plan.memory.projection import check_plan_fits
from raymerge.pipeline.plan.recipe import open_model
from raymerge.pipeline.plan.types import InputAdapter, InputModel
from raymerge.pipeline.stores.files import StoredFile
from raymerge.pipeline.stores.open import Stores
from raymerge.pipeline.urls import repository_of


@dataclass(frozen=True, slots=True)
class StoredInputs:
    """The stored inputs of a config, with revisions pinned and headers read."""

    checkpoints: tuple[Checkpoint, ...]
    """Models in the config's order."""
    parts: Parts
    """Units that are merged by themselves: the models as a whole, or each component of pipelines."""
    models: tuple[tuple[Model, ...], ...]
    """The networks of each part, opened."""
    statistics: Sequence[StatisticsFiles]
    statistics_views: Mapping[ModelRef, View]
    """The same statistics, opened, by the config's names for them."""
    adapters: Mapping[ModelRef, Adapter]
    warnings: tuple[str, ...]

    def list_places(self) -> list[tuple[str, int]]:
        """Return each input's URL and the size of its weights, in bytes."""
        places = [(c.url, sum(file.nbytes for file in c.weight_files)) for c in self.checkpoints]
        places += [(found.url, sum(file.nbytes for file in found.files)) for found in self.statistics]
        places += [(each.url, sum(tensor.nbytes for tensor in each.tensors)) for each in self.adapters.values()]
        return places

    def list_models(self) -> tuple[InputModel, ...]:
        """Return the models with their files."""
        return tuple(InputModel(c.model, c.url, tuple(c.files)) for c in self.checkpoints)

    def list_statistics(self) -> tuple[InputModel, ...]:
        """Return the statistics with their files."""
        return tuple(InputModel(found.ref, found.url, found.names) for found in self.statistics)

    def list_adapters(self) -> tuple[InputAdapter, ...]:
        """Return the adapters with their files, and what each changes."""
        effects: dict[ModelRef, list[str]] = {ref: [] for ref in self.adapters}
        for part, models in zip(self.parts.merged, self.models, strict=True):
            for model in models:
                if model.adapter is not None:
                    place = f"{model.ref.without_adapter}/{part.prefix[:-1]}".removesuffix("/")
                    effects[model.adapter.ref].append(f"{place}: {model.adapter}")
        return tuple(
            InputAdapter(InputModel(ref, adapter.url, tuple(adapter.files)), tuple(effects[ref]))
            for ref, adapter in self.adapters.items()
        )


def open_inputs(stores: Stores, config: MergeConfig, allowed_mem: int, *, trust_headers: bool) -> StoredInputs:
    """Find all inputs of a config and read their headers.

    Args:
        stores: of the inputs.
        config: names them; the parameters do not matter.
        allowed_mem: bytes that the plan may take.
        trust_headers: whether files of weights decide where they and the index disagree, or it is missing.

    Raises:
        RaymergeError: an input is missing, damaged, or too large to plan with.
    """
    from raymerge.pipeline.checkpoint.table import (  # pyarrow: slow to import
        index_tensors,
        list_tensors,
        read_table,
        release_tables,
    )

    def check(file: StoredFile, num_tensors: int) -> None:
        check_plan_fits(file.url, num_tensors, num_tensors, allowed_mem)

    checkpoints = resolve_models(stores, config.input_models, trust_headers=trust_headers)
    parts = pair_components(config, checkpoints)
    statistics = find_statistics(stores, config.statistics_places, {c.url: c.model for c in checkpoints})
    weights = {str(c.model.without_adapter): c.weight_files for c in checkpoints}
    table = read_table(stores, weights, check)
    statistics_table = read_table(stores, {str(found.ref): found.files for found in statistics}, check)
    num_stored = len(table) + len(statistics_table)
    check_plan_fits("the inputs together", num_stored, len(table) // len(weights), allowed_mem)
    tensors, stored_statistics = list_tensors(table), list_tensors(statistics_table)
    adapters = open_adapters(stores, [c.model.adapter for c in checkpoints if c.model.adapter], check)
    del table, statistics_table
    release_tables()

    views = {
        found.ref: StoredView(found.ref, index_statistics(stored_statistics.get(str(found.ref), ())))
        for found in statistics
    }
    warnings = [warning for checkpoint in checkpoints for warning in checkpoint.warnings]
    warnings += _warn_of_bases(checkpoints, adapters)
    by_model = {checkpoint.model: checkpoint for checkpoint in checkpoints}
    own_heads: dict[tuple[str, str], bool] = {}

    def open_network(checkpoint: Checkpoint) -> Model:
        alone = str(checkpoint.model.without_adapter)
        listed: Iterable[StoredTensor] = tensors.get(alone, ())
        if checkpoint.prefix:
            listed = [tensor for tensor in listed if tensor.file.url.startswith(f"{checkpoint.url}/")]
        stored, more = index_tensors(checkpoint, listed)
        warnings.extend(more)
        key = alone, checkpoint.prefix
        if key not in own_heads:
            own_heads[key] = has_own_head(stores, checkpoint.config, stored)
        adapter = adapters[checkpoint.model.adapter] if checkpoint.model.adapter else None
        if adapter is not None:
            adapter = adapter.find_component(by_model[checkpoint.model], checkpoint.prefix)
        return open_model(
            checkpoint,
            stored,
            has_own_head=own_heads[key],
            adapter=adapter,
        )

    models = tuple(tuple(map(open_network, part.checkpoints)) for part in parts.merged)
    warnings += parts.warnings
    return StoredInputs(tuple(checkpoints), parts, models, statistics, views, adapters, tuple(warnings))


def _warn_of_bases(checkpoints: Iterable[Checkpoint], adapters: Mapping[ModelRef, Adapter]) -> Iterator[str]:
    """Yield a warning for each adapter that says that it was trained on another repository than it is put on."""
    for checkpoint in checkpoints:
        adapter = adapters[checkpoint.model.adapter] if checkpoint.model.adapter else None
        repository = repository_of(checkpoint.url)
        if adapter is not None and repository and names_other_model(adapter.config.base, repository):
            yield (
                f"{checkpoint.model}: the adapter was trained on {adapter.config.base!r:.200}, and is put on"
                f" {repository}, of the same shapes; an update fits the weights that it was trained with alone"
            )
