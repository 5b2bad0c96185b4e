"""The command line: what is printed where, and what is left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from raymerge import __version__, plan
from raymerge.pipeline.cli.display import merge as display
from raymerge.pipeline.progress import narrator
from tests.checkpoints import read_files, read_tensors, write_config, write_family
from tests.commands import Cli, run_command


@pytest.fixture
def config(tmp_path: Path) -> Path:
    family = write_family(tmp_path / "in", 2, dtype=torch.bfloat16, num_shards=2)
    models = [{"model": str(model), "parameters": {"wieght": 1}} for model in family[1:]]
    content = {"merge_method": "ties", "base_model": str(family[0]), "models": models, "parameters": {"weight": 0.5}}
    return write_config(tmp_path / "merge.yml", content)


def test_help_and_version(cli: Cli) -> None:
    for arguments in (["--help"], ["-h"], ["merge", "--help"], ["plan", "-h"], ["verify", "-h"], ["methods", "-h"]):
        outcome = cli(*arguments)
        assert (outcome.code, outcome.err) == (0, "")
        assert outcome.out.lstrip().startswith("Usage: raymerge")
    assert __version__ in cli("--version").out


@pytest.mark.parametrize(
    "line", ["merge", "merge a.yml", "merge a.yml out --sead 1", "murge", "plan", "plan a.yml --workers 0"]
)
def test_wrong_usage(line: str, cli: Cli) -> None:
    outcome = cli(*line.split())
    assert (outcome.code, outcome.out) == (2, "")
    assert "Error: " in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("merge {} out --cuda", "--cuda; that is an option of mergekit; write `--gpu-memory 16GiB` to merge on GPUs"),
        ("merge {} out --no-copy-tokenizer", "--no-copy-tokenizer; that is an option of mergekit; leave it out"),
        ("merge {} -I kept --out-path out", "-I; that is an option of mergekit; write `--keep-intermediates DIR`"),
        ("{} out", "merge.yml'; the command comes first: raymerge merge"),
        ("merge out {}", "the config comes first: raymerge merge"),
    ],
)
def test_advice_for_who_comes_from_mergekit(line: str, advice: str, config: Path, cli: Cli) -> None:
    outcome = cli(*line.format(config).split())
    assert (outcome.code, outcome.out) == (2, "")
    assert advice in outcome.err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("search a.yml out --tasks b.yml", "No such option: --tasks; did you mean --task?"),
        (
            "search a.yml out --sampler tpee",
            "Invalid value for '--sampler': 'tpee' is not one of 'nsga2', 'tpe', 'cmaes', 'grid', 'random', 'soup';"
            " did you mean 'tpe'?",
        ),
        ("search a.yml out --budget 0", "--budget is 0; it must be 1 or more"),
        ("eval m --task a.yml --limit 0", "--limit is 0; it must be 1 or more"),
        ("curve s --within 1 --best-under-tokens 3", "--within and --best-under-tokens are two rules; choose one"),
        ("extract-lora a b c --rank 0", "--rank is 0; it must be 1 or more"),
        ("extract-lora a b c --energy 2", "--energy is 2; it must be a share above 0, and at most 1"),
    ],
)
def test_options_are_called_as_they_are_typed(line: str, says: str, cli: Cli) -> None:
    outcome = cli(*line.split())
    assert (outcome.code, outcome.err.splitlines()[-1]) == (2, f"Error: {says}")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("raymerge me", {"merge", "methods"}),
        ("raymerge merge --over", {"--overwrite"}),
        ("raymerge merge --thr", set()),
        ("raymerge plan --storage ", {"auto", "fsspec"}),
    ],
)
def test_the_shell_completes(words: str, expected: set[str]) -> None:
    environment = {
        "_RAYMERGE_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    assert set(run_command(env=environment).out.split()) == expected


def test_plan(config: Path, tmp_path: Path, cli: Cli) -> None:
    outcome = cli("plan", config, "--shard-size", "5kB", "-v")
    assert outcome.code == 0
    assert outcome.err.count(": models[") == 2
    assert "did you mean 'weight'" in outcome.err
    the_plan = plan(config, shard_size="5kB")
    assert f"tensors  {len(the_plan.weight_map)}\n" in outcome.out
    for task in the_plan.tasks:
        assert f"  {task.file}: {len(task.merges)} tensors" in outcome.out
    assert {path.name for path in tmp_path.iterdir()} == {"in", "merge.yml"}


def test_plan_as_json(config: Path, cli: Cli) -> None:
    outcome = cli("plan", config, "--json", "--shard-size", "5kB", "--seed", "3", "--memory", "1GiB")
    assert (outcome.code, outcome.err) == (0, "")
    found = json.loads(outcome.out)
    the_plan = plan(config, shard_size="5kB", seed=3, memory="1GiB")
    assert found["fingerprint"] == the_plan.fingerprint
    assert found["num_tensors"] == len(the_plan.weight_map)
    assert [shard["file"] for shard in found["shards"]] == [task.file for task in the_plan.tasks]
    assert found["write_nbytes"] == sum(shard["nbytes"] for shard in found["shards"])
    assert found["read_nbytes"] == 3 * the_plan.total_nbytes
    assert (found["seed"], found["allowed_mem"], len(found["warnings"])) == (3, 2**30, 2)
    assert found["config"]["model_type"] == "llama"


def test_plan_saved_as_parquet(config: Path, tmp_path: Path, cli: Cli) -> None:
    outcome = cli("plan", config, "--save", tmp_path / "plan.parquet")
    assert outcome.code == 0
    rows = pq.read_table(tmp_path / "plan.parquet").to_pylist()
    tensors = read_tensors(tmp_path / "in" / "base")
    assert {row["name"]: row["shape"] for row in rows} == {name: list(x.shape) for name, x in tensors.items()}
    for row in rows:
        assert (row["op"], row["dtype"], row["file"]) == ("ties", "BF16", "model.safetensors")
        assert json.loads(row["parameters"])["weight"] == [0.5, 0.5]
        assert [Path(source["model"]).name for source in row["sources"]] == ["base", "tuned1", "tuned2"]
        first = row["sources"][0]
        stored = Path(first["url"]).read_bytes()[first["start"] : first["stop"]]
        assert stored == tensors[first["name"]].view(torch.int16).numpy().tobytes()
    outcome = cli("plan", config, "--save", tmp_path / "absent" / "plan.parquet")
    assert outcome.code == 2
    assert outcome.err.startswith("Error: cannot write ")


def test_strict(config: Path, tmp_path: Path, cli: Cli) -> None:
    for arguments in (["plan", config], ["merge", config, tmp_path / "out"]):
        outcome = cli(*arguments, "--strict")
        assert outcome.code == 2
        assert "refused because of strict" in outcome.err
        assert "models[0].parameters.wieght" in outcome.err
    assert not (tmp_path / "out").exists()


def test_quiet_merge_prints_nothing(config: Path, tmp_path: Path, cli: Cli) -> None:
    outcome = cli("merge", config, tmp_path / "out", "-q")
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")
    assert (tmp_path / "out" / "config.json").exists()


def test_dry_run_writes_nothing(config: Path, tmp_path: Path, cli: Cli) -> None:
    before = read_files(tmp_path)
    outcome = cli("merge", config, tmp_path / "out", "--dry-run", "--shard-size", "5kB")
    assert outcome.code == 0
    planned = cli("plan", config, "--shard-size", "5kB")
    assert (outcome.out, outcome.err) == (planned.out, planned.err)
    assert read_files(tmp_path) == before
    assert not (tmp_path / "out").exists()
    outcome = cli("merge", config, tmp_path / "out", "--dry-run", "-q")
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")


def test_dry_run_refuses_what_merge_refuses(config: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("text")
    before = read_files(tmp_path)
    for arguments in (
        (tmp_path / "in" / "base",),
        (tmp_path / "full",),
        (tmp_path / "full", "--overwrite"),
        ("s3:/bucket/merged",),
    ):
        dry, real = (cli("merge", config, *arguments, "-q", *more) for more in (["--dry-run"], []))
        assert dry == real
        assert (dry.code, dry.out) == (2, "")
    assert read_files(tmp_path) == before


def test_progress_in_plain_lines_where_there_is_no_terminal(
    config: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display, "_LINE_SECONDS", 0.0)
    monkeypatch.setattr(narrator, "INTERVAL_SECONDS", 0.0)
    outcome = cli("merge", config, tmp_path / "out", "--shard-size", "5kB", "--workers", "1", "-v")
    num_shards = len(list((tmp_path / "out").glob("*.safetensors")))
    assert outcome.out.startswith(f"{tmp_path / 'out'}: 21 tensors in {num_shards} shards\n  time ")
    assert outcome.out.endswith(f"  manifest  {tmp_path / 'out' / 'raymerge_manifest.json'}\n")
    assert "\x1b" not in outcome.err + outcome.out
    assert "\r" not in outcome.err
    lines = outcome.err.splitlines()
    assert lines[0].startswith("ties of 3 models")
    for k in range(1, num_shards + 1):
        assert any(line.startswith(f"model-{k:05d}-of-{num_shards:05d}.safetensors: ") for line in lines)
    steps = [line for line in lines if " left, read " in line and "/s, write " in line and " of " in line]
    assert steps
    assert [int(line.partition("/")[0]) for line in steps] == sorted(int(line.partition("/")[0]) for line in steps)


def test_options_reach_the_merge(config: Path, tmp_path: Path, cli: Cli) -> None:
    outcome = cli("merge", config, tmp_path / "out", "--seed", "7", "--shard-size", "5kB", "--memory", "64MiB", "-q")
    assert outcome.code == 0, outcome.err
    manifest = json.loads((tmp_path / "out" / "raymerge_manifest.json").read_text())
    assert manifest["seed"] == 7
    assert manifest["fingerprint"] == plan(config, seed=7, shard_size=5000).fingerprint
    assert len(manifest["warnings"]) == 2
