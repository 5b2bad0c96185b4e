"""Manifests: schedulers accept them, and what a user gives arrives as it was given."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import botocore.session
import botocore.validate
import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from raymerge.cluster.ray.session import SETTINGS
from raymerge.pipeline.cli.job_options import RAY_VERSION, WHEEL
from tests.checkpoints import read_files, write_config, write_llama
from tests.commands import Cli
from tests.servers.hub import HubServer

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = sorted((ROOT / "configs/clusters").iterdir())
IMAGE = ("--image", "registry.internal/raymerge:1")
NEEDED = {
    "kuberay": IMAGE,
    "slurm": (),
    "aws-batch": (*IMAGE, "--execution-role", "arn:aws:iam::999999999999:role/starter"),
    "ray-up": IMAGE,
}
"""What each kind of manifest wants to be told."""
ODD = """it's a "b" $HOME `id` $(id) \\n #c"""
CONFIG = f"""\
# {ODD}
merge_method: linear
models:
  - model: org/a
  - model: s3://bucket/b
parameters:
  weight: 1
END_OF_RAYMERGE_CONFIG: 1
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "merge.yml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def manifest(cli: Cli, config: Path) -> Any:
    def write(kind: str, *options: str, out: str = "s3://bucket/out") -> str:
        outcome = cli("manifest", kind, config, out, "--no-plan", *NEEDED[kind], *options)
        assert outcome.code == 0, outcome.err
        return outcome.out

    return write


# what schedulers accept


def close(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a Kubernetes schema that forbids what it does not name."""
    closed = {
        key: {name: close(value) for name, value in each.items()} if key == "properties"
        else close(each) if isinstance(each, Mapping)
        else each
        for key, each in schema.items()
    }  # fmt: skip
    if schema.get("x-kubernetes-int-or-string"):
        closed["type"] = ["integer", "string"]
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


@pytest.fixture(scope="module")
def ray_job_schema() -> dict[str, Any]:
    path = Path(os.environ.get("RAYMERGE_SCHEMAS", ROOT.parent / "shared/schemas"), "ray.io_rayjobs.yaml")
    if not path.exists():
        pytest.skip(f"the schema of RayJobs is not at {path}; name its directory in RAYMERGE_SCHEMAS")
    definition = yaml.load(path.read_text(), yaml.CSafeLoader)
    (schema,) = (each["schema"]["openAPIV3Schema"] for each in definition["spec"]["versions"] if each["name"] == "v1")
    return close({**schema, "properties": {**schema["properties"], "metadata": {"type": "object"}}})


EVERYTHING = {
    "kuberay": ("--namespace", "ns", "--service-account", "sa", "--env-secret", "s3", "--env-secret", "hub"),
    "slurm": ("--partition", "p", "--account", "a"),
    "aws-batch": (
        "--job-role",
        "arn:aws:iam::999999999999:role/r",
        "--env-secret",
        "HF_TOKEN=arn:aws:secretsmanager:x:1:secret:h",
    ),
    "ray-up": ("--ami", "ami-1"),
}


@pytest.mark.parametrize("options", [(), ("--gpus", "2", "--env", "A=b", *EVERYTHING["kuberay"])])
def test_kuberay_accepts_it(manifest: Any, ray_job_schema: dict[str, Any], options: tuple[str, ...]) -> None:
    config_map, ray_job = yaml.safe_load_all(manifest("kuberay", *options))
    schema = jsonschema.Draft202012Validator(ray_job_schema)
    schema.validate(ray_job)
    assert set(config_map) == {"apiVersion", "kind", "metadata", "data"}
    cluster = ray_job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        variables = {each["name"]: each["value"] for each in container["env"]}
        assert SETTINGS.items() <= variables.items()
    ray_job["spec"]["backOffLimit"] = 1
    with pytest.raises(jsonschema.ValidationError, match="backOffLimit"):
        schema.validate(ray_job)


@pytest.mark.parametrize("options", [(), ("--gpus", "2", "--env", "A=b", *EVERYTHING["aws-batch"])])
def test_aws_batch_accepts_it(manifest: Any, options: tuple[str, ...]) -> None:
    definition = yaml.safe_load(manifest("aws-batch", *options))
    model = botocore.session.get_session().get_service_model("batch").operation_model("RegisterJobDefinition")
    validate = botocore.validate.ParamValidator().validate
    report = validate(definition, model.input_shape)
    assert not report.has_errors(), report.generate_report()
    assert validate({**definition, "retryStrategie": {}}, model.input_shape).has_errors()


