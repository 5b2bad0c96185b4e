"""Whole merges of users that are not as most are: without a name, a home directory, or one that can be written to."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import read_files, write_config, write_family
from tests.commands import Outcome, run_command
from tests.holding import start_held
from tests.servers.hub import HubServer
from tests.stored_models import make_config, without_own

NAMELESS = ("unshare", "--user", "--map-user=54321")
"""Runs a command as a user who is in no passwd file."""
NO_HOME = dict.fromkeys(("HOME", "USER", "LOGNAME", "XDG_STATE_HOME", "XDG_CACHE_HOME", "HF_HOME"))

MANY = ("--shard-size", "1", "--workers", "2")
"""A file for each tensor: a run that takes a second or more."""

needs_namespaces = pytest.mark.skipif(
    subprocess.run([*NAMELESS, "true"], capture_output=True, check=False).returncode != 0,
    reason="needs user namespaces",
)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    return write_family(tmp_path_factory.mktemp("family"), 1, num_layers=10)


@pytest.fixture
def config(family: tuple[Path, ...], tmp_path: Path) -> Path:
    return write_config(tmp_path / "merge.yml", make_config(list(map(str, family))))


@pytest.mark.slow
@needs_namespaces
@pytest.mark.parametrize("home", [None, "/proc"])
def test_ray_without_a_home(config: Path, tmp_path: Path, home: str | None) -> None:
    env = {**NO_HOME, "HOME": home}
    assert run_command("merge", config, tmp_path / "local", env=env, prefix=NAMELESS).code == 0
    done = run_command("merge", config, tmp_path / "ray", "--ray", env=env, prefix=NAMELESS)
    assert done.code == 0, done.err
    assert without_own(read_files(tmp_path / "ray")) == without_own(read_files(tmp_path / "local"))


@pytest.mark.slow
@needs_namespaces
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


@needs_namespaces
def test_home_in_a_config(tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yml", {"merge_method": "passthrough", "models": [{"model": "~/models/a"}]})
    done = run_command("plan", config, env=NO_HOME, prefix=NAMELESS)
    assert (done.code, done.err) == (
        2,
        "Error: ~/models/a: no home directory is known for ~ (HOME is not set and this user has no passwd entry);"
        " write the path out\n",
    )


@needs_namespaces
def test_token_without_a_home(tmp_path: Path) -> None:
    env = {**NO_HOME, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": None, "RAY_AUTH_TOKEN_PATH": None}
    done = run_command("jobs", "list", "--address", "http://127.0.0.1:9", env=env, prefix=NAMELESS)
    assert done.code == 2
    assert done.err.startswith("Error: nobody answers at http://127.0.0.1:9")


def as_user(user: int) -> tuple[str, ...]:
    """Return what starts a command as one of two users of a group."""
    return ("setpriv", "--reuid", str(user), "--regid", "54300", "--clear-groups")


ALICE, BOB = as_user(54321), as_user(54322)


def test_ray_with_a_home_that_may_not_be_entered(shared: Path) -> None:
    (shared / "home").mkdir(mode=0o700)
    code = "from raymerge.cluster.ray.session import _own_token\nwith _own_token(): pass"
    env = {**os.environ, "HOME": str(shared / "home")}
    subprocess.run([*ALICE, sys.executable, "-c", code], env=env, cwd=shared, check=True)


@pytest.fixture
def shared(family: tuple[Path, ...]) -> Iterator[Path]:
    """A directory that everybody may write to, with the family and the config of its merge."""
    if os.geteuid() or subprocess.run([*BOB, sys.executable, "-c", "import torch"], check=False).returncode:
        pytest.skip("needs root, and a Python that other users may run")
    directory = Path(tempfile.mkdtemp(prefix="raymerge-users-", dir="/tmp"))
    directory.chmod(0o777)
    before = os.umask(0o022)  # others read what tests write
    try:
        names = [shutil.copytree(model, directory / model.name) for model in family]
        for path in directory.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        write_config(directory / "merge.yml", make_config(list(map(str, names))))
        yield directory
    finally:
        os.umask(before)
        shutil.rmtree(directory)


def merge_as(user: tuple[str, ...], shared: Path, umask: int) -> Outcome:
    before = os.umask(umask)
    try:
        return run_command("merge", shared / "merge.yml", shared / "out", *MANY, prefix=user, cwd=shared)
    finally:
        os.umask(before)


def kill_midway(user: tuple[str, ...], shared: Path, umask: int) -> list[str]:
    """Start a merge as a user, kill it, and return the shards that are finished."""
    before = os.umask(umask)
    options = (shared / "out", *MANY)
    process = start_held(shared / "hold", 10, "merge", shared / "merge.yml", *options, prefix=user, cwd=shared)
    os.umask(before)
    while process.poll() is None and len(list((shared / "out/.raymerge").glob("*.safetensors.json"))) < 3:
        time.sleep(0.002)
    process.kill()
    process.communicate()
    return [path.name.removesuffix(".json") for path in (shared / "out/.raymerge").glob("*.safetensors.json")]


def test_a_colleague_resumes(shared: Path) -> None:
    finished = kill_midway(ALICE, shared, 0o002)
    assert len(finished) >= 3
    done = merge_as(BOB, shared, 0o002)
    assert done.code == 0, done.err
    assert "going on with the rest" in done.err
    owners = {path.name: path.stat().st_uid for path in (shared / "out").iterdir()}
    assert {owners[name] for name in finished} == {54321}
    assert owners["config.json"] == 54322
    done = merge_as(ALICE, shared, 0o002)
    assert done.code == 0, done.err


def test_the_root_of_a_volume(shared: Path) -> None:
    """There is a lost+found, which only root may open, and it is in nobody's way: in a model, or in the output."""
    (shared / "out").mkdir()
    (shared / "out").chmod(0o777)
    for place in (shared / "out", next(shared.glob("base"))):
        (place / "lost+found").mkdir(mode=0o700)
        (place / "lost+found" / "#12").write_text("of root")
    done = merge_as(ALICE, shared, 0o022)
    assert done.code == 0, done.err
    assert run_command("verify", shared / "out", prefix=ALICE).code == 0
    assert run_command("inspect", shared / "base", prefix=ALICE).code == 0
    done = run_command("merge", shared / "merge.yml", shared / "out", "--overwrite", prefix=ALICE)
    assert done.code == 0, done.err
    assert (shared / "out" / "lost+found" / "#12").read_text() == "of root"


