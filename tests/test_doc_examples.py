"""What README and docs show to type does what they say: commands, configs and Python."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from typer.core import TyperGroup
from typer.main import get_command

from raymerge import merge
from raymerge.ops.own import OwnOps
from raymerge.pipeline.checkpoint.find import FoundModel
from raymerge.pipeline.cli.app import commands
from raymerge.pipeline.config.reader import load_config
from raymerge.pipeline.config.sections.search import SEARCH
from raymerge.pipeline.config.sections.sweep import SWEEP
from raymerge.pipeline.evaluation.tasks.task_file import read_task_file
from raymerge.pipeline.search.recipe import read_recipe
from raymerge.pipeline.spectrum.points import make_points
from raymerge.pipeline.spectrum.record import parse_spectrum
from raymerge.testing import read_model, write_model
from tests.checkpoints import read_files, read_tensors, write_family
from tests.commands import Cli
from tests.documents import PAGES, ROOT, read_blocks, read_commands
from tests.servers.hub import HubServer
from tests.servers.s3 import S3Server
from tests.spectra import evaluate_all, write_spectrum

COMMANDS = [
    (page, list(command))
    for page in PAGES
    for command in dict.fromkeys(map(tuple, read_commands(page, "raymerge")))  # a page may show one twice
]


@pytest.fixture
def family(tmp_path: Path) -> tuple[Path, ...]:
    return write_family(tmp_path / "family", 1)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub in an environment that leads to it, and a working directory without a file."""
    with HubServer(tmp_path / "hub") as hub:
        hub.add_token("hf_writer", user="me", can_write=["me", "my-org"], can_read=["my-org"])
        for name, value in hub.environment(tmp_path).items():
            monkeypatch.setenv(name, value)
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        yield hub


@contextlib.contextmanager
def buckets_of(server: S3Server, *names: str) -> Iterator[None]:
    for name in names:
        server.create_bucket(name)
    try:
        yield
    finally:
        for name in names:
            server.client().delete_bucket(Bucket=name)


def upload(server: S3Server, bucket: str, prefix: str, directory: Path) -> None:
    for name, content in read_files(directory).items():
        server.client().put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=content)


