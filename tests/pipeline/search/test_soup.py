from __future__ import annotations

from raymerge.pipeline.search.soup import Soup

SCORES = {(0,): 0.5, (1,): 0.7, (2,): 0.6, (1, 2): 0.8, (0, 1, 2): 0.75}
"""Accuracy by the models that are averaged."""


def cook(soup: Soup, sign: int) -> list[tuple[int, ...]]:
    tried = []
    while proposals := soup.ask(8):
        chosen = [tuple(k for k in range(3) if settings[f"weight[{k}]"]) for settings in proposals]
        soup.tell([(sign * SCORES[models],) for models in chosen])
        tried += chosen
    return tried


def test_models_are_added_in_the_order_of_their_scores_while_it_helps() -> None:
    expected = [(0,), (1,), (2,), (1, 2), (0, 1, 2)]
    assert cook(Soup(3, is_maximised=True), 1) == expected
    assert cook(Soup(3, is_maximised=False), -1) == expected


def test_models_that_fail_are_left_out() -> None:
    soup = Soup(3, is_maximised=True)
    soup.ask(8)
    soup.tell([None, (0.2,), None])
    assert soup.ask(8) == [{"weight[0]": 1.0, "weight[1]": 1.0, "weight[2]": 0.0}]
    soup.tell([None])
    assert soup.ask(8) == [{"weight[0]": 0.0, "weight[1]": 1.0, "weight[2]": 1.0}]
    soup.tell([(0.2,)])
    assert soup.ask(8) == []