@pytest.mark.parametrize("options", [(), ("--gpus", "2", "--env", "A=b", *EVERYTHING["ray-up"])])
def test_ray_up_accepts_it(manifest: Any, options: tuple[str, ...]) -> None:
    cluster = yaml.safe_load(manifest("ray-up", *options))
    jsonschema.validate(cluster, json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text()))
    validate_config(prepare_config(cluster))


@pytest.mark.parametrize("gpus", ["0", "2"])
def test_bash_accepts_it(manifest: Any, gpus: str, tmp_path: Path) -> None:
    scripts = {"slurm": manifest("slurm", "--gpus", gpus, *EVERYTHING["slurm"])}
    batch = yaml.safe_load(manifest("aws-batch"))["nodeProperties"]["nodeRangeProperties"][0]["container"]["command"]
    scripts["aws-batch"] = "#!/usr/bin/env bash\n" + batch[-1]
    scripts["start_node"] = (ROOT / "cluster/manifests/start_node.sh").read_text()
    for name, text in scripts.items():
        path = tmp_path / f"{name}.sh"
        path.write_text(text)
        subprocess.run(["bash", "-n", path], check=True)
        if shutil.which("shellcheck"):
            subprocess.run(["shellcheck", "--severity=warning", path], check=True)
    assert (f"#SBATCH --gpus-per-node={gpus}\n" in scripts["slurm"]) == (gpus != "0")


# what a user gives arrives


def run_shell(code: str, tmp_path: Path, **environment: str) -> list[list[Any]]:
    """Run shell code, and return the arguments of every program of ours that it called."""
    calls = tmp_path / "calls"
    for program in ("raymerge", "srun", "setup", "pip"):
        path = tmp_path / "bin" / program
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            f"#!{sys.executable}\nimport json, os, sys\n"
            f"with open({str(calls)!r}, 'a') as file:\n"
            f"    print(json.dumps(['{program}', *sys.argv[1:], dict(os.environ)]), file=file)\n"
        )
        path.chmod(0o755)
    (tmp_path / "bin/scontrol").write_text("#!/bin/sh\necho one\necho two\n")
    (tmp_path / "bin/scontrol").chmod(0o755)
    env = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", **environment}
    subprocess.run(["bash", "-c", code], check=True, env=env, cwd=tmp_path)
    return [json.loads(line) for line in calls.read_text().splitlines()]


SETUP = "setup 'a b' \"$HOME\" # done"
GIVEN = ("--setup", SETUP, "--env", f"ODD={ODD}", "--seed", "3", "--shard-size", "5 GB", "--public")
OUT = "s3://bucket/it's $HOME"


def check_call(call: list[Any], config_file: str) -> None:
    assert call[:4] == ["raymerge", "merge", config_file, OUT]
    assert call[4:-1] == ["--shard-size", "5 GB", "--seed", "3", "--public", "--wait", "--address", "auto"]


def undo_kubernetes(value: str) -> str:
    """Return what a value is after Kubernetes has looked for $(NAME) in it."""
    assert not re.search(r"(?<!\$)(\$\$)*\$\(", value)
    return value.replace("$$", "$")


def test_what_is_given_to_kuberay(manifest: Any, tmp_path: Path) -> None:
    config_map, ray_job = yaml.safe_load_all(manifest("kuberay", *GIVEN, out=OUT))
    data = config_map["data"]
    assert data["merge.yml"] == CONFIG
    (call,) = run_shell(data["merge.sh"], tmp_path)
    check_call(call, "/etc/raymerge/merge.yml")
    (tmp_path / "calls").unlink()
    (call,) = run_shell(data["setup.sh"], tmp_path, HOME="/h")
    assert call[:-1] == ["setup", "a b", "/h"]
    (worker,) = ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = worker["template"]["spec"]["containers"]
    assert undo_kubernetes(next(each["value"] for each in container["env"] if each["name"] == "ODD")) == ODD


def test_what_is_given_to_slurm(manifest: Any, tmp_path: Path) -> None:
    script = manifest("slurm", *GIVEN, "--name", ODD, out=OUT)
    directive = next(line for line in script.splitlines() if line.startswith("#SBATCH --job-name="))
    assert shlex.split(directive, comments=False)[1] == f"--job-name={ODD}"
    (call,) = run_shell(script, tmp_path, SLURM_JOB_NODELIST="one,two", SLURM_JOB_NUM_NODES="2")
    environment = call[-1]
    assert environment["RAYMERGE_CONFIG"] == CONFIG
    assert environment["ODD"] == ODD
    assert (environment["RAYMERGE_HEAD"], environment["RAYMERGE_NODES"]) == ("one", "2")
    assert SETTINGS.items() <= environment.items()
    assert environment["RAYMERGE_SETUP"] == SETUP
    (tmp_path / "calls").unlink()
    check_call(run_shell(environment["RAYMERGE_COMMAND"], tmp_path)[0], "merge.yml")