def test_the_pages_have_commands() -> None:
    assert {page for page, _ in COMMANDS} >= {
        "README.md", "docs/batch.md", "docs/cluster.md", "docs/progress.md", "docs/stores.md",
    }  # fmt: skip
    assert len(COMMANDS) > 25


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page}: {' '.join(c)}" for page, c in COMMANDS])
def test_the_command_line_knows_every_command_and_option(
    page: str, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://10.0.0.5:8265")  # as docs/cluster.md says at first
    group: Any = get_command(commands)
    name, arguments = command[0], command[1:]
    while isinstance(group.commands[name], TyperGroup):
        group, (name, *arguments) = group.commands[name], arguments
    group.commands[name].make_context(name, list(arguments)).close()  # says what is wrong, runs nothing


@pytest.mark.parametrize("page", PAGES)
def test_make_has_every_target(page: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in read_commands(page, "make"):
        assert command[0] in targets, command


@pytest.mark.parametrize("page", PAGES)
def test_every_config_is_one(page: str, tmp_path: Path) -> None:
    own = OwnOps(page, read_blocks(page, "python")[0]) if page == "docs/own_methods.md" else None
    for text in read_blocks(page, "yaml"):
        if re.search("^items:", text, re.MULTILINE):  # a task to evaluate models with
            (tmp_path / "task.yml").write_text(text)
            read_task_file(tmp_path / "task.yml")
            continue
        if f"\n{SWEEP}:" in text:
            assert make_points(text, (), 0, strict=True).points
        elif f"\n{SEARCH}:" in text:
            assert read_recipe(text, is_soup=False).space
        else:
            load_config(text, strict=True, own=own, find=lambda pattern: [FoundModel(pattern, 1)])


def test_a_gradient_of_lambda_is_lines(tmp_path: Path) -> None:
    """Source: Wang et al. 2024, "LiNeS", equation 3: layer l of L has the factor alpha + beta * (l - 1) / (L - 1)."""
    family = write_family(tmp_path, 2, num_layers=5, dtype=torch.float32)
    (text,) = read_blocks("docs/methods.md", "yaml")
    config = yaml.safe_load(text)
    config |= {"base_model": str(family[0]), "models": [{"model": str(model)} for model in family[1:]]}
    merge(config, tmp_path / "scaled")
    merge(config | {"parameters": {**config["parameters"], "lambda": 1.0}}, tmp_path / "plain")
    base, scaled, plain = (read_tensors(model) for model in (family[0], tmp_path / "scaled", tmp_path / "plain"))
    alpha, beta = 0.3, 0.7
    for layer in range(1, 6):
        name = f"model.layers.{layer - 1}.mlp.up_proj.weight"
        factor = alpha + beta * (layer - 1) / (5 - 1)
        torch.testing.assert_close(scaled[name] - base[name], factor * (plain[name] - base[name]), rtol=0, atol=1e-6)


def test_the_method_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method, test = read_blocks("docs/own_methods.md", "python")
    monkeypatch.chdir(tmp_path)
    Path("clipped.py").write_text(method)
    space: dict[str, Any] = {}
    exec(compile(test, "docs/own_methods.md", "exec"), space)
    space["test_clipped"](tmp_path)


def test_statistics_are_recorded_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(6, 3)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
            return SimpleNamespace(loss=torch.nn.functional.mse_loss(self.layer(x), y))

    (source,) = read_blocks("docs/statistics.md", "python")
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    exec(compile(source, "docs/statistics.md", "exec"), space)
    examples = [{"x": torch.randn(9, 6), "y": torch.randn(9, 3)} for _ in range(4)]
    for name in ("a", "b"):
        model = Model()
        write_model(tmp_path / name, model.state_dict())
        space["record"](model, examples, name)
    inputs = torch.cat([example["x"] for example in examples])
    torch.testing.assert_close(read_model("a-gram.safetensors")["layer.weight"], inputs.T @ inputs)
    for method, key in (("fisher", "fisher"), ("regmean", "gram")):
        models = [{"model": name, key: f"{name}-{key}.safetensors"} for name in ("a", "b")]
        merge({"merge_method": method, "models": models}, f"out-{method}", workers=1)


def test_the_parameters_of_the_methods_page_are_read() -> None:
    text = (ROOT / "docs/methods.md").read_text()
    (indented,) = re.findall(r"^    parameters:\n(?:^ {4}.*\n)+", text, re.MULTILINE)
    config = {"merge_method": "slerp", "base_model": "a", "models": [{"model": "b"}]}
    load_config(config | yaml.safe_load(indented), strict=True)


def test_the_commands_of_the_readme(
    hub: HubServer, family: tuple[Path, ...], s3_server: S3Server, bucket: str, cli: Cli
) -> None:
    (config,) = read_blocks("README.md", "yaml")
    Path("merge.yml").write_text(config)
    names = [entry["model"] for entry in yaml.safe_load(config)["models"]]
    for name, model in zip(names, family, strict=True):
        hub.create_repo(name)
        hub.upload(name, dict(read_files(model)))
    done = []
    with buckets_of(s3_server, "bucket"):
        for command in read_commands("README.md", "raymerge"):
            if command[0] in ("submit", "eval", "search"):  # need a cluster, or models that generate
                continue
            if command[0] == "curve":
                spectrum = parse_spectrum(Path("spectrum/spectrum.json").read_bytes())
                write_spectrum(Path("spectrum"), spectrum, evaluate_all(spectrum))
            outcome = cli(*command)
            assert outcome.code == 0, (command, outcome.err)
            done.append(command[0])
        assert "models/merged/model.safetensors" in s3_server.keys_of("bucket")
    assert done == [
        *("plan", "merge", "merge", "merge"),
        *("verify", "inspect", "extract-lora", "methods", "schema", "sweep", "curve"),
    ]
    assert Path("merged/model.safetensors").read_bytes() == hub.read_files("me/merged", "main")["model.safetensors"]
    assert f"base_model:\n- {names[0]}\n- {names[1]}\n" in Path("merged/README.md").read_text()


def test_the_python_of_the_readme(
    tmp_path: Path, family: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, model in zip(("a", "b"), family, strict=True):
        model.rename(name)
    models = [{"model": name} for name in ("a", "b")]
    config = {"merge_method": "linear", "models": models, "parameters": {"weight": 1}}
    Path("merge.yml").write_text(yaml.safe_dump(config))
    (block,) = read_blocks("README.md", "python")
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("MergePlan(linear of 2 models, 21 tensors, ")
    assert Path("out/model.safetensors").exists()


def test_the_commands_of_the_stores_page(
    hub: HubServer, family: tuple[Path, ...], s3_server: S3Server, bucket: str, cli: Cli
) -> None:
    (config,) = read_blocks("docs/stores.md", "yaml")
    Path("merge.yml").write_text(config)
    hub.create_repo("my-org/llama-tuned", private=True)
    hub.upload("my-org/llama-tuned", dict(read_files(family[1])))
    hub.move_branch("my-org/llama-tuned", "v2", hub.get_head("my-org/llama-tuned"))
    with buckets_of(s3_server, "my-models", "my-results"):
        upload(s3_server, "my-models", "llama-base", family[0])
        commands = read_commands("docs/stores.md", "raymerge")
        assert [command[0] for command in commands] == ["plan", "merge", "verify", "merge", "merge"]
        for command in commands:
            outcome = cli(*command)
            assert outcome.code == 0, (command, outcome.err)
        assert "llama-slerp/model.safetensors" in s3_server.keys_of("my-results")
    assert "model.safetensors" in hub.read_files("my-org/llama-slerp", "main")
