from __future__ import annotations

import pytest

from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.errors import TensorMismatchError
from raymerge.pipeline.plan.sources.accounts import Accounts
from tests.pipeline.plan.layouts import bare, llama, model_refs, stored_tensors

A, B, C = model_refs("a", "b", "c")


def own_name(model: ModelRef, name: str) -> str:
    return name.removeprefix("old.")


def test_books_without_problems_come_out_even() -> None:
    accounts = Accounts()
    accounts.use(stored_tensors("a", bare(["w"]))["w"])
    accounts.drop(B, "w", "a rule")
    accounts.check()
    assert accounts.explain_dropped({A: ["w"], B: ["old.w"]}, own_name, lambda model, name: "unused") == (
        "b: 1 tensor (old.w): a rule",
    )


@pytest.mark.parametrize(("num_problems", "more"), [(1, ""), (5, ""), (6, "and 1 more"), (12, "and 7 more")])
def test_a_message_lists_five_cases(num_problems: int, more: str) -> None:
    accounts = Accounts()
    for k in range(num_problems):
        accounts.miss(f"tensor{k}", C, has=[A, B])
    with pytest.raises(TensorMismatchError) as caught:
        accounts.check()
    lines = str(caught.value).splitlines()
    listed = [line for line in lines if line.startswith("  tensor")]
    assert listed == [f"  tensor{k} is in a, b, but not in c" for k in range(min(5, num_problems))]
    assert [line.strip() for line in lines if "more" in line] == ([more] if more else [])


def test_problems_are_listed_as_they_came() -> None:
    accounts = Accounts()
    accounts.mismatch("shapes differ")
    accounts.miss("w", B, has=[A])
    with pytest.raises(TensorMismatchError, match=r"(?s)shapes differ.*w is in a"):
        accounts.check()


def test_what_is_left_out_is_grouped_by_model_and_rule() -> None:
    layout = llama(3, past=1)
    tensors = {model: stored_tensors(str(model), layout) for model in (A, B)}
    accounts = Accounts()
    for name in tensors[A]:
        if "layers" not in name:
            accounts.use(tensors[A][name])
    accounts.drop(B, "model.norm.weight", "a rule of its own")
    lines = accounts.explain_dropped(tensors, own_name, lambda model, name: "past" if "layers.3" in name else "unused")
    assert lines == (
        "a: 6 tensors (model.layers.0.mlp.up_proj.weight, ...): unused",
        "a: 2 tensors (model.layers.3.mlp.up_proj.weight, ...): past",
        "b: 8 tensors (model.embed_tokens.weight, ...): unused",
        "b: 2 tensors (model.layers.3.mlp.up_proj.weight, ...): past",
        "b: 1 tensor (model.norm.weight): a rule of its own",
    )
