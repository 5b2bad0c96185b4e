"""Searches of small models, judged by a command that reads a weight of each."""

from __future__ import annotations

import json
import random
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import raymerge
from raymerge.pipeline.cli.display.search import format_report
from raymerge.pipeline.errors import ConfigError, OutputError
from raymerge.pipeline.evaluation.events import Evaluated, EvaluationEvent
from raymerge.pipeline.search.options import SearchOptions
from raymerge.pipeline.search.record import RECORD, Trial
from raymerge.pipeline.search.results import SearchReport
from raymerge.pipeline.search.search import search
from raymerge.pipeline.spectrum.record import read_spectrum
from raymerge.pipeline.stores.open import open_stores
from tests.checkpoints import llama_config, llama_tensors, write_checkpoint
from tests.commands import Cli, start_command

JUDGE = """
import json, pathlib, struct, sys
directory = pathlib.Path(sys.argv[1])
with pathlib.Path(sys.argv[0]).with_name("calls").open("a") as log:
    log.write(directory.name + "\\n")
[shard] = directory.glob("*.safetensors")
content = shard.read_bytes()
(size,) = struct.unpack("<Q", content[:8])
header = json.loads(content[8 : 8 + size])
start, _ = header["model.norm.weight"]["data_offsets"]
(t,) = struct.unpack("<f", content[8 + size + start :][:4])
print(json.dumps({"accuracy": max(0.0, 1 - (t - 0.7) ** 2), "tokens": 1000 * t}))
"""
"""Accuracy is best where the share of the second model is 0.7, and tokens rise with it."""


def write_models(root: Path) -> list[Path]:
    """Write models whose last norm is all 0, all 1, and all 0.4."""
    made = []
    for k, value in enumerate((0.0, 1.0, 0.4)):
        tensors = llama_tensors(k, 1)
        tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], value, dtype=torch.float32)
        made.append(write_checkpoint(root / f"model{k}", tensors, llama_config(1)))
    return made


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_models(tmp_path)
    (tmp_path / "judge.py").write_text(JUDGE)
    return tmp_path


def make_recipe(root: Path, parameters: Mapping[str, Any] | None = None, num_models: int = 2) -> dict[str, Any]:
    models = [{"model": str(root / f"model{k}")} for k in range(num_models)]
    section = {"search": {"parameters": dict(parameters)}} if parameters else {}
    return {"merge_method": "linear", "models": models, "parameters": {"weight": 1.0}, "dtype": "float32", **section}


WEIGHTS = {"weight[0]": {"min": 0.0, "max": 1.0}, "weight[1]": {"min": 0.1, "max": 1.0}}


def run(
    root: Path, recipe: dict[str, Any] | Path, options: SearchOptions, out: str = "out", **more: Any
) -> SearchReport:
    task = f"command:judge={sys.executable} {root}/judge.py {{model}}"
    return search(recipe, root / out, [task], options, **more)


def list_calls(root: Path) -> list[str]:
    return (root / "calls").read_text().split() if (root / "calls").exists() else []


@pytest.mark.slow
def test_the_best_models_are_kept_and_the_others_deleted(root: Path) -> None:
    told: list[Trial] = []
    options = SearchOptions(budget=12, batch=4)
    report = run(root, make_recipe(root, WEIGHTS), options, on_trial=lambda trial, number: told.append(trial))
    assert [trial.name for trial in report.trials] == [f"trial-{k:04}" for k in range(12)] == [t.name for t in told]
    values = [trial.values for trial in report.trials]
    best = {point.name for point in report.best}
    for trial in report.trials:
        if trial.same_as:
            continue
        assert trial.values is not None
        beaten = any(
            v is not None and v != trial.values and v[0] >= trial.values[0] and v[1] <= trial.values[1] for v in values
        )
        is_there = (root / "out" / trial.name / "config.json").exists()
        assert (trial.name in best) == is_there == (not beaten), trial
        assert (root / "out" / trial.name).exists() == is_there, "no empty directory is left"
    assert [value[0] for value in report.values] == sorted((v[0] for v in report.values), reverse=True)
    with open_stores() as stores:
        spectrum = read_spectrum(stores, str(root / "out"))
    assert {point.name for point in spectrum.points if point.state == "complete"} == best
    assert {parent.name for parent in spectrum.parents} == {"model0", "model1"}
    assert set(list_calls(root)[:6]) == {"trial-0000", "trial-0001", "trial-0002", "trial-0003", "model0", "model1"}
    judged = [trial.name for trial in report.trials if not trial.same_as]
    assert sorted(list_calls(root)) == sorted([*judged, "model0", "model1"]), "each once"
    for point in report.best:
        raymerge.merge(point.config, root / "alone", overwrite=True)
        assert (root / "alone" / "model.safetensors").read_bytes() == (
            root / "out" / point.name / "model.safetensors"
        ).read_bytes()
    begun: list[Any] = []
    raymerge.evaluate(root / "out", f"command:judge={sys.executable} {root}/judge.py {{model}}", on_event=begun.append)
    assert begun[0].num_cached == begun[0].num_models == 14, "what was deleted is not merged again"