def test_what_is_given_to_aws_batch(manifest: Any, tmp_path: Path) -> None:
    definition = yaml.safe_load(manifest("aws-batch", *GIVEN, out=OUT))
    container = definition["nodeProperties"]["nodeRangeProperties"][0]["container"]
    environment = {each["name"]: each["value"] for each in container["environment"]}
    assert environment["RAYMERGE_CONFIG"] == CONFIG
    assert environment["ODD"] == ODD
    assert environment["RAYMERGE_SETUP"] == SETUP
    check_call(run_shell(environment["RAYMERGE_COMMAND"], tmp_path)[0], "merge.yml")


def test_what_is_given_to_ray_up(manifest: Any, tmp_path: Path) -> None:
    cluster = yaml.safe_load(manifest("ray-up", *GIVEN, out=OUT))
    run_shell("; ".join(cluster["head_setup_commands"]) + "; setup", tmp_path, HOME=str(tmp_path))
    (tmp_path / "calls").unlink()
    assert (tmp_path / "merge.yml").read_text() == CONFIG
    command = (tmp_path / "merge.sh").read_text()
    check_call(run_shell(command.replace("python3 -m", "true"), tmp_path, HOME=str(tmp_path))[0], "merge.yml")
    assert cluster["setup_commands"] == [SETUP]
    assert f"ODD={ODD}" in [shlex.split(option)[-1] for option in cluster["docker"]["run_options"]]


# software and plan


@pytest.mark.parametrize("kind", ["kuberay", "ray-up", "aws-batch"])
def test_machines_need_to_be_told_where_raymerge_is(cli: Cli, config: Path, kind: str) -> None:
    options = NEEDED[kind][len(IMAGE) :]
    outcome = cli("manifest", kind, config, "s3://bucket/out", "--no-plan", *options)
    assert outcome.code == 2
    assert "the machines need raymerge: name an image that has it with --image, or a wheel with --wheel" in outcome.err
    for option in ("--image", "a/b"), ("--wheel", f"https://files.internal/{WHEEL}"), ("--setup", "pip install x"):
        assert cli("manifest", kind, config, "s3://bucket/out", "--no-plan", *options, *option).code == 0


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "a directory" / WHEEL
    path.parent.mkdir()
    path.write_bytes(bytes(range(256)) * 1000)
    return path


def read_setup(kind: str, text: str) -> str:
    """Return the shell commands that a manifest has every machine run."""
    first, *_ = yaml.safe_load_all(text)
    if kind == "kuberay":
        return str(first["data"]["setup.sh"])
    if kind == "ray-up":
        return "\n".join(first["setup_commands"])
    container = first["nodeProperties"]["nodeRangeProperties"][0]["container"]
    return str(next(each["value"] for each in container["environment"] if each["name"] == "RAYMERGE_SETUP"))


@pytest.mark.parametrize("kind", ["kuberay", "ray-up", "aws-batch"])
def test_a_wheel_that_machines_fetch(manifest: Any, kind: str, tmp_path: Path) -> None:
    url = f"https://files.internal/a%20b/{WHEEL}#sha256=00"
    text = manifest(kind, "--wheel", url, "--setup", SETUP)
    calls = run_shell(read_setup(kind, text), tmp_path, HOME="/h")
    assert [call[:-1] for call in calls] == [["setup", "a b", "/h"], ["pip", "install", "--quiet", url]]


@pytest.mark.parametrize(("kind", "directory"), [("kuberay", "/etc/raymerge"), ("ray-up", "/home/ray")])
def test_a_wheel_that_is_sent_along(manifest: Any, wheel: Path, kind: str, directory: str, tmp_path: Path) -> None:
    text = manifest(kind, "--wheel", str(wheel))
    (call,) = run_shell(read_setup(kind, text), tmp_path)
    assert call[:-1] == ["pip", "install", "--quiet", f"{directory}/{WHEEL}"]
    first, *_ = yaml.safe_load_all(text)
    if kind == "kuberay":
        assert base64.b64decode(first["binaryData"][WHEEL]) == wheel.read_bytes()
        assert "# kubectl apply --server-side -f FILE\n" in text
    else:
        assert first["file_mounts"][f"{directory}/{WHEEL}"] == str(wheel)


