from __future__ import annotations

from pathlib import Path

import pytest

from raymerge.pipeline.checkpoint.find import find_models
from raymerge.pipeline.errors import CheckpointError
from raymerge.pipeline.stores.open import Stores
from tests.servers.s3 import S3Server

NAMES = ("step-900", "step-1000", "step-20", "step-1000/optimizer", "v2-step-7/hf", "final", "step-5.tmp")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for name in NAMES:
        directory = tmp_path / "run 3" / name
        directory.mkdir(parents=True, exist_ok=True)
        if name != "step-1000/optimizer":
            (directory / "config.json").write_text("{}")
    return tmp_path / "run 3"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("step-*", [("step-5.tmp", 5), ("step-20", 20), ("step-900", 900), ("step-1000", 1000)]),
        ("step-*/", [("step-5.tmp", 5), ("step-20", 20), ("step-900", 900), ("step-1000", 1000)]),
        ("step-?0", [("step-20", 2)]),
        ("step-[0-9]00", [("step-900", 9)]),
        ("step-[!1]0", [("step-20", 2)]),
        ("step-[^2]0", [("step-20", 2)]),
        ("v2-step-*/hf", [("v2-step-7/hf", 7)]),
        ("*", [("final", None), ("step-5.tmp", 5), ("step-20", 20), ("step-900", 900), ("step-1000", 1000)]),
        ("final", [("final", None)]),
        ("step-*/optimizer", []),
        ("nothing-*", []),
    ],
)
def test_directories_with_a_config_in_the_order_of_their_steps(
    pattern: str, expected: list[tuple[str, int | None]], run: Path, stores: Stores
) -> None:
    assert find_models(stores, f"{run}/{pattern}") == [(f"{run}/{name}", step) for name, step in expected]


def test_relative_paths(run: Path, stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    assert [model.path for model in find_models(stores, "step-?00")] == ["./step-900"]
    monkeypatch.chdir(run.parent)
    assert [model.path for model in find_models(stores, "run 3/step-?00")] == ["run 3/step-900"]


def test_a_bucket(s3_server: S3Server, bucket: str, stores: Stores) -> None:
    for name in (
        "a/step-2/config.json",
        "a/step-10/config.json",
        "a/step-3/model.safetensors",
        "ab/step-4/config.json",
    ):
        s3_server.client().put_object(Bucket=bucket, Key=name, Body=b"{}")
    found = find_models(stores, f"s3://{bucket}/a/step-*")
    assert found == [(f"s3://{bucket}/a/step-2", 2), (f"s3://{bucket}/a/step-10", 10)]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("/*/step-1", "begin with a directory"),
        ("/", "begin with a directory"),
        ("run/**", r"`\*\*` has no meaning here"),
        ("run/step-[9-0]", "no pattern: bad character range 9-0"),
    ],
)
def test_what_is_no_pattern(pattern: str, message: str, stores: Stores) -> None:
    with pytest.raises(CheckpointError, match=message):
        find_models(stores, pattern)


def test_links_to_directories(run: Path, stores: Stores) -> None:
    (run / "best-1").symlink_to(run / "step-900")
    assert [model.path for model in find_models(stores, f"{run}/best-*")] == [f"{run}/best-1"]