def test_an_interrupted_search_comes_to_the_same_and_a_larger_budget_goes_on(root: Path) -> None:
    recipe, options = make_recipe(root, WEIGHTS), SearchOptions(budget=12, batch=4, sampler_seed=3)
    whole = run(root, recipe, options, out="whole")
    (root / "calls").unlink()

    def stop(trial: Trial, number: int) -> None:
        if number == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(root, recipe, options, on_trial=stop)
    first = run(root, recipe, replace(options, budget=8))
    assert first.trials == whole.trials[:8]
    assert run(root, recipe, options).trials == whole.trials
    calls = list_calls(root)
    assert len(calls) == len(set(calls)), "nothing was evaluated twice"


@pytest.mark.slow
def test_equal_plans_are_merged_and_evaluated_once(root: Path) -> None:
    recipe = make_recipe(root, {"weight[0]": [0.5, 1.0], "weight[1]": [0.5, 1.0]})
    report = run(
        root,
        {**recipe, "parameters": {"weight": 1.0, "normalize": False}},
        SearchOptions(sampler="random", budget=10, batch=5),
    )
    settings = [json.dumps(dict(trial.settings)) for trial in report.trials]
    assert len(set(settings)) < 10
    for k, trial in enumerate(report.trials):
        first = settings.index(settings[k])
        assert trial.values == report.trials[first].values
        assert (trial.same_as == "") == (first == k)
    assert len([name for name in list_calls(root) if name.startswith("trial")]) == len(set(settings))


@pytest.mark.slow
def test_a_soup_takes_what_helps(root: Path) -> None:
    report = run(root, make_recipe(root, num_models=3), SearchOptions(sampler="soup", batch=8))
    chosen = [[k for k in range(3) if trial.settings[f"weight[{k}]"]] for trial in report.trials]
    assert chosen == [[0], [1], [2], [1, 2], [0, 1]] or chosen == [[0], [1], [2], [1, 2], [0, 1, 2]]
    assert report.stopped == "everything was tried"
    assert report.values[0][0] == max(trial.values[0] for trial in report.trials if trial.values)


@pytest.mark.slow
def test_trials_and_parents_are_compared(root: Path) -> None:
    shutil.rmtree(root / "model0")  # which had no tokens
    (root / "model2").rename(root / "model0")
    report = run(root, make_recipe(root, {"weight[0]": [1.0, 0.5], "weight[1]": [1.0, 0.2]}), SearchOptions(budget=6))
    assert report.parents["model0"] == pytest.approx((0.91, 400))
    assert report.parents["model1"] == pytest.approx((0.91, 1000))
    best = {point.name: own for point, own in zip(report.best, report.values, strict=True)}
    assert set(report.beating) == set(report.parents)
    for parent, own in report.parents.items():
        assert own is not None
        better = [name for name, v in best.items() if v[0] >= own[0] and v[1] <= own[1]]
        assert sorted(report.beating[parent]) == sorted(better)
    assert report.beating["model1"]
    assert report.beating_all == ()
    assert not any("model1" in names for names in report.beaten.values())


@pytest.mark.slow
def test_a_trial_that_cannot_be_merged_is_marked(root: Path) -> None:
    signs: dict[str, Any] = {f"weight[{k}]": [1.0, -1.0] for k in range(2)}
    report = run(root, make_recipe(root, signs), SearchOptions(sampler="random", budget=6, batch=3))
    assert 0 < len(report.failed) < 6
    for trial in report.trials:
        is_nothing = sum(map(float, map(str, trial.settings.values()))) == 0
        assert ("sum to 0" in trial.error) == is_nothing == (trial.values is None)


