"""Whole merges from and to a Hub."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import snapshot_download

from raymerge import Planned, inspect, merge, plan, verify
from raymerge.pipeline.errors import CheckpointError, FetchError, OutputError
from raymerge.pipeline.plan.results import ShardResult
from raymerge.pipeline.stores.open import Stores
from tests.adapters import draw_factors, write_adapter
from tests.checkpoints import read_files, write_config, write_family
from tests.commands import Cli, run_command, start_command
from tests.holding import start_held
from tests.servers.hub import HubServer
from tests.servers.hub_git import Commit
from tests.stored_models import make_config, merge_locally, without_own
from tests.watchers import on, stop_after

SHARD_SIZE = "60kB"
NAMES = ["org/base", "org/tuned1", "private/tuned2"]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    return write_family(
        tmp_path_factory.mktemp("family"), 2, num_layers=6, dtype=torch.bfloat16, num_shards=2, hidden=64
    )


@pytest.fixture(scope="module")
def expected(family: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return merge_locally(family, tmp_path_factory.mktemp("expected") / "merged", shard_size=SHARD_SIZE)


@pytest.fixture
def hub(family: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub that has the family, one of them private, in an environment that leads to it."""
    with HubServer(tmp_path / "hub") as hub:
        hub.add_token("hf_writer", user="me", can_write=["me"], can_read=["private"])
        for name, directory in zip(NAMES, family, strict=True):
            hub.create_repo(name, private=name.startswith("private"))
            hub.upload(name, dict(read_files(directory)))
        for name, value in hub.environment(tmp_path).items():
            monkeypatch.setenv(name, value)
        yield hub


def published(hub: HubServer, name: str) -> dict[str, bytes]:
    files = hub.read_files(name, "main")
    return without_own({path: content for path, content in files.items() if path != ".gitattributes"})


def test_hub_to_hub(hub: HubServer, expected: dict[str, bytes], tmp_path: Path, cli: Cli) -> None:
    config = write_config(tmp_path / "merge.yml", make_config(NAMES))
    outcome = cli("merge", config, "hf://me/merged", "--shard-size", SHARD_SIZE)
    assert outcome.code == 0, outcome.err
    assert published(hub, "me/merged") == expected
    assert cli("verify", "hf://me/merged").code == 0
    assert cli("inspect", "me/merged").code == 0
    assert hub.leaked_tokens == []
    manifest = json.loads(hub.read_files("me/merged", "main")["raymerge_manifest.json"])
    assert [item["revision"] for item in manifest["models"]] == [hub.get_head(name) for name in NAMES]
    state = [path for path in (tmp_path / "state").rglob("*") if path.is_file()]
    assert state == []


@pytest.mark.slow
def test_hub_to_hub_by_xet(hub: HubServer, expected: dict[str, bytes], tmp_path: Path) -> None:
    config = write_config(tmp_path / "merge.yml", make_config(NAMES))
    arguments = ("merge", config, "hf://me/merged", "--shard-size", SHARD_SIZE, "--memory", "2GiB")
    outcome = run_command(*arguments, env={"HF_HUB_DISABLE_XET": "0"})
    assert outcome.code == 0, outcome.err
    assert published(hub, "me/merged") == expected
    assert not any(method == "PUT" for method, *_ in hub.storage_requests)
    assert "%|" not in outcome.err


def test_nothing_is_visible_before_the_one_commit(hub: HubServer) -> None:
    seen: list[set[str]] = []
    watch = on(ShardResult, lambda _: seen.append(set(hub.read_files("me/merged", "main"))))
    merge(make_config(NAMES), "hf://me/merged", shard_size=SHARD_SIZE, on_event=watch)
    assert len(seen) > 3
    assert set().union(*seen) <= {".gitattributes"}


def test_a_branch_that_moves_does_not_matter(hub: HubServer, expected: dict[str, bytes], tmp_path: Path) -> None:
    def move(_: Planned) -> None:
        files = hub.read_files(NAMES[1], "main")
        hub.upload(NAMES[1], {name: content[:-1] + b"x" for name, content in files.items()})

    merge(make_config(NAMES), tmp_path / "out", shard_size=SHARD_SIZE, on_event=on(Planned, move))
    assert without_own(read_files(tmp_path / "out")) == expected


def test_a_revision(hub: HubServer, expected: dict[str, bytes], tmp_path: Path) -> None:
    commit = hub.get_head(NAMES[0])
    hub.upload(NAMES[0], {"config.json": b"{}"})
    merge(make_config([f"{NAMES[0]}@{commit}", *NAMES[1:]]), tmp_path / "out", shard_size=SHARD_SIZE)
    assert without_own(read_files(tmp_path / "out")) == expected