def test_a_wheel_that_cannot_be_sent_along(cli: Cli, config: Path, wheel: Path) -> None:
    arguments = ("manifest", "aws-batch", config, "s3://bucket/out", "--no-plan", *NEEDED["aws-batch"])
    outcome = cli(*arguments, "--wheel", wheel)
    assert outcome.code == 2
    assert "AWS Batch sends no files along; put it where the machines can fetch it and give that URL" in outcome.err


@pytest.mark.parametrize("failing", ["pip", "setup"])
def test_a_machine_that_cannot_be_set_up_does_not_start(manifest: Any, failing: str) -> None:
    setup = read_setup(
        "aws-batch", manifest("aws-batch", "--wheel", f"https://files.internal/{WHEEL}", "--setup", SETUP)
    )
    script = 'set -e; pip() { true; }; setup() { true; }; eval "$1() { false; }"; eval "$2"; echo started'
    run = ["bash", "-c", script, "bash"]
    done = subprocess.run([*run, failing, setup], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    assert subprocess.run([*run, "other", setup], capture_output=True, check=False).stdout == b"started\n"


@pytest.mark.parametrize("kind", NEEDED)
def test_a_merge_is_planned_first(cli: Cli, tmp_path: Path, kind: str) -> None:
    models = [{"model": str(write_llama(tmp_path / f"m{number}", num_layers=2 + number))} for number in range(2)]
    content = {"merge_method": "linear", "models": models, "parameters": {"weight": 1}}
    file = write_config(tmp_path / "merge.yml", content)
    arguments = ("manifest", kind, file, tmp_path / "out", "--shared-filesystem", *NEEDED[kind])
    outcome = cli(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert "name the layers to merge with `slices`" in outcome.err
    assert cli(*arguments, "--no-plan").code == 0
    shutil.rmtree(tmp_path / "m1")
    outcome = cli(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert "m1: no such directory" in outcome.err
    assert "; if only the cluster's machines can read it, say --no-plan" in outcome.err


# examples


@pytest.fixture
def qwen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Hub with small models of the names that `configs/linear.yml` has."""
    with HubServer(tmp_path / "hub") as hub:
        for number, name in enumerate(("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-Coder-0.5B-Instruct")):
            hub.create_repo(name)
            hub.upload(name, dict(read_files(write_llama(tmp_path / str(number), number))))
        for name, value in {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache")}.items():
            monkeypatch.setenv(name, value)
        yield


@pytest.mark.usefixtures("qwen")
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_what_the_command_in_it_writes(example: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = example.read_text()
    command = next(line for line in text.splitlines() if line.startswith("# raymerge manifest"))
    outcome = cli(*shlex.split(command.removeprefix("# raymerge ")))
    assert outcome.code == 0, outcome.err
    assert outcome.out == text, f"write {example.name} again with the command in its first lines"


def test_there_is_an_example_of_each_kind() -> None:
    assert {kind for kind in NEEDED for example in EXAMPLES if example.name.startswith(kind)} == set(NEEDED)


def test_the_default_image_has_the_ray_that_is_tested() -> None:
    assert f"ray=={RAY_VERSION}" in (ROOT / "constraints.txt").read_text().splitlines()


# what users do wrong


@pytest.mark.parametrize("kind", NEEDED)
@pytest.mark.parametrize(
    ("out", "options", "says"),
    [
        ("/data/out", (), "/data/out: paths of this machine"),
        ("out", ("--shared-filesystem",), "out: relative paths"),
        ("s3://bucket/out", ("--env", "AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI"), "has a credential in it"),
        ("s3://bucket/out", ("--setup", "curl https://me:pw@host/x"), "--setup has a credential in it"),
        ("s3://bucket/out", ("--env", "1A=b"), "not of the form NAME=VALUE"),
        ("hf://me/out", (), "the job has several"),
        ("s3://bucket/out", ("--gpu-memory", "16GiB"), "--gpu-memory is for GPUs, and the job has none"),
        ("s3://bucket/out", ("--name", "a\nb"), "characters that are not printed"),
    ],
)
def test_what_no_scheduler_can_do(
    cli: Cli, config: Path, kind: str, out: str, options: tuple[str, ...], says: str
) -> None:
    outcome = cli("manifest", kind, config, out, "--no-plan", *NEEDED[kind], *options)
    assert outcome.code == 2
    assert says in outcome.err
    assert "wJalrXUtnFEMI" not in outcome.err
    assert not outcome.out


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("kuberay", ("--name", "Merge_1"), "--name 'Merge_1' is no name for Kubernetes"),
        ("kuberay", ("--name", "a" * 48), "47 at most"),
        ("kuberay", ("--namespace", "a/b"), "--namespace 'a/b'"),
        ("kuberay", ("--env-secret", "wJalrXUtnFEMI"), "names of secrets"),
        ("aws-batch", ("--env-secret", "HF_TOKEN=wJalrXUtnFEMI"), "--env-secret HF_TOKEN is neither an ARN nor"),
        ("aws-batch", ("--token-secret", "wJalrXUtnFEMI"), "--token-secret is neither an ARN nor"),
        ("aws-batch", ("--name", "a b"), "--name 'a b' is no name for AWS Batch"),
        ("aws-batch", ("--job-role", "ARN"), "--job-role 'ARN' is not the ARN of a role"),
        ("aws-batch", ("--job-role", "arn:aws:iam::123456789012:role/merger"), "--job-role has 123456789012 in it"),
        ("aws-batch", ("--token-secret", "arn:aws:ssm:x:111122223333:parameter/t"), "--token-secret has 111122223333"),
        ("aws-batch", ("--env-secret", "HF_TOKEN=<ARN>"), "--env-secret has <ARN> in it"),
        ("kuberay", ("--image", "123456789012.dkr.ecr.eu-west-1.amazonaws.com/m"), "--image has 123456789012 in it"),
        ("ray-up", ("--ami", "<ami>"), "--ami has <ami> in it, which stands for a value of yours"),
        ("ray-up", ("--wheel", f"https://example.com/{WHEEL}"), "--wheel has example.com in it"),
        ("kuberay", ("--wheel", f"https://me:pw@host/{WHEEL}"), "--wheel has a credential in it"),
        ("kuberay", ("--wheel", f"s3://bucket/{WHEEL}"), "pip fetches https:// and http:// only"),
        ("kuberay", ("--wheel", "raymerge-9-py3-none-any.whl"), f"is not {WHEEL}, as `make wheel` builds it"),
        ("kuberay", ("--wheel", f"none/{WHEEL}"), f"No such file or directory; `make wheel` builds it: dist/{WHEEL}"),
        ("ray-up", ("--name", "a b"), "--name 'a b' is no name for a cluster"),
        ("slurm", ("--node-memory", "8GiB"), "--node-memory 8GiB is too little: --memory 4GiB, 8 workers"),
        ("slurm", ("--time", "90"), "hours:minutes:seconds"),
        ("slurm", ("--time", "0:00:10"), "a minute or more"),
    ],
)
def test_what_one_scheduler_cannot_do(cli: Cli, config: Path, kind: str, options: tuple[str, ...], says: str) -> None:
    outcome = cli("manifest", kind, config, "s3://bucket/out", "--no-plan", *NEEDED[kind], *options)
    assert outcome.code == 2
    assert says in outcome.err
    assert "wJalrXUtnFEMI" not in outcome.err


@pytest.mark.parametrize(
    ("kind", "most"), [("kuberay", 1_000_000), ("slurm", 100_000), ("aws-batch", 24_576), ("ray-up", 65_536)]
)
def test_a_config_that_is_too_large(cli: Cli, config: Path, kind: str, most: int) -> None:
    config.write_text(f"# {'x' * (most // 2)}\n{CONFIG}")
    arguments = ("manifest", kind, config, "s3://bucket/out", "--no-plan", *NEEDED[kind])
    assert cli(*arguments).code == 0
    config.write_text(f"# {'x' * most}\n{CONFIG}")
    outcome = cli(*arguments)
    assert outcome.code == 2
    assert f"{most:,} are allowed" in outcome.err


def test_gpus_that_nothing_uses_are_told(cli: Cli, config: Path) -> None:
    outcome = cli("manifest", "slurm", config, "s3://bucket/out", "--no-plan", "--gpus", "1")
    assert outcome.code == 0
    assert "warning: --gpus without --gpu-memory" in outcome.err
    used = cli("manifest", "slurm", config, "s3://bucket/out", "--no-plan", "--gpus", "1", "--gpu-memory", "8GiB")
    assert "--gpus" not in used.err


def test_a_bad_config_is_found_at_once(cli: Cli, config: Path) -> None:
    config.write_text("merge_method: linaer\nmodels: []\n")
    outcome = cli("manifest", "slurm", config, "s3://bucket/out")
    assert outcome.code == 2
    assert "did you mean 'linear'" in outcome.err