@pytest.mark.slow
def test_a_search_without_progress_stops(root: Path) -> None:
    recipe = make_recipe(root, {"weight[0]": [0.5, 1.0], "weight[1]": [0.5, 1.0]})
    report = run(root, recipe, SearchOptions(sampler="random", budget=100, batch=5, patience=2))
    assert "the last 2 batches" in report.stopped
    assert len(report.trials) < 100


def test_another_search_in_the_directory_is_refused(root: Path) -> None:
    recipe, options = make_recipe(root, WEIGHTS), SearchOptions(budget=2, batch=2)
    run(root, recipe, options)
    with pytest.raises(OutputError, match="sampler_seed 0 there and 1 here"):
        run(root, recipe, replace(options, sampler_seed=1))
    with pytest.raises(OutputError, match=r"has another search: another recipe; choose"):
        run(root, make_recipe(root, {"weight[0]": [0.5, 1.0]}), options)
    raymerge.sweep(make_recipe(root) | {"dtype": "float16"}, root / "swept", {"weight": [1]}, materialize="none")
    with pytest.raises(OutputError, match=r"swept has a spectrum of another recipe"):
        run(root, recipe, options, out="swept")
    record = json.loads((root / "out" / RECORD).read_text())
    record["trials"][0]["settings"]["weight[0]"] = 0.123
    (root / "out" / RECORD).write_text(json.dumps(record))
    with pytest.raises(OutputError, match=r"trial-0000 has .*0\.123.*the sampler proposes"):
        run(root, recipe, options)
    for name in ("model0", "file:///model0"):
        record["trials"][0]["name"] = name
        (root / "out" / RECORD).write_text(json.dumps(record))
        with pytest.raises(OutputError, match=r"search\.json is damaged: .*model0\" is no name of a trial"):
            run(root, recipe, options)


@pytest.mark.slow
def test_what_a_killed_run_has_left_is_deleted_and_other_inputs_are_refused(root: Path) -> None:
    recipe, options = make_recipe(root, WEIGHTS), SearchOptions(budget=4, batch=2, objective=["accuracy"])
    run(root, recipe, replace(options, keep_all=True))  # as if it had been killed before it deleted any
    report = run(root, recipe, options)
    left = {path.parent.name for path in (root / "out").glob("trial-*/config.json")}
    assert left == {point.name for point in report.best} != {trial.name for trial in report.trials}
    write_checkpoint(root / "model1", llama_tensors(9, 1), llama_config(1))
    assert run(root, recipe, options).trials == report.trials, "nothing is to be done"
    with pytest.raises(OutputError, match="inputs that have changed"):
        run(root, recipe, replace(options, budget=6))
    shutil.rmtree(root / "out" / report.best[0].name)
    with pytest.raises(OutputError, match=f"{report.best[0].name}: the model is gone"):
        run(root, recipe, options)


def test_a_judge_that_fails_ends_the_search_and_costs_no_models(root: Path) -> None:
    (root / "judge.py").write_text("raise SystemExit('no such module')")
    recipe, options = make_recipe(root, WEIGHTS), SearchOptions(budget=2, batch=2)
    with pytest.raises(OutputError, match=r"could be evaluated.*no such module"):
        run(root, recipe, options)
    (root / "judge.py").write_text(JUDGE)
    assert [trial.error for trial in run(root, recipe, options).trials] == ["", ""]


FLAKY = """
import sys, pathlib
bad = pathlib.Path(sys.argv[0]).with_name("bad")
if bad.exists() and pathlib.Path(sys.argv[1]).name in bad.read_text().split():
    raise SystemExit("the server is down")
"""


