from __future__ import annotations

import pytest

from raymerge.pipeline.checkpoint.names import find_layers
from raymerge.pipeline.errors import TensorMismatchError
from raymerge.pipeline.plan.accounts import Accounts
from tests.pipeline.plan.layouts import llama, model_refs, stored_tensors

A, B, C = model_refs("a", "b", "c")


def test_books_without_problems_come_out_even() -> None:
    accounts = Accounts()
    accounts.use(A, "w")
    accounts.drop(B, "w", "a rule")
    accounts.check()
    assert accounts.is_dropped(B, "w")
    assert not accounts.is_dropped(A, "w")


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
    layers = find_layers([(t.name, t.nbytes) for t in tensors[A].values()], 3)
    accounts = Accounts()
    for name in tensors[A]:
        if "layers" not in name:
            accounts.use(A, name)
    accounts.drop(B, "model.norm.weight", "a rule of its own")
    lines = accounts.explain_dropped([(model, tensors[model], layers) for model in (A, B)])
    assert lines == (
        "a: 6 tensors (model.layers.0.mlp.up_proj.weight, ...): layers in no slice",
        "a: 2 tensors (model.layers.3.mlp.up_proj.weight, ...): layers past the model's own, for multi-token "
        "prediction; slices stack the model's own layers",
        "b: 2 tensors (model.embed_tokens.weight, ...): embeddings come from the first slice's models, final norm and "
        "head from the last slice's",
        "b: 6 tensors (model.layers.0.mlp.up_proj.weight, ...): layers in no slice",
        "b: 2 tensors (model.layers.3.mlp.up_proj.weight, ...): layers past the model's own, for multi-token "
        "prediction; slices stack the model's own layers",
        "b: 1 tensor (model.norm.weight): a rule of its own",
    )
