"""The models of a search: planned, merged, evaluated, and deleted once they are known not to be among the best."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from raymerge.ops.errors import OpParameterError
from raymerge.ops.own import OwnOps, read_own_ops
from raymerge.pipeline.checkpoint.find import find_models
from raymerge.pipeline.config.sections.training_run import FindModels
from raymerge.pipeline.errors import CheckpointError, ConfigError, MemoryLimitError, OutputError, TensorMismatchError
from raymerge.pipeline.evaluation.evaluate import evaluate
from raymerge.pipeline.evaluation.events import OnEvaluationEvent
from raymerge.pipeline.evaluation.options import EvaluateOptions
from raymerge.pipeline.evaluation.results import Evaluation
from raymerge.pipeline.options import MergeOptions
from raymerge.pipeline.progress.events import OnEvent
from raymerge.pipeline.search.checks import find_wrong_values, list_bases
from raymerge.pipeline.search.deletion import delete_model
from raymerge.pipeline.search.recipe import Recipe
from raymerge.pipeline.search.study import Settings
from raymerge.pipeline.spectrum.points import make_points
from raymerge.pipeline.spectrum.record import Point, Spectrum, locate_point, read_spectrum, update_spectrum
from raymerge.pipeline.spectrum.sweep import plan_sweep, sweep
from raymerge.pipeline.stores.open import Stores

_BY_SETTINGS = (ConfigError, CheckpointError, TensorMismatchError, MemoryLimitError, OpParameterError)
"""Errors of plans that are a trial's own: what else goes wrong ends the search, and is not held against a trial."""

_MAX_PLANNED = 4
"""Settings that are planned to check the values of a space."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A trial's plan, or the reason that it has none."""

    fingerprint: str
    error: str
    """Why it cannot be merged; empty otherwise."""


@dataclass(frozen=True, slots=True)
class Models:
    """The models of one recipe, by the names of their trials; they are the points of a spectrum."""

    stores: Stores
    out: str
    """Directory of the spectrum."""
    recipe: Recipe
    tasks: Sequence[str]
    merging: MergeOptions
    on_event: OnEvent | None
    on_evaluation: OnEvaluationEvent | None
    on_warning: Callable[[str], None]

    def plan(self, settings: Mapping[str, Settings], warnings: dict[str, None] | None = None) -> dict[str, Planned]:
        """Return the fingerprint of each setting's plan, or why there is none: planned together if they all can be.

        Args:
            settings: of each model, by its name.
            warnings: gets those of plans as keys.
        """
        try:
            return self.plan_together(settings, warnings)
        except _BY_SETTINGS as error:
            if len(settings) == 1:
                [name] = settings
                return {name: Planned("", _drop_name(str(error), name))}
        planned: dict[str, Planned] = {}
        for name, own in settings.items():
            planned |= self.plan({name: own}, warnings)
        return planned

    def plan_together(
        self, settings: Mapping[str, Settings], warnings: dict[str, None] | None = None
    ) -> dict[str, Planned]:
        """Return the fingerprint of each setting's plan; see `plan`.

        Raises:
            RaymergeError: one cannot be planned, or the directory has other models of these names.
        """
        plan = plan_sweep(self.recipe.compose(settings), self.out, options=self.merging)
        if warnings is not None:
            warnings |= dict.fromkeys(plan.warnings)
        points = plan.spectrum.points
        return {point.name: Planned(point.fingerprint, "") for point in points if point.name in settings}

    def check_space(self) -> None:
        """Make sure that a model can be merged with each value of the space, and tell of what plans warn of.

        Raises:
            ConfigError: it names all that are wrong, with their lines.
        """
        recipe, warnings = self.recipe, dict[str, None]()
        own = read_own_ops(self.merging.ops) if self.merging.ops else None
        find = partial(find_models, self.stores)

        def read(settings: Mapping[str, Settings]) -> dict[str, str]:
            return {name: self._explain(name, each, own, find) for name, each in settings.items()}

        def plan(settings: Mapping[str, Settings]) -> dict[str, str]:
            planned = self.plan(settings, warnings) if settings else {}
            return {name: each.error for name, each in planned.items()}

        bases = list_bases(recipe.space, read)
        if wrong := find_wrong_values(recipe.space, bases, read) or find_wrong_values(
            recipe.space, bases[:_MAX_PLANNED], plan
        ):
            raise ConfigError(recipe.document.show_all([(said, recipe.find_line(path)) for path, said in wrong]))
        for warning in warnings:
            self.on_warning(warning)

    def _explain(self, name: str, settings: Settings, own: OwnOps | None, find: FindModels) -> str:
        """Return why the config of settings is refused, without a look at the models; empty if it is not."""
        try:
            make_points(self.recipe.compose({name: settings}), (), self.merging.seed, own=own, find=find)
        except ConfigError as error:
            return _drop_name(str(error), name)
        return ""

    def merge(self, settings: Mapping[str, Settings]) -> None:
        """Merge models from one reading of the inputs."""
        sweep(self.recipe.compose(settings), self.out, options=self.merging, on_event=self.on_event)

    def read(self) -> Spectrum:
        """Return the record of the models and their parents."""
        return read_spectrum(self.stores, self.out)

    def list_parents(self) -> list[str]:
        """Return the names of the models that the recipe merges."""
        return [parent.name for parent in self.read().parents]

    def evaluate(self, names: Sequence[str], options: EvaluateOptions) -> dict[str, list[Evaluation]]:
        """Return the evaluations of models by all tasks, made or found.

        Raises:
            OutputError: a model is gone.
        """
        found = evaluate(self.out, self.tasks, options, only=names, on_event=self.on_evaluation)
        by_name: dict[str, list[Evaluation]] = {name: [] for name in names}
        for evaluation in found:
            by_name[evaluation.model].append(evaluation)
        if gone := [name for name in names if not by_name[name]]:
            raise OutputError(f"{self.out}/{gone[0]}: the model is gone; merge it again, by its YAML in spectrum.json")
        return by_name

    def keep_only(self, best: Collection[str], tried: Collection[str]) -> None:
        """Delete the models of trials that are not among the best; their evaluations stay."""
        dropped: list[Point] = []

        def change(spectrum: Spectrum | None) -> Spectrum:
            if spectrum is None:
                raise OutputError(f"{self.out} has lost its record while the search ran; search in another directory")
            kept = {point.url for point in spectrum.points if point.name in best or point.name not in tried}
            points = []
            for point in spectrum.points:
                is_dropped = point.url not in kept and point.url in tried and point.state != "failed"
                if is_dropped:
                    dropped.append(point)
                points.append(replace(point, state="planned") if is_dropped else point)
            return replace(spectrum, points=tuple(points))

        update_spectrum(self.stores, self.out, change)
        for point in dropped:
            delete_model(self.stores, locate_point(self.out, point))


def _drop_name(error: str, name: str) -> str:
    """Return the problem of one point, without its name and settings, which its reader knows."""
    if error.startswith(f"{name} ("):
        return error.partition("): ")[2]
    return error.removeprefix(f"{name}: ")
