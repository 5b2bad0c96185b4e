"""The options of a merge: their values, as keywords, and on the command line."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

import pytest

from raymerge import MergeOptions, merge, plan
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.options import Help, MergeKeywords, make_options
from tests.commands import Cli


def test_keywords_are_the_fields() -> None:
    assert get_type_hints(MergeKeywords) == get_type_hints(MergeOptions)


def test_every_field_has_a_help() -> None:
    for name, hint in get_type_hints(MergeOptions, include_extras=True).items():
        (note,) = hint.__metadata__
        assert isinstance(note, Help), name
        assert note.text.endswith(".")


def test_sizes_in_bytes() -> None:
    options = MergeOptions(memory="2GiB", shard_size=5, gpu_memory="1.5GB")
    assert (options.allowed_mem, options.shard_nbytes, options.allowed_gpu_mem) == (2**31, 5, 1_500_000_000)
    assert (MergeOptions().shard_nbytes, MergeOptions().allowed_gpu_mem) == (None, None)


def test_workers_are_the_cores_by_default() -> None:
    assert MergeOptions().num_workers >= 1
    assert MergeOptions(workers=7).num_workers == 7


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"workers": 0}, "--workers is 0; it must be 1 or more"),
        ({"seed": -1}, "--seed is -1; it must be 0 or more"),
        ({"memory": 0}, "--memory is 0; it must be 1 byte or more"),
        ({"memory": "4 apples"}, "'4 apples' is not a size"),
        ({"gpu_memory": "0"}, "not a size above zero"),
        ({"shard_size": -5}, "--shard-size is -5"),
        ({"storage": "s3fs"}, "storage is 's3fs'; it must be 'auto' or 'fsspec'"),
        ({"ray": True, "address": "auto"}, "leave one"),
        ({"shared_filesystem": True}, "give its --address too"),
    ],
)
def test_values_that_cannot_be(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        MergeOptions(**values)


def test_keywords_go_before_options() -> None:
    options = MergeOptions(seed=3, workers=2)
    assert make_options(options, {"seed": 4}) == MergeOptions(seed=4, workers=2)
    assert make_options(None, {}) == MergeOptions()
    assert options.seed == 3


@pytest.mark.parametrize(
    ("name", "says"), [("sead", "did you mean 'seed'"), ("bogus", "there are memory, workers, gpu_memory")]
)
def test_a_keyword_that_is_no_option(name: str, says: str) -> None:
    keywords: Any = {name: 1}
    for call in (lambda: plan("models: []", **keywords), lambda: merge("models: []", "out", **keywords)):
        with pytest.raises(TypeError, match=f"'{name}' is not an option of a merge; {says}"):
            call()


def test_options_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        MergeOptions().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize("command", ["plan", "merge", "submit", "manifest kuberay"])
def test_commands_offer_what_they_take(command: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    text = cli(*command.split(), "--help").out
    offered = {name for name in get_type_hints(MergeOptions) if f"--{name.replace('_', '-')} " in text}
    planned = {"memory", "workers", "gpu_memory", "storage", "shard_size", "seed", "strict", "trust_headers"}
    sent = planned | {"private", "wait", "recheck", "overwrite", "shared_filesystem"}
    of_command = {
        "plan": planned | {"ops"},
        "merge": set(get_type_hints(MergeOptions)),
        "submit": sent | {"ops", "address"},
    }
    assert offered == of_command.get(command, sent)
    assert "--threads" not in text
    assert "Example: raymerge " in text


def test_the_former_word_for_workers(cli: Cli) -> None:
    outcome = cli("plan", "a.yml", "--threads", "0")
    assert outcome.err == "Error: --workers is 0; it must be 1 or more\n"
