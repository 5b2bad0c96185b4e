"""Greedy soup: models are averaged in the order of their own scores, each as long as it helps."""

from __future__ import annotations

from collections.abc import Sequence

from raymerge.pipeline.search.study import Settings


class Soup:
    """Proposes each model alone, and then averages that grow by one model at a time.

    Source: Wortsman et al. 2022, Model soups, recipe 1 (arXiv:2203.05482).
    """

    def __init__(self, num_models: int, *, is_maximised: bool) -> None:
        self._num_models = num_models
        self._sign = 1 if is_maximised else -1
        self._scores: list[float] | None = None
        self._order: list[int] = []
        self._chosen: list[int] = []
        self._best = float("-inf")

    def ask(self, count: int) -> list[Settings]:
        """Propose settings: all models alone, however many are wanted, then one average; none at the end."""
        del count
        if self._scores is None:
            return [self._weigh([model]) for model in range(self._num_models)]
        return [self._weigh([*self._chosen, self._order[0]])] if self._order else []

    def tell(self, values: Sequence[Sequence[float] | None]) -> None:
        """Say what the settings proposed last came to; None where they failed."""
        scores = [float("-inf") if found is None else self._sign * found[0] for found in values]
        if self._scores is None:
            self._scores = scores
            first, *self._order = sorted(range(self._num_models), key=lambda model: (-scores[model], model))
            self._chosen, self._best = [first], scores[first]
            return
        model = self._order.pop(0)
        if scores[0] >= self._best and scores[0] > float("-inf"):
            self._chosen, self._best = [*self._chosen, model], scores[0]

    def _weigh(self, models: Sequence[int]) -> Settings:
        return {f"weight[{model}]": float(model in models) for model in range(self._num_models)}