@pytest.mark.slow
def test_failed_trials_are_tried_again_and_the_search_is_still_replayed(root: Path) -> None:
    (root / "judge.py").write_text(FLAKY + JUDGE)
    recipe, options = make_recipe(root, WEIGHTS), SearchOptions(budget=8, batch=2, sampler="nsga2")
    whole = run(root, recipe, options, out="whole").trials
    (root / "bad").write_text("trial-0001 trial-0004")
    first = run(root, recipe, replace(options, budget=6))
    assert [trial.name for trial in first.failed] == ["trial-0001", "trial-0004"]
    assert "server is down; run the search again to retry" in format_report(first)
    assert "server is down" in first.failed[0].error
    (root / "bad").write_text("trial-0001")
    retried: list[int] = []
    told: list[str] = []
    half = run(
        *(root, recipe, replace(options, budget=6)),
        on_retry=retried.append,
        on_trial=lambda trial, number: told.append(f"{number} {trial.name}"),
    )
    assert (retried, told) == ([2], ["2 trial-0001", "5 trial-0004"])
    assert [trial.name for trial in half.failed] == ["trial-0001"]
    (root / "bad").unlink()
    (root / "calls").unlink()
    again = run(root, recipe, options)
    assert list_calls(root)[0] == "trial-0001"
    assert {*list_calls(root)[1:]} <= {"trial-0006", "trial-0007"}
    assert [trial.told_failed for trial in again.trials] == [trial.name == "trial-0001" for trial in again.trials]
    same = {tuple(trial.settings.values()): trial.values for trial in whole}
    assert [trial.values for trial in again.trials[:2]] == [trial.values for trial in whole[:2]]
    assert all(trial.values == same.get(tuple(trial.settings.values()), trial.values) for trial in again.trials)
    assert run(root, recipe, options, on_retry=retried.append).trials == again.trials
    assert retried == [2], "nothing is left to try again"


@pytest.mark.slow
def test_a_judge_that_dies_ends_the_search_and_the_next_run_goes_on_as_if_it_had_not(root: Path) -> None:
    (root / "judge.py").write_text(FLAKY + JUDGE)
    recipe, options = make_recipe(root, WEIGHTS), SearchOptions(budget=6, batch=2, sampler="nsga2")
    whole = run(root, recipe, options, out="whole")
    (root / "bad").write_text("trial-0002 trial-0003")
    with pytest.raises(OutputError, match=r"none of the last 2 models could be evaluated.*: judge: .*server is down"):
        run(root, recipe, options)
    (root / "bad").unlink()
    assert run(root, recipe, options).trials == whole.trials


@pytest.mark.slow
def test_a_retried_trial_does_not_change_what_a_killed_run_has_proposed_after_it(root: Path) -> None:
    """The soup's second batch begins with another model if the last trial of the first has a value."""
    (root / "judge.py").write_text(FLAKY + JUDGE)
    recipe, options = make_recipe(root, num_models=3), SearchOptions(sampler="soup")
    (root / "bad").write_text("trial-0002")

    def stop(event: EvaluationEvent) -> None:
        if isinstance(event, Evaluated) and event.evaluation.model == "trial-0003":
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(root, recipe, options, on_evaluation=stop)
    (root / "bad").unlink()
    report = run(root, recipe, options)
    assert [trial.told_failed for trial in report.trials] == [False, False, True, False, False]
    assert [report.trials[3].settings[f"weight[{k}]"] for k in range(3)] == [1.0, 1.0, 0.0]
    assert run(root, recipe, options).trials == report.trials


@pytest.mark.slow
def test_models_that_lack_a_figure_are_not_tried_again_and_end_no_search(root: Path) -> None:
    lacking = '**({} if directory.name in ("trial-0002", "trial-0003") else {"tokens": 1000 * t})'
    (root / "judge.py").write_text(JUDGE.replace('"tokens": 1000 * t', lacking))
    recipe, options, retried = make_recipe(root, WEIGHTS), SearchOptions(budget=6, batch=2), list[int]()
    for _ in range(2):
        report = run(root, recipe, options, on_retry=retried.append)
        assert [trial.name for trial in report.failed] == ["trial-0002", "trial-0003"]
    assert not retried
    assert "2 trials failed, trial-0002 with: a task does not measure an objective" in format_report(report)
    assert "again" not in format_report(report)