def test_files_below_that_may_not_be_looked_at(shared: Path) -> None:
    """In a directory that may be listed and not entered, and behind a link into a closed one."""
    for name, mode in (("listed", 0o744), ("closed", 0o700), ("open", 0o755)):
        (shared / "base" / name).mkdir()
        (shared / "base" / name).chmod(mode)
    (shared / "base/listed/notes.txt").write_text("x")
    (shared / "base/closed/notes.txt").write_text("x")
    (shared / "base/open/link").symlink_to(shared / "base/closed/notes.txt")
    done = merge_as(ALICE, shared, 0o022)
    assert done.code == 0, done.err


def test_a_directory_that_may_not_be_read(shared: Path) -> None:
    (shared / "base").chmod(0o700)
    done = run_command("plan", shared / "merge.yml", prefix=ALICE)
    assert (done.code, done.err.strip()) == (2, f"Error: {shared}/base: cannot be listed: Permission denied")


def test_a_link_into_a_directory_that_may_not_be_read(shared: Path) -> None:
    (shared / "closed").mkdir(mode=0o700)
    weights = shared / "base" / "model.safetensors"
    weights.rename(shared / "closed" / "weights")
    weights.symlink_to(shared / "closed" / "weights")
    done = run_command("plan", shared / "merge.yml", prefix=ALICE)
    assert (done.code, done.err.strip()) == (2, f"Error: {weights}: Permission denied")


@pytest.mark.slow
def test_a_colleague_who_may_not_write(shared: Path) -> None:
    kill_midway(ALICE, shared, 0o022)
    done = merge_as(BOB, shared, 0o022)
    assert done.code == 2
    lock = shared / "out/.raymerge/lock"
    assert f"Error: {lock}: cannot be created: Permission denied; {lock} (-rw-r--r--) belongs to user 54321" in done.err


def test_a_tokenizer_that_may_not_be_read_is_told_of_before_the_merge(shared: Path) -> None:
    tokenizer = shared / "base/tokenizer.json"
    tokenizer.write_text("{}")
    tokenizer.chmod(0o600)
    done = run_command("plan", shared / "merge.yml", prefix=BOB, cwd=shared)
    assert (done.code, done.err) == (2, f"Error: {tokenizer}: cannot be opened: Permission denied\n")


def test_links_into_a_closed_directory(shared: Path) -> None:
    (shared / "closed").mkdir(mode=0o700)
    (shared / "link").symlink_to(shared / "closed/model")
    for name in ("link", "closed/model"):
        for command in ("inspect", "verify"):
            done = run_command(command, shared / name, prefix=BOB, cwd=shared)
            assert (done.code, done.err.count("\n")) == (2, 1), done.err
            assert f"Error: {shared / name}" in done.err
            assert "Permission denied" in done.err
