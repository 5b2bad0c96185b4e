"""What every kind of merge writes, held byte for byte in digests.json.

The digests were recorded before merges got the form that they have now, and no change to the engine may move them. If a
change of the output is meant, let the changed merges record theirs, look at which files changed, and say why in the
commit:

    RAYMERGE_RECORD=1 pytest tests/test_digests.py -m "slow or not slow" -k "NAME"

Left out of each digest: the manifest and figures, which hold versions and paths, and the model card.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest
import yaml

from raymerge import merge, plan
from tests.checkpoints import read_files, write_config
from tests.commands import run_command
from tests.digests.cases import HUB_MERGES, MERGES, RAY_MERGES, REMOTE, S3_MERGES, SHIPPED, Case
from tests.digests.models import write_models
from tests.servers.hub import HubServer
from tests.servers.s3 import S3Server

DIGESTS = Path(__file__).with_name("digests.json")
IS_RECORDING = "RAYMERGE_RECORD" in os.environ


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of all models; configs name them relative to it."""
    directory = tmp_path_factory.mktemp("models")
    public = {name for path in SHIPPED for name in find_models(yaml.safe_load(path.read_text()))}
    write_models(directory, sorted(public))
    return directory


@pytest.fixture(autouse=True)
def in_models(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)


def find_models(node: object) -> Iterator[str]:
    """Yield every model that a config names."""
    if isinstance(node, list):
        for element in node:
            yield from find_models(element)
    elif isinstance(node, Mapping):
        yield from (node[key] for key in ("model", "base_model") if isinstance(node.get(key), str))
        for value in node.values():
            yield from find_models(value)


def digest(files: Iterable[tuple[str, bytes]]) -> dict[str, str]:
    """Return the checksum of each file that the digest covers."""
    checksums = {}
    for name, content in sorted(files):
        if name.startswith("raymerge_") or name in ("README.md", ".gitattributes"):
            continue
        if name.endswith("index.json"):
            content = re.sub(rb'"raymerge_version": "[^"]*"', b"", content)
        checksums[name] = hashlib.sha256(content).hexdigest()
    return checksums


def check(name: str, found: Mapping[str, str]) -> None:
    """Compare a merge's files with those that are held, or record them."""
    held = json.loads(DIGESTS.read_text()) if DIGESTS.exists() else {}
    if IS_RECORDING:
        DIGESTS.write_text(json.dumps(dict(sorted((held | {name: found}).items())), indent=1) + "\n")
    else:
        assert found == held[name]


@pytest.mark.parametrize("name", MERGES)
def test_disk_to_disk(name: str, tmp_path: Path) -> None:
    case = MERGES[name]
    options = {"workers": 1} | case.options
    if case.is_streamed:
        assert any(task.reread_nbytes for task in plan(case.config, **options).tasks)
    merge(case.config, tmp_path / "merged", **options)
    check(name, digest(read_files(tmp_path / "merged").items()))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if "fsspec" in name else []) for name in S3_MERGES]
)
def test_s3(name: str, models: Path, bucket: str, s3_server: S3Server, tmp_path: Path) -> None:
    """In a bucket of a name that stays, for the config is part of the output."""
    case, out = S3_MERGES[name]
    client = s3_server.client()
    s3_server.create_bucket("digests")
    try:
        for model in REMOTE:
            for file, content in read_files(models / model).items():
                client.put_object(Bucket="digests", Key=f"{model}/{file}", Body=content)
        prefix = out.removeprefix("s3://digests/") + "/"
        merge(case.config, out if out.startswith("s3:") else tmp_path / out, **case.options)
        files: dict[str, bytes] = {} if out.startswith("s3:") else read_files(tmp_path / out)
        for key in s3_server.keys_of("digests"):
            if key.startswith(prefix):
                files[key.removeprefix(prefix)] = client.get_object(Bucket="digests", Key=key)["Body"].read()
    finally:
        client.delete_bucket(Bucket="digests")
    check(name, digest(files.items()))


def run(case: Case, out: str | Path, tmp_path: Path) -> None:
    """Carry out a merge from the command line."""
    assert isinstance(case.config, dict)
    flags: list[str] = []
    for option, value in case.options.items():
        flags += [f"--{option.replace('_', '-')}", *([] if value is True else [str(value)])]
    outcome = run_command("merge", write_config(tmp_path / "merge.yml", case.config), out, *flags)
    assert outcome.code == 0, outcome.err


@pytest.mark.slow
@pytest.mark.parametrize("name", HUB_MERGES)
def test_hub(name: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, out = HUB_MERGES[name]
    with HubServer(tmp_path / "hub") as hub:
        hub.add_token("hf_writer", user="me", can_write=["me"])
        for model in REMOTE:
            hub.create_repo(f"org/{model}")
            hub.upload(f"org/{model}", dict(read_files(models / model)))
        for variable, value in hub.environment(tmp_path).items():
            monkeypatch.setenv(variable, value)
        is_remote = out.startswith("hf://")
        run(case, out if is_remote else tmp_path / out, tmp_path)
        files = hub.read_files(out.removeprefix("hf://"), "main") if is_remote else read_files(tmp_path / out)
    check(name, digest(files.items()))


@pytest.mark.slow
@pytest.mark.parametrize("name", RAY_MERGES)
def test_ray(name: str, tmp_path: Path) -> None:
    case, out = RAY_MERGES[name]
    run(case, tmp_path / out, tmp_path)
    check(name, digest(read_files(tmp_path / out).items()))


def test_all_digests_are_of_merges() -> None:
    assert (
        json.loads(DIGESTS.read_text()).keys()
        == MERGES.keys() | S3_MERGES.keys() | HUB_MERGES.keys() | RAY_MERGES.keys()
    )


def test_ways_that_make_no_difference_write_the_same() -> None:
    """Stores, libraries and runners write the same tensors; only the config that is kept names other places."""
    held = json.loads(DIGESTS.read_text())
    names = ("S3 to S3", "S3 to S3 through fsspec", "disk to S3", "Hub to Hub", "Hub to disk", "Ray")
    without = [{file: x for file, x in held[name].items() if file != "mergekit_config.yml"} for name in names]
    assert all(files == without[0] for files in without)
    assert len(without[0]) > 5
