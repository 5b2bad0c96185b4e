"""Two merges in one process, each with options of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from raymerge import Planned, merge
from tests.checkpoints import read_files, write_family
from tests.servers.faults import Fault, FaultProxy, Request
from tests.servers.hub import HubServer
from tests.servers.s3 import S3Server
from tests.stored_models import upload, without_own
from tests.watchers import on


def wait_for(barrier: threading.Barrier, _: Planned) -> None:
    """Begin to write when the other merge is as far: between the plan and the first look at the output's lock."""
    barrier.wait(60)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub with no models, in an environment that leads to it."""
    with HubServer(tmp_path / "hub") as hub:
        hub.add_token("hf_writer", user="me", can_write=["me"])
        for name, value in hub.environment(tmp_path).items():
            monkeypatch.setenv(name, value)
        yield hub


@pytest.fixture
def family(tmp_path: Path) -> tuple[Path, ...]:
    return write_family(tmp_path / "models", 2)


def make_config(models: list[str]) -> dict[str, Any]:
    """Return a config whose output depends on the seed."""
    return {
        "merge_method": "dare_ties",
        "base_model": models[0],
        "models": [{"model": model, "parameters": {"weight": 0.5, "density": 0.5}} for model in models[1:]],
    }


def test_a_repository_stays_private_whatever_begins_meanwhile(
    hub: HubServer, family: tuple[Path, ...], tmp_path: Path
) -> None:
    config = make_config(list(map(str, family)))
    other = partial(merge, config, tmp_path / "other", private=False)
    merge(config, "hf://me/secret", on_event=on(Planned, lambda _: other()))
    assert hub.repos["me/secret"].private


def test_a_repository_becomes_public_where_that_is_asked_for(
    hub: HubServer, family: tuple[Path, ...], tmp_path: Path
) -> None:
    config = make_config(list(map(str, family)))
    other = partial(merge, config, tmp_path / "other")
    merge(config, "hf://me/open", private=False, on_event=on(Planned, lambda _: other()))
    assert not hub.repos["me/open"].private


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_pairs_in_two_threads_do_not_see_each_other(
    workers: int,
    hub: HubServer,
    s3_server: S3Server,
    family: tuple[Path, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_pairs = 10
    expected = {}
    for seed in range(2 * num_pairs):
        merge(make_config(list(map(str, family))), tmp_path / f"expected{seed}", seed=seed, workers=1)
        expected[seed] = without_own(read_files(tmp_path / f"expected{seed}"))
    assert len({files["model.safetensors"] for files in expected.values()}) == len(expected)
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    buckets = [s3_server.create_bucket(f"{tmp_path.name.replace('_', '-')}-{name}"[-40:]) for name in ("one", "two")]
    models = [[upload(s3_server, bucket, path.name, path) for path in family] for bucket in buckets]
    options: list[dict[str, Any]] = [{}, {"private": False, "storage": "fsspec"}]
    with FaultProxy(s3_server.endpoint) as proxy, ThreadPoolExecutor(2) as pool:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        for number in range(num_pairs):
            names = [f"me/{kind}{number}" for kind in ("secret", "open")]
            proxy.script([Fault.SLOW_DOWN] * 3, only=is_get_from(buckets[number % 2]))
            meet = threading.Barrier(2)
            merges = [
                pool.submit(
                    merge,
                    make_config(models[k]),
                    f"hf://{names[k]}",
                    workers=workers,
                    seed=2 * number + k,
                    on_event=on(Planned, partial(wait_for, meet)),
                    **options[k],
                )
                for k in range(2)
            ]
            reports = [future.result() for future in as_completed(merges)]
            reports.sort(key=lambda report: report.out != f"hf://{names[0]}")
            for k, report in enumerate(reports):
                files = {
                    path: data for path, data in hub.read_files(names[k], "main").items() if path != ".gitattributes"
                }
                assert without_own(files) == expected[2 * number + k]
                assert hub.repos[names[k]].private == (k == 0)
                faults = [(f"s3://{buckets[k]}: GET: 503 SlowDown", 3)] if k == number % 2 else []
                assert list(report.faults) == faults


def is_get_from(bucket: str) -> Callable[[Request], bool]:
    return lambda request: request.operation == "GetObject" and request.path.startswith(f"/{bucket}/")
