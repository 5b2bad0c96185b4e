"""What docs/cluster.md tells a stranger with two machines to do, done on two machines."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from tests.checkpoints import read_files, write_config, write_family
from tests.commands import PATIENCE_SECONDS, run_command, start_command
from tests.servers.hosts import Network, skip_without_hosts
from tests.servers.s3 import S3Server

DOCS = Path(__file__).parents[1] / "docs/cluster.md"

TOKEN = "a-token-for-two-machines-0001"
HEAD = "ray start --head --port 6379 --dashboard-host 0.0.0.0"
OTHER = "ray start --address 10.0.0.5:6379"
SUBMIT = "raymerge submit merge.yml s3://bucket/merged --follow --no-plan"
VERIFY = "raymerge verify s3://bucket/merged"


@pytest.mark.slow
def test_two_machines_from_nothing(tmp_path: Path) -> None:
    skip_without_hosts()
    text = DOCS.read_text()
    for command in (HEAD, OTHER, SUBMIT, VERIFY, "RAY_API_SERVER_ADDRESS=http://10.0.0.5:8265"):
        assert command in text
    family = write_family(tmp_path, 1, num_layers=8, dtype=torch.bfloat16, num_shards=2)
    with Network() as network, S3Server(network.address) as s3:
        s3.create_bucket("bucket")
        for model in family:
            for name, content in read_files(model).items():
                s3.client().put_object(Bucket="bucket", Key=f"{model.name}/{name}", Body=content)
        models = [{"model": f"s3://bucket/{model.name}", "parameters": {"weight": 0.5}} for model in family]
        write_config(tmp_path / "merge.yml", {"merge_method": "linear", "models": models})
        first, second = network.add_host("first"), network.add_host("second")
        shared = s3.environment() | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
        for host, command in ((first, HEAD), (second, OTHER.replace("10.0.0.5", first.address))):
            done = host.run(*command.split(), env=shared)
            assert done.code == 0, done.out + done.err
        # the credentials stay on the two machines; what the client tells is where the store is
        client = {
            "RAY_AUTH_TOKEN": TOKEN,
            "RAY_API_SERVER_ADDRESS": f"http://{first.address}:8265",
            "AWS_ENDPOINT_URL": s3.endpoint,
            "AWS_REGION": s3.region,
        }
        start = time.monotonic()
        with start_command(*SUBMIT.split()[1:], "--shard-size", "20kB", cwd=tmp_path, env=client) as process:
            assert process.stderr
            first_lines = ""
            for line in process.stderr:
                first_lines += line
                print(f"{time.monotonic() - start:5.1f} s after the command began: {line}", end="")
                if line.startswith("linear of 2 models"):
                    break
            printed, said = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 0, first_lines + said
        job_id, _, report = printed.partition("\n")
        assert all(host.address in report for host in (first, second)), "both have merged"
        everything = first_lines + said + printed + run_command("jobs", "status", job_id, env=client).out
        assert TOKEN not in everything
        assert s3.admin.secret_access_key not in everything
        sound = run_command(*VERIFY.split()[1:], env=s3.environment())
        assert sound.code == 0, sound.err
        done = run_command("merge", "merge.yml", "local", "--shard-size", "20kB", cwd=tmp_path, env=s3.environment())
        assert done.code == 0, done.err
        objects = {key.removeprefix("merged/") for key in s3.keys_of("bucket") if key.startswith("merged/")}
        read = s3.client().get_object
        merged = {name: read(Bucket="bucket", Key=f"merged/{name}")["Body"].read() for name in objects}
        assert merged == read_files(tmp_path / "local")