def test_every_wrong_value_of_the_space_is_told_with_its_line_before_anything_is_merged(root: Path) -> None:
    section = """search:
  parameters:
    weight[0]: {min: 0, max: 1}
    weight[1]: [0.5, heavy]
    dtype: [float32, float61]
    merge_method: [linear, slerp]
    seed: {min: -3, max: 5, step: 1}
"""
    (root / "recipe.yml").write_text(yaml.safe_dump(make_recipe(root)) + section)
    with pytest.raises(ConfigError) as told:
        run(root, root / "recipe.yml", SearchOptions())
    text = str(told.value)
    for said in (
        'search.parameters.weight[1]: "heavy": models[1].parameters.weight: "heavy" is given, a number',
        "search.parameters.dtype: \"float61\": dtype: 'float61' is no dtype",
        'search.parameters.merge_method: "slerp": parameters: slerp needs',
        "search.parameters.seed: min -3: seed: -3 is given",
    ):
        assert said in text, text
    assert text.count("recipe.yml:") == 4
    assert not (root / "out").exists()


def test_values_at_odds_with_the_models_are_told_and_doubts_once(root: Path) -> None:
    places = [str(root / "model2"), str(root / "modle1")]
    with pytest.raises(ConfigError, match=r"modle1: no such directory; did you mean .*model1"):
        run(root, make_recipe(root, {"models[1].model": places}), SearchOptions())
    told: list[str] = []
    space = {"weight[0][mpl]": {"min": 0, "max": 1}, "weight[1]": [0.5, 1.0]}
    run(root, make_recipe(root, space), SearchOptions(budget=1, batch=1), on_warning=told.append)
    assert told == ['weight: the filter "mpl" matches no tensor, so its value is not used']


def test_what_is_wrong_is_told_before_anything_is_merged(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"weigth\[0\]"):
        run(root, make_recipe(root, {"weigth[0]": [0.1, 0.2]}), SearchOptions())
    with pytest.raises(ConfigError, match="did you mean 'tokens'"):
        SearchOptions(objective=["token"])
    with pytest.raises(ConfigError, match="has no meaning for a command"):
        run(root, make_recipe(root, WEIGHTS), SearchOptions(subset=2))
    with pytest.raises(ConfigError, match="choose another directory"):
        run(root, make_recipe(root, WEIGHTS), SearchOptions(), merging=raymerge.MergeOptions(overwrite=True))
    assert not (root / "out").exists()


@pytest.mark.slow
def test_the_command(root: Path, cli: Cli) -> None:
    (root / "recipe.yml").write_text(json.dumps(make_recipe(root, WEIGHTS)))
    judge = f"judge={sys.executable} {root}/judge.py {{model}}"
    found = cli(
        "search", str(root / "recipe.yml"), str(root / "out"), "--command", judge, "--budget", "4", "--batch", "2"
    )
    assert found.code == 0, found.err
    assert "trials 1 to 2 of 4: merging\nevaluating 4 models\n[1/4] trial-0000  weight[0]" in found.err
    assert "[4/4] trial-0003  weight[0]" in found.err
    assert "that no other is better than:" in found.out
    assert f"next: `raymerge curve {root}/out` shows" in found.err
    assert "\n  model1  accuracy 91.0%, tokens 1,000.0; " in found.out
    assert "\nBetter than every parent: none." in found.out, "model0 has no tokens"


@pytest.mark.slow
def test_kill_at_ten_moments(root: Path) -> None:
    recipe, options = make_recipe(root, WEIGHTS), SearchOptions(budget=12, batch=3)
    whole = run(root, recipe, options, out="whole")
    (root / "calls").unlink()
    (root / "recipe.yml").write_text(json.dumps(recipe))
    # The pauses of ten runs are shorter than all that the judge takes: no search ends before it is killed.
    (root / "judge.py").write_text("import time\n" + JUDGE.replace("print(", "time.sleep(0.3)\nprint("))
    judge = f"judge={sys.executable} {root}/judge.py {{model}}"
    moments = random.Random(1)
    num_hits = 0
    for _ in range(10):
        before = list_calls(root)
        process = start_command(
            *("search", root / "recipe.yml", root / "out", "--command", judge, "--budget", "12", "--batch", "3")
        )
        while list_calls(root) == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.6))
        process.kill()
        process.communicate()
        num_hits += process.returncode == -signal.SIGKILL
    assert num_hits >= 8
    report = run(root, recipe, options)
    assert report.trials == whole.trials
    assert [point.settings for point in report.best] == [point.settings for point in whole.best]
    assert len(list_calls(root)) <= len({trial.name for trial in report.trials}) + 2 + num_hits, "once, but in flight"
    left = {path.parent.name for path in (root / "out").glob("*/config.json")}
    assert left == {point.name for point in report.best}
