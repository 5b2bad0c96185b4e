"""Whole merges of users that are not as most are: without a name, a home directory, or one that can be written to."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.checkpoints import read_files, write_config, write_family
from tests.commands import run_command
from tests.servers.hub import HubServer
from tests.stored_models import make_config, without_own

NAMELESS = ("unshare", "--user", "--map-user=54321")
"""Runs a command as a user who is in no passwd file."""
NO_HOME = dict.fromkeys(("HOME", "USER", "LOGNAME", "XDG_STATE_HOME", "XDG_CACHE_HOME", "HF_HOME"))

pytestmark = pytest.mark.skipif(
    subprocess.run([*NAMELESS, "true"], capture_output=True, check=False).returncode != 0,
    reason="needs user namespaces",
)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    return write_family(tmp_path_factory.mktemp("family"), 1)


@pytest.fixture
def config(family: tuple[Path, ...], tmp_path: Path) -> Path:
    return write_config(tmp_path / "merge.yml", make_config(list(map(str, family))))


@pytest.mark.parametrize("home", [None, "/proc"])
def test_ray_without_a_home(config: Path, tmp_path: Path, home: str | None) -> None:
    env = {**NO_HOME, "HOME": home}
    assert run_command("merge", config, tmp_path / "local", env=env, prefix=NAMELESS).code == 0
    done = run_command("merge", config, tmp_path / "ray", "--ray", env=env, prefix=NAMELESS)
    assert done.code == 0, done.err
    assert without_own(read_files(tmp_path / "ray")) == without_own(read_files(tmp_path / "local"))


def test_hub_without_a_home(config: Path, family: tuple[Path, ...], tmp_path: Path) -> None:
    with HubServer(tmp_path / "hub") as hub:
        hub.add_token("hf_writer", user="me", can_write=["me"])
        hub.create_repo("me/base")
        hub.upload("me/base", dict(read_files(family[0])))
        env = {**hub.environment(tmp_path), "HF_HUB_CACHE": None, **NO_HOME}
        copy = write_config(tmp_path / "copy.yml", {"merge_method": "passthrough", "models": [{"model": "me/base"}]})
        done = run_command("merge", copy, tmp_path / "copy", env=env, prefix=NAMELESS)
        assert done.code == 0, done.err

        refused = run_command("merge", config, "hf://me/out", env=env, prefix=NAMELESS)
        assert (refused.code, refused.err.count("\n")) == (2, 1), refused.err
        assert "no home directory" in refused.err
        refused = run_command("merge", config, "hf://me/out", env={**env, "HOME": "/proc"}, prefix=NAMELESS)
        assert refused.code == 2
        assert "/proc/.local/state/raymerge/" in refused.err
        assert "XDG_STATE_HOME" in refused.err
        advised = {**env, "HOME": "/proc", "XDG_STATE_HOME": str(tmp_path / "state")}
        done = run_command("merge", config, "hf://me/out", env=advised, prefix=NAMELESS)
        assert done.code == 0, done.err
        assert "model.safetensors" in hub.read_files("me/out", "main")


def test_home_in_a_config(tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yml", {"merge_method": "passthrough", "models": [{"model": "~/models/a"}]})
    done = run_command("plan", config, env=NO_HOME, prefix=NAMELESS)
    assert (done.code, done.err) == (
        2,
        "Error: ~/models/a: no home directory is known for ~ (HOME is not set and this user has no passwd entry);"
        " write the path out\n",
    )


def test_token_without_a_home(tmp_path: Path) -> None:
    env = {**NO_HOME, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": None, "RAY_AUTH_TOKEN_PATH": None}
    done = run_command("jobs", "list", "--address", "http://127.0.0.1:9", env=env, prefix=NAMELESS)
    assert done.code == 2
    assert done.err.startswith("Error: nobody answers at http://127.0.0.1:9")
