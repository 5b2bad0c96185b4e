"""Whole merges from and to real stores."""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from raymerge import Event, Planned, Resumed, merge, verify
from raymerge.pipeline.errors import ConfigError, FetchError, MemoryLimitError, OutputError
from raymerge.pipeline.plan.results import ShardResult
from raymerge.pipeline.stores import lease
from raymerge.pipeline.stores.open import Stores
from raymerge.pipeline.stores.seam import Storage
from tests.checkpoints import INDEX, read_files, write_config, write_family
from tests.commands import Cli, run_command, start_command
from tests.holding import start_held
from tests.memory_promise import NUM_ELEMENTS, SCRIPT, SLACK_NBYTES, write_models
from tests.servers.faults import Fault, FaultProxy, is_operation
from tests.servers.s3 import JuiceServer, S3Server
from tests.stored_models import download, make_config, merge_locally, upload, without_own
from tests.watchers import Keep, on, stop_after

SHARD_SIZE = "60kB"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    return write_family(
        tmp_path_factory.mktemp("family"), 2, num_layers=6, dtype=torch.bfloat16, num_shards=2, hidden=64
    )


@pytest.fixture(scope="module")
def expected(family: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a merge on local disk writes."""
    return merge_locally(family, tmp_path_factory.mktemp("expected") / "merged", shard_size=SHARD_SIZE)


@pytest.fixture
def models(bucket: str, s3_server: S3Server, family: tuple[Path, ...]) -> list[str]:
    """URLs of the family in a bucket."""
    return [upload(s3_server, bucket, f"models/{path.name}", path) for path in family]


def test_s3_to_s3(
    models: list[str], bucket: str, s3_server: S3Server, expected: dict[str, bytes], tmp_path: Path, cli: Cli
) -> None:
    config = write_config(tmp_path / "merge.yml", make_config(models))
    out = f"s3://{bucket}/out/merged model"
    outcome = cli("merge", config, out, "--shard-size", SHARD_SIZE)
    assert (outcome.code, outcome.out[: len(out)]) == (0, out), outcome.err
    files = download(out)
    assert without_own(files) == expected
    assert s3_server.uploads_of(bucket) == []
    manifest = json.loads(files["raymerge_manifest.json"])
    assert [item["model"] for item in manifest["models"]] == models
    assert sum(item["nbytes"] for item in manifest["inputs"]) > 0
    assert cli("verify", out).out.startswith(f"{out} is sound")
    assert "was complete already" in cli("merge", config, out, "--shard-size", SHARD_SIZE).out
    assert cli("verify", f"{out}/").code == 0
    assert list(tmp_path.iterdir()) == [config]


def test_every_way_gives_the_same_bytes(
    family: tuple[Path, ...], models: list[str], bucket: str, expected: dict[str, bytes], tmp_path: Path
) -> None:
    mixed = [models[0], str(family[1]), models[2]]
    memory = fsspec.filesystem("memory")
    for path in family:
        memory.put(str(path), f"/models/{path.name}", recursive=True)
    in_memory = [f"memory://models/{path.name}" for path in family]
    ways: list[tuple[list[str], str, dict[str, Any]]] = [
        (mixed, str(tmp_path / "out"), {}),
        (mixed, f"s3://{bucket}/mixed", {"workers": 1}),
        (models, f"s3://{bucket}/fsspec", {"storage": "fsspec"}),
        (in_memory, "memory://merged", {}),
        (list(map(str, family)), f"s3://{bucket}/from-local", {"workers": 3}),
    ]
    for inputs, out, options in ways:
        merge(make_config(inputs), out, shard_size=SHARD_SIZE, **options)
        assert without_own(download(out)) == expected, out
        verify(out)


@pytest.mark.slow
def test_either_library_finishes_what_the_other_began(
    models: list[str], bucket: str, expected: dict[str, bytes]
) -> None:
    out = f"s3://{bucket}/merged"
    with pytest.raises(RuntimeError):
        merge(make_config(models), out, shard_size=SHARD_SIZE, on_event=stop_after(2))
    report = merge(make_config(models), out, shard_size=SHARD_SIZE, storage="fsspec")
    assert report.num_resumed >= 2
    assert without_own(download(out)) == expected


def test_a_stopped_merge_goes_on(models: list[str], bucket: str, expected: dict[str, bytes], stores: Stores) -> None:
    out = f"s3://{bucket}/merged"
    with pytest.raises(RuntimeError):
        merge(make_config(models), out, shard_size=SHARD_SIZE, on_event=stop_after(2))
    names = list(stores.at(out).list(out))
    assert INDEX not in names
    assert "config.json" not in names
    assert sum(name.endswith(".safetensors.json") for name in names) >= 2
    report = merge(make_config(models), out, shard_size=SHARD_SIZE)
    assert report.num_resumed >= 2
    assert without_own(download(out)) == expected


@pytest.mark.slow
def test_a_killed_merge_goes_on(
    models: list[str], bucket: str, s3_server: S3Server, expected: dict[str, bytes], tmp_path: Path, stores: Stores
) -> None:
    config = write_config(tmp_path / "merge.yml", make_config(models))
    out = f"s3://{bucket}/merged"
    process = start_held(tmp_path / "hold", 3, "merge", config, out, "--shard-size", "5kB")
    journal = f"{out}/.raymerge"
    while process.poll() is None and not any(n.endswith("ors.json") for n in stores.at(out).list(journal)):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode < 0
    outcome = run_command("merge", config, out, "--shard-size", "5kB")
    assert outcome.code == 0, outcome.err
    assert "finished and sound; going on" in outcome.err
    merge(make_config(models), tmp_path / "out", shard_size="5kB")
    assert without_own(download(out)) == without_own(read_files(tmp_path / "out"))
    assert s3_server.uploads_of(bucket) == []


@pytest.mark.slow
def test_no_byte_of_a_model_touches_the_local_disk(
    models: list[str], bucket: str, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """No process of the merge may write a file as large as a shard, anywhere."""
    config = write_config(tmp_path / "merge.yml", make_config(models))
    limit = 16 * 1024
    assert max(len(data) for name, data in expected.items() if name.endswith(".safetensors")) > limit
    process = subprocess.run(
        [sys.executable, "-m", "raymerge", "merge", config, f"s3://{bucket}/merged", "--shard-size", SHARD_SIZE],
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(tmp_path)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert without_own(download(f"s3://{bucket}/merged")) == expected


def test_a_second_run_is_refused(models: list[str], bucket: str, tmp_path: Path, cli: Cli, stores: Stores) -> None:
    config = write_config(tmp_path / "merge.yml", make_config(models))
    out = f"s3://{bucket}/merged"
    with stores.at(out).lock(f"{out}/.raymerge/lock"):
        outcome = cli("merge", config, out)
    assert outcome.code == 2
    assert "another raymerge run" in outcome.err
    assert cli("merge", config, out).code == 0


def test_a_run_whose_lock_was_taken_stops(
    models: list[str], bucket: str, monkeypatch: pytest.MonkeyPatch, stores: Stores
) -> None:
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", 0.1)
    out = f"s3://{bucket}/merged"

    results: list[ShardResult] = []

    def steal(result: ShardResult) -> None:
        results.append(result)
        if len(results) == 1:
            stores.at(out).write(f"{out}/.raymerge/lock", b'{"token": "of another run"}')
            time.sleep(1)

    with pytest.raises(OutputError, match="lock"):
        merge(make_config(models), out, shard_size=SHARD_SIZE, workers=1, on_event=on(ShardResult, steal))
    assert INDEX not in stores.at(out).list(out)


def test_two_that_finish_at_once_do_not_mix(models: list[str], bucket: str, stores: Stores) -> None:
    """The lock failed, and another run has finished here first."""
    out = f"s3://{bucket}/merged"

    rival = on(ShardResult, lambda _: stores.at(out).write(f"{out}/{INDEX}", b"{}"))

    with pytest.raises(OutputError, match="another run has finished a different model here"):
        merge(make_config(models), out, shard_size=SHARD_SIZE, on_event=rival)
    assert stores.at(out).read(f"{out}/{INDEX}", 10) == b"{}"


def change_last_byte(storage: Storage, url: str) -> None:
    content = bytearray(storage.read(url, 2**30))
    content[-1] ^= 1
    storage.write(url, bytes(content))


@pytest.mark.parametrize("library", ["auto", pytest.param("fsspec", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "tokenizer_config.json"])
def test_a_replaced_input_stops_the_merge(
    models: list[str], bucket: str, name: str, library: Any, stores: Stores
) -> None:
    model = models[1] if name.endswith("safetensors") else models[0]
    out = f"s3://{bucket}/merged"
    with pytest.raises(FetchError, match=f"{model}/{name}.*changed"):
        merge(
            make_config(models),
            out,
            shard_size=SHARD_SIZE,
            storage=library,
            on_event=on(Planned, lambda _: change_last_byte(stores.at(model), f"{model}/{name}")),
        )
    names = list(stores.at(out).list(out))
    assert INDEX not in names
    assert "config.json" not in names


def test_overwrite(models: list[str], bucket: str, expected: dict[str, bytes]) -> None:
    out = f"s3://{bucket}/merged"
    merge(make_config(models, dtype="float32"), out, shard_size=SHARD_SIZE)
    with pytest.raises(OutputError, match="--overwrite"):
        merge(make_config(models), out, shard_size=SHARD_SIZE)
    merge(make_config(models), out, shard_size=SHARD_SIZE, overwrite=True)
    assert without_own(download(out)) == expected


def test_an_output_in_an_input_is_refused(models: list[str], bucket: str) -> None:
    for out in (models[0], f"{models[1]}/merged", f"s3://{bucket}", f"s3a://{bucket}/models/"):
        with pytest.raises(ConfigError, match="overlap"):
            merge(make_config(models), out)


def test_memory_for_transfers_is_part_of_the_plan(models: list[str], bucket: str) -> None:
    with pytest.raises(MemoryLimitError) as caught:
        merge(make_config(models), f"s3://{bucket}/merged", memory="1MiB")
    needed = str(caught.value).rpartition("--memory ")[2]
    assert int(needed.removesuffix("MiB")) > 40
    merge(make_config(models), f"s3://{bucket}/merged", memory=needed)


def test_no_credential_gets_into_the_output(
    models: list[str], bucket: str, s3_server: S3Server, family: tuple[Path, ...], cli: Cli, tmp_path: Path
) -> None:
    inputs = [*models[:2], f"memory://user:pa55word@models/{family[2].name}"]
    memory = fsspec.filesystem("memory")
    memory.put(str(family[2]), f"/user:pa55word@models/{family[2].name}", recursive=True)
    merge(make_config(inputs), f"s3://{bucket}/merged", shard_size=SHARD_SIZE, workers=1)
    for name, content in download(f"s3://{bucket}/merged").items():
        for secret in ("pa55word", s3_server.admin.secret_access_key):
            assert secret.encode() not in content, name


@pytest.fixture
def proxy(s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Stands between raymerge and the S3 server."""
    with FaultProxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.mark.slow
def test_a_store_that_goes_down(
    models: list[str], bucket: str, proxy: FaultProxy, tmp_path: Path, stores: Stores
) -> None:
    config = write_config(tmp_path / "merge.yml", make_config(models))
    out = f"s3://{bucket}/merged"
    process = start_held(tmp_path / "hold", 3, "merge", config, out, "--shard-size", "5kB")
    while process.poll() is None and not any(n.endswith("ors.json") for n in stores.at(out).list(f"{out}/.raymerge")):
        time.sleep(0.01)
    proxy.down = True
    (tmp_path / "hold" / "go").touch()
    started = time.monotonic()
    _, err = process.communicate()
    assert time.monotonic() - started < 90  # 40 seconds of patience
    assert process.returncode == 2, err
    assert f"s3://{bucket}" in err
    assert "attempts" in err
    proxy.down = False
    assert INDEX not in stores.at(out).list(out)
    outcome = run_command("merge", config, out, "--shard-size", "5kB")
    assert outcome.code == 0, outcome.err
    assert "finished and sound; going on" in outcome.err
    merge(make_config(models), tmp_path / "out", shard_size="5kB")
    assert without_own(download(out)) == without_own(read_files(tmp_path / "out"))


def test_faults_are_reported(models: list[str], bucket: str, proxy: FaultProxy, tmp_path: Path, cli: Cli) -> None:

    config = write_config(tmp_path / "merge.yml", make_config(models))
    proxy.script([Fault.SLOW_DOWN] * 3, only=is_operation("GetObject"))
    outcome = cli("merge", config, f"s3://{bucket}/merged", "--workers", "1")
    assert outcome.code == 0, outcome.err
    assert f"  retries   3\n    3 x s3://{bucket}: GET: 503 SlowDown\n" in outcome.out
    assert f"retried: s3://{bucket}: GET: 503 SlowDown (3 times by now)\n" in outcome.err


@pytest.mark.slow
@pytest.mark.parametrize("library", ["auto", "fsspec"])
def test_another_s3_server(
    family: tuple[Path, ...], expected: dict[str, bytes], library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with JuiceServer() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        bucket = server.create_bucket("another")
        inputs = [upload(server, bucket, f"models/{path.name}", path) for path in family]
        out = f"s3://{bucket}/merged"
        with pytest.raises(RuntimeError):
            merge(make_config(inputs), out, shard_size=SHARD_SIZE, storage=library, on_event=stop_after(2))
        report = merge(make_config(inputs), out, shard_size=SHARD_SIZE, storage=library)
        assert report.num_resumed >= 2
        assert without_own(download(out)) == expected
        verify(out, storage=library)
        assert server.uploads_of(bucket) == []


@pytest.mark.slow
def test_memory_is_what_the_plan_says(bucket: str, s3_server: S3Server, tmp_path: Path) -> None:
    configs = []
    for name, num_elements in (("tiny", 2**12), ("large", NUM_ELEMENTS)):
        models = write_models(tmp_path / name, num_elements)
        urls = [upload(s3_server, bucket, f"{name}/{Path(model).name}", Path(model)) for model in models]
        configs.append(write_config(tmp_path / f"{name}.yml", make_config(urls)))
    for memory in ("112MiB", "160MiB"):
        out = f"s3://{bucket}/merged-{memory}"
        process = subprocess.run([sys.executable, "-c", SCRIPT, *configs, out, memory], capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        measured = json.loads(process.stdout)
        assert measured["used"] <= measured["projected"] + SLACK_NBYTES <= measured["allowed"] + SLACK_NBYTES
        assert measured["used"] > measured["projected"] / 4


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_driver(
    models: list[str], bucket: str, proxy: FaultProxy, tmp_path: Path, number: signal.Signals
) -> None:
    """Workers that outlive a killed driver would write over what the next run makes."""
    config = write_config(tmp_path / "merge.yml", make_config(models))
    proxy.stall_s = 600
    puts = itertools.count()
    proxy.only = lambda request: request.operation == "PutObject" and next(puts) >= 8
    proxy.faults = {Fault.STALL: 1.0}
    process = start_command("merge", config, f"s3://{bucket}/merged", "--shard-size", "5kB")
    while process.poll() is None and not proxy.injected:
        time.sleep(0.01)
    time.sleep(1)
    assert process.poll() is None
    num_sent = proxy.operations["PutObject"]
    process.send_signal(number)
    process.communicate()  # until nobody holds the other end, workers among them
    assert proxy.operations["PutObject"] <= num_sent + 2, "nobody has tried once more what the store does not answer"


@pytest.mark.slow
def test_ctrl_c_ends_within_seconds_while_a_store_is_silent(
    models: list[str], bucket: str, proxy: FaultProxy, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "merge.yml", make_config(models))
    proxy.stall_s = 60
    for operation in ("ListObjects", "GetObject", "PutObject"):
        proxy.clear()
        proxy.only = is_operation(operation)
        proxy.faults = {Fault.STALL: 1.0}
        process = start_command("merge", config, f"s3://{bucket}/merged", "--shard-size", "5kB")
        while process.poll() is None and not proxy.injected:
            time.sleep(0.01)
        time.sleep(0.5)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
        assert time.monotonic() - started < 18, operation  # a request has 20 seconds
        assert process.returncode == 130
        assert "Interrupted." in err
        assert "Traceback" not in err


def test_a_run_that_lost_its_lock_commits_nothing_more(models: list[str], bucket: str, stores: Stores) -> None:
    """It was frozen for a while, and another run has begun since."""
    out = f"s3://{bucket}/merged"

    keep = Keep()

    def freeze(event: Event) -> None:
        keep(event)
        if isinstance(event, Resumed):
            stores.at(out).write(f"{out}/.raymerge/lock", b'{"token": "of another run"}')

    with pytest.raises(OutputError, match="taken the lock"):
        merge(make_config(models), out, shard_size=SHARD_SIZE, on_event=freeze)
    assert not keep.list(ShardResult)
    assert not any(name.endswith(".safetensors") for name in stores.at(out).list(out))


def test_a_shard_of_another_run_is_not_published(models: list[str], bucket: str, stores: Stores) -> None:
    out = f"s3://{bucket}/merged"
    url = f"{out}/model-00001-of-00010.safetensors"

    def swap(result: ShardResult) -> None:
        if result.file == url.rpartition("/")[2]:
            change_last_byte(stores.at(out), url)

    with pytest.raises(OutputError, match="no longer what was written"):
        merge(make_config(models), out, shard_size=SHARD_SIZE, on_event=on(ShardResult, swap))
    assert INDEX not in stores.at(out).list(out)