def test_a_revision_with_slashes(hub: HubServer, expected: dict[str, bytes], tmp_path: Path) -> None:
    hub.move_branch("org/tuned1", "refs/pr/1", hub.get_head("org/tuned1"))
    hub.upload("org/tuned1", {"config.json": b"{}"})
    models = [written.format("org/tuned1") for written in ("hf://{}@refs%2Fpr%2F1", "{}@refs%2Fpr%2F1", "{}@refs/pr/1")]
    assert len({plan(make_config([NAMES[0], model, NAMES[2]])).inputs[1].url for model in models}) == 1
    assert [inspect(model).obstacle for model in models] == [""] * 3
    merge(make_config([NAMES[0], models[0], NAMES[2]]), tmp_path / "out", shard_size=SHARD_SIZE)
    assert without_own(read_files(tmp_path / "out")) == expected


def test_who_may_not_read(hub: HubServer, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.create_repo("org/gated", gated=True)
    monkeypatch.setenv("HF_TOKEN", "hf_nobodysuchtoken")
    monkeypatch.delenv("HF_TOKEN")
    for name, hint in ((NAMES[2], "hf auth login"), ("org/gated", "accept"), ("org/absent", "no such")):
        config = write_config(tmp_path / "merge.yml", make_config([NAMES[0], NAMES[1], name]))
        outcome = cli("merge", config, tmp_path / "out")
        assert outcome.code == 2
        assert name in outcome.err
        assert hint in outcome.err, outcome.err
    assert not (tmp_path / "out").exists()


def test_who_may_not_write(hub: HubServer, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_token("hf_readerreader", user="you", can_read=["private"])
    monkeypatch.setenv("HF_TOKEN", "hf_readerreader")
    config = write_config(tmp_path / "merge.yml", make_config(NAMES))
    outcome = cli("merge", config, "hf://me/merged", "--workers", "1")
    assert outcome.code == 2
    assert "hf://me/merged" in outcome.err
    assert "hf_readerreader" not in outcome.err
    assert not any(method == "PUT" for method, *_ in hub.storage_requests)


def test_an_interrupted_merge_uploads_only_what_is_missing(hub: HubServer, expected: dict[str, bytes]) -> None:
    with pytest.raises(RuntimeError):
        merge(make_config(NAMES), "hf://me/merged", shard_size=SHARD_SIZE, on_event=stop_after(3))
    num_before = sum(method == "PUT" for method, *_ in hub.storage_requests)
    assert num_before >= 3
    report = merge(make_config(NAMES), "hf://me/merged", shard_size=SHARD_SIZE)
    assert report.num_resumed >= 3
    assert published(hub, "me/merged") == expected
    num_shards = report.num_shards
    assert sum(method == "PUT" for method, *_ in hub.storage_requests) <= num_shards + 1


@pytest.mark.slow
def test_a_killed_merge_goes_on(hub: HubServer, expected: dict[str, bytes], tmp_path: Path) -> None:
    config = write_config(tmp_path / "merge.yml", make_config(NAMES))
    process = start_held(tmp_path / "hold", 3, "merge", config, "hf://me/merged", "--shard-size", SHARD_SIZE)
    while process.poll() is None and sum(method == "PUT" for method, *_ in hub.storage_requests) < 2:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode < 0
    assert published(hub, "me/merged") == {}
    outcome = run_command("merge", config, "hf://me/merged", "--shard-size", SHARD_SIZE)
    assert outcome.code == 0, outcome.err
    assert published(hub, "me/merged") == expected


def test_somebody_else_commits_meanwhile(hub: HubServer, family: tuple[Path, ...], expected: dict[str, bytes]) -> None:
    theirs = read_files(family[0])

    meddle = on(ShardResult, lambda _: hub.upload("me/merged", dict(theirs)))

    with pytest.raises(OutputError, match=r"nothing was published|another run has finished"):
        merge(make_config(NAMES), "hf://me/merged", shard_size=SHARD_SIZE, on_event=meddle)
    assert published(hub, "me/merged") == theirs
    with pytest.raises(OutputError, match="--overwrite"):
        merge(make_config(NAMES), "hf://me/merged", shard_size=SHARD_SIZE)
    merge(make_config(NAMES), "hf://me/merged", shard_size=SHARD_SIZE, overwrite=True)
    assert published(hub, "me/merged") == expected


def test_overwrite_replaces_a_model_with_one_commit(hub: HubServer, expected: dict[str, bytes]) -> None:
    merge(make_config(NAMES, dtype="float32"), "hf://me/merged")
    with pytest.raises(OutputError, match="--overwrite"):
        merge(make_config(NAMES), "hf://me/merged", shard_size=SHARD_SIZE)
    merge(make_config(NAMES), "hf://me/merged", shard_size=SHARD_SIZE, overwrite=True)
    assert published(hub, "me/merged") == expected
    verify("hf://me/merged")


def test_a_mistyped_name_is_no_such_directory_either(hub: HubServer) -> None:
    with pytest.raises((CheckpointError, FetchError), match="org/bsae"):
        merge(make_config(["org/bsae", *NAMES[1:]]), "out")


def test_few_requests_to_the_hub_itself(hub: HubServer, tmp_path: Path) -> None:
    hub.reset_requests()
    merge(make_config(NAMES), tmp_path / "out", shard_size=SHARD_SIZE, workers=2)
    resolved: dict[str, int] = {}
    for request in hub.requests:
        if "/resolve/" in request.path:
            resolved[request.path] = resolved.get(request.path, 0) + 1
    num_processes = 3  # the driver, which reads headers, and two workers
    assert resolved
    assert max(resolved.values()) <= 2 * num_processes


# buckets


@pytest.mark.parametrize(
    "lacks",
    [
        "tokenizer_config.json",
        "model-00002*",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("*.safetensors*", "config.json")),
    ],
)
def test_half_of_a_repository_offline(
    lacks: str, hub: HubServer, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the cache lacks files, that is said, and the advice completes it."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in NAMES:
        snapshot_download(
            name, endpoint=hub.url, cache_dir=tmp_path / "cache", ignore_patterns=[lacks], token="hf_writer"
        )
    with monkeypatch.context() as offline:
        offline.setenv("HF_HUB_OFFLINE", "1")
        if lacks == "tokenizer_config.json":
            (said,) = [w for w in merge(make_config(NAMES), tmp_path / "half").warnings if "no tokenizer" in w]
        else:
            with pytest.raises(CheckpointError) as caught:
                merge(make_config(NAMES), tmp_path / "half")
            said = str(caught.value)
        assert "HF_HUB_OFFLINE is set" in said
        assert str(tmp_path / "cache" / "models--org--base") in said
    assert f"hf download {NAMES[0]} --revision {hub.get_head(NAMES[0])}" in said
    for name in NAMES:
        snapshot_download(
            name, revision=hub.get_head(name), endpoint=hub.url, cache_dir=tmp_path / "cache", token="hf_writer"
        )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    merge(make_config(NAMES), tmp_path / "out", shard_size=SHARD_SIZE)
    assert without_own(read_files(tmp_path / "out")) == expected


@pytest.fixture
def in_buckets(hub: HubServer, family: tuple[Path, ...], stores: Stores) -> list[str]:
    """The family in a bucket."""
    hub.create_bucket("me/models", private=True)
    urls = [f"hf://buckets/me/models/{path.name}" for path in family]
    for url, path in zip(urls, family, strict=True):
        for name, content in read_files(path).items():
            stores.at(url).write(f"{url}/{name}", content)
    return urls


def test_bucket_to_bucket(
    hub: HubServer, in_buckets: list[str], expected: dict[str, bytes], tmp_path: Path, cli: Cli
) -> None:
    config = write_config(tmp_path / "merge.yml", make_config(in_buckets))
    out = "hf://buckets/me/merged/deep/down"
    arguments = ("--shard-size", SHARD_SIZE, "--memory", "2GiB")
    outcome = cli("merge", config, out, *arguments)
    assert outcome.code == 0, outcome.err
    found = hub.read_bucket("me/merged")
    assert without_own({name.removeprefix("deep/down/"): content for name, content in found.items()}) == expected
    assert hub.buckets["me/merged"].private
    outcome = cli("verify", out)
    assert outcome.code == 0, outcome.err
    assert "was complete already" in cli("merge", config, out, *arguments).out
    assert "](https" not in found["deep/down/README.md"].decode().partition("raymerge")[0]
    assert hub.leaked_tokens == []


@pytest.mark.slow
def test_an_interrupted_merge_to_a_bucket(hub: HubServer, in_buckets: list[str], expected: dict[str, bytes]) -> None:
    out = "hf://buckets/me/merged"
    with pytest.raises(RuntimeError):
        merge(make_config(in_buckets), out, shard_size=SHARD_SIZE, memory="2GiB", on_event=stop_after(3))
    assert "config.json" not in hub.read_bucket("me/merged")
    report = merge(make_config(in_buckets), out, shard_size=SHARD_SIZE, memory="2GiB")
    assert report.num_resumed >= 3
    assert without_own(hub.read_bucket("me/merged")) == expected


# hundreds of shards


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[str, bytes]]:
    """Models that merge into 255 shards, and what comes of it."""
    directory = tmp_path_factory.mktemp("many")
    models = list(map(str, write_family(directory, 1, num_layers=28, dtype=torch.bfloat16)))
    report = merge(make_config(models), directory / "merged", shard_size=1)
    assert report.num_shards == 255
    return models, without_own(read_files(directory / "merged"))


def check_history(hub: HubServer, name: str) -> list[Commit]:
    """Make sure that commits are small, and that nothing loads before the last; return them, the first one first."""
    commits = list(hub.repos[name].get_head("main").iter_history())[::-1]
    for commit in commits[1:]:
        assert commit.parent is not None
        before, after = commit.parent.files, commit.files
        assert 0 < sum(before.get(path) != after.get(path) for path in {**before, **after}) < 100
    for commit in commits:
        loadable = {"config.json", "model.safetensors.index.json", "raymerge_manifest.json"} & commit.files.keys()
        if loadable:
            manifest = json.loads(hub.read_files(name, commit.oid)["raymerge_manifest.json"])
            assert manifest["files"].keys() < commit.files.keys()
    return commits


@pytest.mark.slow
@pytest.mark.parametrize(("num_before", "is_applied"), [(0, False), (1, True)])
def test_a_merge_of_hundreds_of_shards_is_killed_at_a_commit(
    hub: HubServer,
    many: tuple[list[str], dict[str, bytes]],
    num_before: int,
    is_applied: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = write_config(tmp_path / "merge.yml", make_config(many[0]))
    arguments = ("merge", config, "hf://me/many", "--shard-size", "1B", "--workers", "2")
    process = start_command(*arguments)
    commit, calls = hub.commit, itertools.count()

    def commit_and_kill(*change: Any) -> Commit:
        if next(calls) != num_before:
            return commit(*change)
        made = commit(*change) if is_applied else None
        process.kill()
        process.wait()
        if made is None:
            raise ConnectionError
        return made

    with monkeypatch.context() as patch:
        patch.setattr(hub, "commit", commit_and_kill)
        _, error = process.communicate()
    assert process.returncode < 0, error
    assert len(check_history(hub, "me/many")) == 1 + num_before + is_applied
    num_sent = sum(method == "PUT" for method, *_ in hub.storage_requests)
    hub.reset_requests()
    with pytest.raises(CheckpointError):
        plan(make_config(["me/many", many[0][1]]))
    outcome = run_command(*arguments)
    assert outcome.code == 0, outcome.err
    assert len(check_history(hub, "me/many")) == 4
    assert published(hub, "me/many") == many[1]
    assert num_sent == 255
    assert sum(method == "PUT" for method, *_ in hub.storage_requests) == 1, "of raymerge_figures.parquet alone"


@pytest.mark.slow
def test_hundreds_of_shards_replace_a_model(hub: HubServer, many: tuple[list[str], dict[str, bytes]]) -> None:
    merge(make_config(NAMES), "hf://me/many")
    before = hub.repos["me/many"].get_head("main")
    merge(make_config(many[0]), "hf://me/many", shard_size=1, workers=2, overwrite=True)
    commits = check_history(hub, "me/many")
    assert "config.json" in before.files
    assert commits.index(before) == len(commits) - 4
    assert published(hub, "me/many") == many[1]


def test_an_adapter_is_read_where_it_is(family: tuple[Path, ...], hub: HubServer, tmp_path: Path) -> None:
    weights = [tensor for tensor in inspect(family[0]).tensors if tensor.name.endswith("q_proj.weight")]
    factors: dict[str, torch.Tensor] = {}
    for weight in weights:
        factors |= draw_factors(weight.name.removesuffix(".weight"), *weight.shape)
    adapter = Path(write_adapter(tmp_path / "adapter", factors))
    hub.create_repo("org/adapter")
    hub.upload("org/adapter", dict(read_files(adapter)))
    for name, model in (("here", f"{family[0]}+{adapter}"), ("there", f"{NAMES[0]}+org/adapter@main")):
        merge({"merge_method": "passthrough", "models": [{"model": model}]}, tmp_path / name)
    here, there = (without_own(read_files(tmp_path / name)) for name in ("here", "there"))
    assert {name: here[name] == there[name] for name in here if name.endswith(".safetensors")} == {
        "model.safetensors": True
    }
    assert "org/adapter" in (tmp_path / "there" / "README.md").read_text()
    config = {"merge_method": "passthrough", "models": [{"model": "org/tuned1+org/adapter"}]}
    (warning,) = plan(config).warnings
    assert "the adapter was trained on 'org/base', and is put on org/tuned1" in warning
