"""Inspection of checkpoints on a Hub, in a bucket and on the web."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest
import torch

from raymerge.pipeline.checkpoint.inspection.inspect import inspect
from tests.checkpoints import write_llama
from tests.commands import Cli

if TYPE_CHECKING:
    from tests.servers.hub import HubServer
    from tests.servers.s3 import S3Server


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "model", num_layers=3, dtype=torch.bfloat16, num_shards=3)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub that this process is led to, as one who may write."""
    from tests.servers.hub import HubServer

    with HubServer(tmp_path / "hub") as server:
        server.add_token("hf_writer", user="me", can_write=["me"])
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
        yield server


def test_on_the_hub(hub: HubServer, sharded: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(sharded.parent)
    hub.create_repo("me/model", private=True)
    hub.upload("me/model", {path.name: path for path in sharded.iterdir()})
    local, found = inspect(sharded), inspect("me/model")
    assert re.fullmatch("hf://me/model@[0-9a-f]{40}", found.url)
    assert found.tensors == local.tensors
    assert found.read_nbytes == local.read_nbytes
    hub.move_branch("me/model", "a/b", hub.get_head("me/model"))
    branch = ("me/model@a/b", "hf://me/model@a/b", "hf://me/model@a%2Fb")
    for url in ("hf://me/model", "me/model@main", "hf://me/model@main", found.url, *branch):
        assert inspect(url) == found
    name = "model-00002-of-00003.safetensors"
    for url in (f"me/model/{name}", f"hf://me/model@main/{name}", f"{found.url}/{name}"):
        file = inspect(url)
        assert file.url == f"{found.url}/{name}"
        assert file.tensors == inspect(sharded / name).tensors
    for absent in ("me/absent", "me/model@absent", f"hf://me/model/absent-{name}", f"me/model/absent-{name}"):
        outcome = cli("inspect", absent)
        assert (outcome.code, outcome.out) == (2, "")
        assert "absent" in outcome.err


@pytest.mark.parametrize("storage", ["auto", "fsspec"])
def test_in_a_bucket(
    storage: Literal["auto", "fsspec"], sharded: Path, bucket: str, s3_server: S3Server, cli: Cli
) -> None:
    for path in sharded.iterdir():
        s3_server.client().put_object(Bucket=bucket, Key=f"a b/{path.name}", Body=path.read_bytes())
    url = f"s3://{bucket}/a b"
    found, local = inspect(url, storage=storage), inspect(sharded)
    assert found == dataclasses.replace(local, url=url)
    file = inspect(f"{url}/model-00002-of-00003.safetensors", storage=storage)
    assert file.tensors == tuple(t for t in local.tensors if t.file.url == "model-00002-of-00003.safetensors")
    outcome = cli("inspect", f"{url}/", "--storage", storage)
    assert (outcome.code, outcome.err) == (0, "")
    assert f"  where      {url}\n" in outcome.out
    for absent in (f"s3://{bucket}/absent", f"{url}/absent.safetensors"):
        outcome = cli("inspect", absent, "--storage", storage)
        assert (outcome.code, outcome.out) == (2, "")
        assert absent in outcome.err


def test_one_file_on_the_web(sharded: Path, cli: Cli) -> None:
    from tests.servers.static import NginxServer

    name = "model-00002-of-00003.safetensors"
    with NginxServer(sharded.parent) as server:
        url = f"{server.endpoint}/{sharded.name}/{name}?X-Amz-Signature=abcdef"
        found = inspect(url)
        assert found.tensors == inspect(sharded / name).tensors
        assert found.files[0].name == name
        outcome = cli("inspect", url)
        assert outcome.code == 0
        assert "?X-Amz-Signature=***\n" in outcome.out
        assert "abcdef" not in outcome.out
        outcome = cli("inspect", url.replace("00002", "00009"))
        assert (outcome.code, outcome.out) == (2, "")
        assert "abcdef" not in outcome.err
