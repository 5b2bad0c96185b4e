"""The test Hub, cross-checked by clients that were written for the real one, and its refusals over plain HTTP."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
import time
import venv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.servers import ServerProcess, free_ports
from tests.servers.hub import HubServer
from tests.servers.hub_git import GITATTRIBUTES, make_commit, make_lfs_entry, make_pointer

WEIGHTS = random.Random(1).randbytes(2_500_000)
CONFIG = b'{"model_type": "llama"}\n'


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    """A Hub with a writer, a reader and a stranger, and `me/model`."""
    with HubServer(tmp_path / "hub") as hub:
        hub.add_token("hf_writer", user="me", can_write=["me"])
        hub.add_token("hf_reader", user="friend", can_read=["me/closed", "me/gated"])
        hub.add_token("hf_stranger", user="stranger", can_write=["stranger"])
        hub.create_repo("me/model")
        yield hub


def run_client(hub_url: str, directory: Path, code: str, *, token: str | None = "hf_writer", xet: bool = False) -> Any:
    """Run code with huggingface_hub in a process of its own; return what it gives to `show`."""
    prelude = "import json\nfrom huggingface_hub import *\nfrom huggingface_hub.errors import *\napi = HfApi()\n"
    prelude += "def show(value): print('\\n' + json.dumps(value))\n"
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    env |= {"HF_ENDPOINT": hub_url, "HF_HOME": str(directory / "hf_home"), "NO_PROXY": "*"}
    env["HF_HUB_DISABLE_XET"] = "0" if xet else "1"
    done = subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(code)],
        cwd=directory,
        env=env | ({"HF_TOKEN": token} if token else {}),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@dataclass(frozen=True)
class Answer:
    """What a plain HTTP request got."""

    status: int
    headers: http.client.HTTPMessage
    content: bytes


def ask(url: str, method: str = "GET", body: object = None, headers: Mapping[str, str] | None = None) -> Answer:
    """Send one request as the writer, unless headers say otherwise; follow no redirect."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=10)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    is_storage = parts.hostname == "localhost"
    if headers is None:
        headers = {} if is_storage else {"Authorization": "Bearer hf_writer"}
    connection.request(method, url.partition(parts.netloc)[2], data, dict(headers))
    response = connection.getresponse()
    answer = Answer(response.status, response.headers, response.read())
    connection.close()
    return answer


def write_model(directory: Path) -> dict[str, bytes]:
    """Write files of each kind; return them with what a repo has besides."""
    files = {
        "config.json": CONFIG,
        "deep/down/model.safetensors": WEIGHTS,
        "deep/empty.bin": b"",
        "ä b+c%.txt": b"\xc3\xa4",
    }
    for path, content in files.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(content)
    return {**files, ".gitattributes": GITATTRIBUTES}


# huggingface_hub


@pytest.mark.parametrize(("part_nbytes", "redirect_regular"), [(None, False), (1 << 20, True)])
def test_what_huggingface_hub_uploads_comes_back(
    tmp_path: Path, part_nbytes: int | None, redirect_regular: bool
) -> None:
    files = write_model(tmp_path / "model")
    with HubServer(tmp_path / "hub", page_length=2, part_nbytes=part_nbytes, redirect_regular=redirect_regular) as hub:
        hub.add_token("hf_writer", user="me", can_write=["me"])
        seen = run_client(
            hub.url,
            tmp_path,
            """
            api.create_repo("me/new", private=True)
            commit = api.upload_folder(repo_id="me/new", folder_path="model")
            again = api.upload_folder(repo_id="me/new", folder_path="model")
            info = api.model_info("me/new", files_metadata=True)
            tree = [entry.path for entry in api.list_repo_tree("me/new", recursive=True)]
            show({
                "commits": [commit.oid, again.oid, info.sha],
                "user": api.whoami()["name"],
                "private": info.private,
                "siblings": {each.rfilename: [each.size, each.lfs and each.lfs.sha256] for each in info.siblings},
                "tree": tree,
                "titles": [each.title for each in api.list_repo_commits("me/new")],
                "snapshot": snapshot_download("me/new"),
            })
            """,
        )
        assert hub.read_files("me/new") == files
        assert seen["commits"] == [hub.get_head("me/new")] * 3
        assert (seen["user"], seen["private"]) == ("me", True)
        assert seen["siblings"] == {
            path: [len(content), hashlib.sha256(WEIGHTS).hexdigest() if content == WEIGHTS else None]
            for path, content in files.items()
        }
        assert seen["tree"] == sorted([*files, "deep", "deep/down"])
        assert sum("/tree/" in request.path for request in hub.requests) >= len(seen["tree"]) / 2
        assert len(seen["titles"]) == 2
        snapshot = Path(seen["snapshot"])
        assert {path: (snapshot / path).read_bytes() for path in files} == files
        puts = [request for request in hub.storage_requests if request.method == "PUT"]
        assert len(puts) == (3 if part_nbytes else 1)
        assert any(request.status == 307 for request in hub.requests) == redirect_regular
        assert hub.leaked_tokens == []


def test_huggingface_hub_uploads_by_xet(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(WEIGHTS)
    run_client(
        hub.url,
        tmp_path,
        """
        for additions in [("a.safetensors", "a"), ("b.safetensors", "a")], [("c.safetensors", b"c" * 99)]:
            operations = [CommitOperationAdd(*each) for each in additions]
            api.create_commit("me/model", operations, commit_message="x")
        show(None)
        """,
        xet=True,
    )
    files = {"a.safetensors": WEIGHTS, "b.safetensors": WEIGHTS, "c.safetensors": b"c" * 99}
    assert hub.read_files("me/model") == {".gitattributes": GITATTRIBUTES, **files}
    assert not hub.storage_requests


def test_huggingface_hub_writes_to_buckets(hub: HubServer, tmp_path: Path) -> None:
    hub.page_length = 2
    seen = run_client(
        hub.url,
        tmp_path,
        """
        api.create_bucket("me/files", private=True)
        fs = HfFileSystem()
        for name, content in [("a", b"abc" * 9999), ("dir/b", b""), ("dir/c", b"c"), ("dir2/d", b"d"), ("e", b"e")]:
            with fs.open(f"buckets/me/files/{name}", "wb") as file:
                file.write(content)
        fs.rm("buckets/me/files/e")
        info = api.bucket_info("me/files")
        with fs.open("buckets/me/files/a", block_size=1000) as file:
            file.seek(9998)
            part = file.read(4).decode()
        try:
            api.batch_bucket_files("me/files", delete=["nothing"])
        except HfHubHTTPError as error:
            failure = error.failures[0]["path"]
        show([
            info.private, info.total_files, part, sorted(fs.find("buckets/me/files/dir")), failure,
            fs.info("buckets/me/files/a")["size"], fs.exists("buckets/me/other"),
        ])
        """,
        xet=True,
    )
    names = [f"buckets/me/files/dir/{name}" for name in "bc"]
    assert seen == [True, 4, "cabc", names, "nothing", 29997, False]
    assert hub.read_bucket("me/files") == {"a": b"abc" * 9999, "dir/b": b"", "dir/c": b"c", "dir2/d": b"d"}
    assert hub.leaked_tokens == []


def test_huggingface_hub_commits_on_a_parent_or_not_at_all(hub: HubServer, tmp_path: Path) -> None:
    first = hub.get_head("me/model")
    (tmp_path / "weights").write_bytes(WEIGHTS)
    seen = run_client(
        hub.url,
        tmp_path,
        """
        first = api.model_info("me/model").sha
        additions = [CommitOperationAdd("a.safetensors", "weights"), CommitOperationAdd("b.safetensors", b"b" * 99)]
        for addition in additions:
            api.preupload_lfs_files("me/model", [addition])
        additions.append(CommitOperationAdd("config.json", b"{}"))
        done = api.create_commit("me/model", additions, commit_message="All", parent_commit=first)
        try:
            late = [CommitOperationAdd("c.txt", b"late")]
            api.create_commit("me/model", late, commit_message="Late", parent_commit=first)
        except HfHubHTTPError as error:
            show([done.oid, error.response.status_code])
        """,
    )
    assert seen == [hub.get_head("me/model"), 412]
    assert hub.read_files("me/model") == {
        ".gitattributes": GITATTRIBUTES,
        "a.safetensors": WEIGHTS,
        "b.safetensors": b"b" * 99,
        "config.json": b"{}",
    }
    assert list(hub.read_files("me/model", first)) == [".gitattributes"]
    assert sum("/commit/" in request.path for request in hub.requests) == 2


def test_huggingface_hub_reads_ranges_and_metadata(hub: HubServer, tmp_path: Path) -> None:
    hub.upload("me/model", {"config.json": CONFIG, "model.safetensors": WEIGHTS})
    seen = run_client(
        hub.url,
        tmp_path,
        """
        fs = HfFileSystem()
        with fs.open("me/model/model.safetensors", block_size=1000) as file:
            file.seek(2_400_000)
            part = file.read(64).hex()
        data = [get_hf_file_metadata(hf_hub_url("me/model", name)) for name in ["config.json", "model.safetensors"]]
        metadata = [[each.etag, each.size, each.commit_hash] for each in data]
        paths = [each.path for each in api.get_paths_info("me/model", ["config.json", "no.txt"])]
        show([part, sorted(fs.ls("me/model", detail=False)), metadata, data[1].location, paths])
        """,
    )
    part, names, metadata, location, paths = seen
    head = hub.get_head("me/model")
    assert bytes.fromhex(part) == WEIGHTS[2_400_000:2_400_064]
    assert names == [f"me/model/{name}" for name in (".gitattributes", "config.json", "model.safetensors")]
    assert metadata == [
        [hashlib.sha1(b"blob %d\0" % len(CONFIG) + CONFIG).hexdigest(), len(CONFIG), head],
        [hashlib.sha256(WEIGHTS).hexdigest(), len(WEIGHTS), head],
    ]
    assert location.startswith(hub.storage.url)
    assert paths == ["config.json"]
    assert hub.leaked_tokens == []


def test_huggingface_hub_understands_the_refusals(hub: HubServer, tmp_path: Path) -> None:
    hub.create_repo("me/closed", private=True)
    hub.create_repo("me/gated", gated=True)
    for repo_id in ("me/closed", "me/gated"):
        hub.upload(repo_id, {"config.json": CONFIG})
    put = "upload_file(path_or_fileobj=b'', path_in_repo='a', repo_id="
    cases = [
        (None, "model_info('me/closed')", "RepositoryNotFoundError 401"),
        ("hf_stranger", "model_info('me/closed')", "RepositoryNotFoundError 404"),
        ("hf_reader", "model_info('me/closed')", None),
        ("hf_reader", "hf_hub_download('me/closed', 'config.json', force_download=True)", None),
        (None, "hf_hub_download('me/gated', 'config.json')", "GatedRepoError 401"),
        ("hf_stranger", "hf_hub_download('me/gated', 'config.json')", "GatedRepoError 403"),
        ("hf_reader", "hf_hub_download('me/gated', 'config.json', force_download=True)", None),
        ("hf_writer", "hf_hub_download('me/gated', 'config.json', force_download=True)", None),
        (None, "list_repo_files('me/gated')", None),
        ("hf_reader", put + "'me/closed')", "HfHubHTTPError 403"),
        (None, put + "'me/model')", "HfHubHTTPError 401"),
        ("hf_reader", "create_repo('me/other')", "HfHubHTTPError 403"),
        ("hf_stranger", "delete_repo('me/model')", "HfHubHTTPError 403"),
        ("hf_writer", "create_repo('me/model')", "HfHubHTTPError 409"),
        ("hf_writer", "create_repo('me/model', exist_ok=True)", None),
        ("hf_writer", "create_branch('me/model', branch='main')", "HfHubHTTPError 409"),
        ("hf_writer", "model_info('me/model', revision='nope')", "RevisionNotFoundError 404"),
        ("hf_writer", "hf_hub_download('me/model', 'nope')", "RemoteEntryNotFoundError 404"),
        ("hf_writer", "get_paths_info('me/model', 'nope', revision='nope')", "RevisionNotFoundError 404"),
        ("hf_writer", "list_repo_files('me/none')", "RepositoryNotFoundError 404"),
        ("hf_writer", "delete_file('nope', 'me/model')", "RemoteEntryNotFoundError 404"),
        ("hf_wrong", "model_info('me/model')", "HfHubHTTPError 401"),
    ]
    outcomes = run_client(
        hub.url,
        tmp_path,
        f"""
        outcomes = []
        for token, call, _ in {cases!r}:
            try:
                eval("HfApi(token=token or False)." + call)
                outcomes.append(None)
            except HfHubHTTPError as error:
                outcomes.append(f"{{type(error).__name__}} {{error.response.status_code}}")
        show(outcomes)
        """,
    )
    expected = {f"{token}: {call}": outcome for token, call, outcome in cases}
    assert dict(zip(expected, outcomes, strict=True)) == expected


def test_huggingface_hub_deletes_and_branches(hub: HubServer, tmp_path: Path) -> None:
    first = hub.upload("me/model", {"a.txt": b"a", "dir/b.txt": b"b", "dir/c.txt": b"c", "d.txt": b"d"})
    seen = run_client(
        hub.url,
        tmp_path,
        """
        api.create_branch("me/model", branch="try/out")
        api.delete_file("a.txt", "me/model", revision="try/out")
        api.delete_folder("dir", "me/model", revision="try/out")
        refs = {each.name: each.target_commit for each in api.list_repo_refs("me/model").branches}
        files = [api.list_repo_files("me/model", revision=name) for name in ["try/out", "main"]]
        api.delete_branch("me/model", branch="try/out")
        left = [each.name for each in api.list_repo_refs("me/model").branches]
        show([refs["main"], refs["try/out"] == refs["main"], files, left])
        """,
    )
    everything = [".gitattributes", "a.txt", "d.txt", "dir/b.txt", "dir/c.txt"]
    assert seen == [first, False, [[".gitattributes", "d.txt"], everything], ["main"]]
    assert run_client(hub.url, tmp_path, "show([api.delete_repo('me/model'), api.repo_exists('me/model')])") == [
        None,
        False,
    ]


@pytest.mark.slow
def test_huggingface_hub_waits_at_the_rate_limit(hub: HubServer, tmp_path: Path) -> None:
    hub.page_length = 1
    hub.upload("me/model", {"a.txt": b"", "b.txt": b""})
    hub.limit_rate(after=2, retry_after=1)
    assert run_client(hub.url, tmp_path, "show(len(list(api.list_repo_tree('me/model'))))") == 3
    assert [request.status for request in hub.requests if "/tree/" in request.path].count(429) == 1


# Others' clients


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm")
@pytest.mark.parametrize("part_nbytes", [None, 1 << 20])
def test_the_npm_client_agrees(hub: HubServer, tmp_path: Path, part_nbytes: int | None) -> None:
    hub.page_length, hub.part_nbytes = 2, part_nbytes
    (tmp_path / "package.json").write_text('{"private": true}')
    (tmp_path / "weights").write_bytes(WEIGHTS)
    install = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts", "@huggingface/hub@2.17.5"]
    subprocess.run(install, cwd=tmp_path, check=True, capture_output=True, timeout=240)
    (tmp_path / "client.mjs").write_text(
        """
        import { createRepo, uploadFiles, listFiles, downloadFile, deleteFile, modelInfo } from "@huggingface/hub";
        import { readFileSync, writeFileSync } from "node:fs";
        const common = { repo: "me/npm", accessToken: "hf_writer", hubUrl: process.argv[2] };
        await createRepo({ ...common, visibility: "private" });
        const weights = new Blob([readFileSync("weights")]);
        const files = [
            { path: "deep/model.safetensors", content: weights },
            { path: "a b.txt", content: new Blob(["hey"]) },
        ];
        const { commit } = await uploadFiles({ ...common, files, commitTitle: "From npm" });
        const listed = [];
        for await (const entry of listFiles({ ...common, recursive: true, expand: true })) {
            listed.push([entry.path, entry.size, entry.lfs?.oid ?? null, entry.lastCommit.title]);
        }
        const blob = await downloadFile({ ...common, path: "deep/model.safetensors" });
        writeFileSync("downloaded", new Uint8Array(await blob.arrayBuffer()));
        const text = await (await downloadFile({ ...common, path: "a b.txt" })).text();
        const missing = await downloadFile({ ...common, path: "nope" });
        const info = await modelInfo({ name: "me/npm", accessToken: "hf_writer", hubUrl: common.hubUrl });
        await deleteFile({ ...common, path: "a b.txt" });
        console.log(JSON.stringify([commit.oid, listed, text, missing, info.private]));
        """
    )
    done = subprocess.run(["node", "client.mjs", hub.url], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    oid, listed, text, missing, private = json.loads(done.stdout)
    commits = hub.repos["me/npm"].commits
    assert commits[oid].title == "From npm"
    assert [entry[:3] for entry in listed] == [
        [".gitattributes", len(GITATTRIBUTES), None],
        ["a b.txt", 3, None],
        ["deep", 0, None],
        ["deep/model.safetensors", len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest()],
    ]
    assert [entry[3] for entry in listed] == ["initial commit", "From npm", "From npm", "From npm"]
    assert (text, missing, private) == ("hey", None, True)
    assert (tmp_path / "downloaded").read_bytes() == WEIGHTS
    assert sorted(hub.read_files("me/npm")) == [".gitattributes", "deep/model.safetensors"]
    assert sum(request.method == "PUT" for request in hub.storage_requests) == (3 if part_nbytes else 1)
    assert hub.leaked_tokens == []


@pytest.mark.slow
def test_a_mirror_in_front_serves_the_same(hub: HubServer, tmp_path: Path) -> None:
    hub.upload("me/model", {"config.json": CONFIG, "deep/model.safetensors": WEIGHTS})
    venv.create(tmp_path / "venv", with_pip=True)
    programs = tmp_path / "venv" / "bin"
    install: list[str | Path] = [
        programs / "python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "olah==0.5.4",
    ]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    [port] = free_ports(1)
    mirror = f"127.0.0.1:{port}"
    command: list[str | Path] = [programs / "olah-cli", "--host", "127.0.0.1", "--port", str(port)]
    for option, value in {
        "hf-scheme": "http",
        "hf-netloc": urlsplit(hub.url).netloc,
        "hf-lfs-netloc": urlsplit(hub.storage.url).netloc,
        "mirror-scheme": "http",
        "mirror-netloc": mirror,
        "mirror-lfs-netloc": mirror,
        "repos-path": str(tmp_path / "mirrored"),
        "log-path": str(tmp_path / "logs"),
    }.items():
        command += [f"--{option}", value]

    def is_ready() -> bool:
        try:
            return ask(f"http://{mirror}/api/models/me/model/revision/main", headers={}).status == 200
        except OSError:
            return False

    process = ServerProcess(command, directory=tmp_path)
    try:
        process.wait_until(is_ready)
        snapshot = Path(run_client(f"http://{mirror}", tmp_path, "show(snapshot_download('me/model'))", token=None))
    finally:
        process.stop()
    files = hub.read_files("me/model")
    assert {path: (snapshot / path).read_bytes() for path in files} == files
    assert any(request.status == 206 for request in hub.storage_requests)
    assert hub.leaked_tokens == []


def test_ids_are_those_of_git(hub: HubServer, tmp_path: Path) -> None:
    files = {"a.txt": b"1", "a/b.txt": b"2", "a/c/d.txt": b"3", "a-b": b"4", "z.safetensors": WEIGHTS}
    hub.upload("me/model", files)
    commit = hub.repos["me/model"].get_head("main")
    for path, content in hub.read_files("me/model").items():
        (tmp_path / "git" / path).parent.mkdir(parents=True, exist_ok=True)
        pointer = make_pointer(hashlib.sha256(content).hexdigest(), len(content))
        (tmp_path / "git" / path).write_bytes(pointer if path.endswith("tensors") else content)
    git = [
        "git",
        "-C",
        str(tmp_path / "git"),
        "-c",
        "core.autocrlf=false",
        "-c",
        "filter.lfs.clean=cat",
        "-c",
        "filter.lfs.process=",
    ]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    tree = subprocess.run([*git, "write-tree"], check=True, capture_output=True, text=True).stdout.strip()
    assert commit.trees[""] == tree
    assert set(commit.trees) == {"", "a", "a/c"}


# Plain HTTP


def test_tokens_and_stale_signatures_are_refused_by_the_storage(hub: HubServer) -> None:
    hub.upload("me/model", {"model.safetensors": WEIGHTS})
    target = f"{hub.url}/me/model/resolve/main/model.safetensors"

    def resolve() -> str:
        answer = ask(target)
        assert answer.status == 302
        return answer.headers["Location"]

    good = resolve()
    assert ask(good).content == WEIGHTS
    assert urlsplit(good).hostname != urlsplit(hub.url).hostname
    assert ask(good, headers={"Authorization": "Bearer hf_writer"}).status == 400
    assert hub.leaked_tokens == ["Bearer hf_writer"]
    assert ask(good.replace("Expires=", "Expires=9")).status == 403
    assert ask(good, "PUT", b"other").status == 403
    hub.signature_seconds = -1
    assert ask(resolve()).status == 403
    hub.signature_seconds = 60
    assert ask(resolve()).status == 200
    hub.expire_urls()
    assert ask(good).status == 403
    assert ask(resolve(), "HEAD").headers["Content-Length"] == str(len(WEIGHTS))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_ranges_and_preconditions(hub: HubServer, name: str) -> None:
    content = {"config.json": CONFIG, "model.safetensors": WEIGHTS}[name]
    hub.upload("me/model", {name: content})
    url = f"{hub.url}/me/model/resolve/main/{name}"
    head = ask(url, "HEAD")
    etag, is_lfs = head.headers["X-Linked-ETag"] or head.headers["ETag"], name == "model.safetensors"
    assert head.headers["X-Repo-Commit"] == hub.get_head("me/model")
    assert (head.headers["X-Linked-Size"], head.status) == ((str(len(content)), 302) if is_lfs else (None, 200))
    url = head.headers["Location"] or url
    nbytes = len(content)
    cases = {"0-0": (0, 1), "3-9": (3, 10), "5-": (5, nbytes), "-4": (nbytes - 4, nbytes), f"7-{nbytes}": (7, nbytes)}
    for text, (start, stop) in cases.items():
        answer = ask(url, headers={"Range": f"bytes={text}"})
        assert (answer.status, answer.content) == (206, content[start:stop])
        assert answer.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{nbytes}"
        assert answer.headers["ETag"] == etag
    beyond = ask(url, headers={"Range": f"bytes={nbytes}-"})
    assert (beyond.status, beyond.headers["Content-Range"]) == (416, f"bytes */{nbytes}")
    assert ask(url, headers={"Range": "bytes=0-1,4-5"}).content == content
    assert ask(url, headers={"If-Match": etag}).status == 200
    assert ask(url, headers={"If-Match": '"other"'}).status == 412
    assert ask(url, headers={"If-None-Match": etag}).status == 304
    assert ask(url, headers={"If-None-Match": '"other"'}).content == content
    assert ask(url, headers={"If-Range": '"other"', "Range": "bytes=0-1"}).status == 200


def test_the_rate_limit_says_when_to_come_back(hub: HubServer) -> None:
    url = f"{hub.url}/api/models/me/model"
    hub.limit_rate(after=2, retry_after=1)
    answers = [ask(url) for _ in range(4)]
    assert [answer.status for answer in answers] == [200, 200, 429, 429]
    assert answers[2].headers["Retry-After"] == "1"
    assert answers[2].headers["RateLimit"] == '"api";r=0;t=1'
    time.sleep(1.05)
    assert ask(url).status == 200
    assert [request.status for request in hub.requests] == [200, 200, 429, 429, 200]
    assert set(hub.requests) == {("GET", "/api/models/me/model", 200), ("GET", "/api/models/me/model", 429)}
    hub.reset_requests()
    assert hub.requests == []


def start_upload(hub: HubServer, content: bytes, transfers: list[str] | None = None) -> dict[str, Any]:
    """Ask for the upload of one object; return its entry in the answer."""
    wanted = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content)}
    body = {"operation": "upload", "objects": [wanted], "transfers": transfers or ["basic"], "hash_algo": "sha256"}
    answer = ask(f"{hub.url}/me/model.git/info/lfs/objects/batch", "POST", body)
    assert answer.status == 200
    [entry] = json.loads(answer.content)["objects"]
    assert isinstance(entry, dict)
    return entry


def send_commit(hub: HubServer, *lines: tuple[str, object], parent: str | None = None) -> Answer:
    """Send a commit to main."""
    header = {"summary": "Test", **({"parentCommit": parent} if parent else {})}
    rows = [{"key": key, "value": value} for key, value in (("header", header), *lines)]
    body = "\n".join(map(json.dumps, rows)).encode()
    return ask(f"{hub.url}/api/models/me/model/commit/main", "POST", body)


def test_objects_have_the_announced_content(hub: HubServer) -> None:
    content = b"c" * 1000
    oid = hashlib.sha256(content).hexdigest()
    line = ("lfsFile", {"path": "x.bin", "algo": "sha256", "oid": oid, "size": 1000})
    actions = start_upload(hub, content)["actions"]
    verify = {"oid": oid, "size": 1000}
    assert ask(actions["upload"]["href"], "PUT", b"d" * 1000).status == 400
    assert ask(actions["verify"]["href"], "POST", verify).status == 404
    assert send_commit(hub, line).status == 400
    assert ask(actions["upload"]["href"], "PUT", content).status == 200
    assert ask(actions["verify"]["href"], "POST", {**verify, "size": 1}).status == 422
    assert ask(actions["verify"]["href"], "POST", verify).status == 200
    assert "actions" not in start_upload(hub, content)
    assert send_commit(hub, line).status == 200
    assert hub.read_files("me/model")["x.bin"] == content
    body = {"operation": "download", "objects": [verify, {"oid": "0" * 64, "size": 1}]}
    found, missing = json.loads(ask(f"{hub.url}/me/model.git/info/lfs/objects/batch", "POST", body).content)["objects"]
    assert ask(found["actions"]["download"]["href"]).content == content
    assert missing["error"]["code"] == 404
    assert not list(hub.objects.directory.glob("incoming-*"))


def test_parts_are_joined_only_if_all_is_there(hub: HubServer) -> None:
    hub.part_nbytes = 400
    content = bytes(range(250)) * 4
    assert "header" not in start_upload(hub, content)["actions"]["upload"]  # who does not know of parts gets none
    upload = start_upload(hub, content, ["basic", "multipart"])["actions"]["upload"]
    urls = [upload["header"][f"{number:05d}"] for number in (1, 2, 3)]
    assert upload["header"]["chunk_size"] == "400"
    oid = hashlib.sha256(content).hexdigest()

    def complete(parts: list[str | None]) -> int:
        rows = [{"partNumber": number, "etag": etag} for number, etag in enumerate(parts, 1)]
        return ask(upload["href"], "POST", {"oid": oid, "parts": rows}).status

    pieces = [content[:400], content[400:800], content[800:]]
    etags = [ask(url, "PUT", piece).headers["ETag"] for url, piece in zip(urls[:2], pieces, strict=False)]
    assert complete([*etags]) == 400
    wrong = ask(urls[2], "PUT", b"w" * 200).headers["ETag"]
    assert complete([*etags, wrong]) == 422
    etags.append(ask(urls[2], "PUT", pieces[2]).headers["ETag"])
    assert complete([*etags[:2], wrong]) == 400
    assert complete([*etags]) == 200
    assert complete([*etags]) == 200  # as when the answer was lost
    assert "actions" not in start_upload(hub, content)


def test_upload_modes_follow_attributes_size_and_sample(hub: HubServer) -> None:
    hub.upload("me/model", {"known.txt": b"known"})

    def get_mode(path: str, nbytes: int = 100, sample: bytes = b"text", attributes: str | None = None) -> str:
        file = {"path": path, "size": nbytes, "sample": base64.b64encode(sample).decode()}
        body = {"files": [file], **({"gitAttributes": attributes} if attributes else {})}
        answer = ask(f"{hub.url}/api/models/me/model/preupload/main", "POST", body)
        return str(json.loads(answer.content)["files"][0]["uploadMode"])

    assert get_mode("deep/model.safetensors") == "lfs"
    assert get_mode("model.safetensors", nbytes=0) == "regular"
    assert get_mode("saved_model/deep/x") == "lfs"
    assert get_mode("tokenizer.json", nbytes=10 << 20) == "regular"
    assert get_mode("tokenizer.json", nbytes=(10 << 20) + 1) == "lfs"
    assert get_mode("model.gguf", sample=b"GGUF\3\0\0\0") == "lfs"
    assert get_mode("model.safetensors", attributes="*.txt filter=lfs") == "regular"
    binary = ("file", {"path": "x.bin", "content": base64.b64encode(b"x").decode(), "encoding": "base64"})
    assert send_commit(hub, binary).status == 400
    hub.upload("me/model", {"odd.dat": b"\0binary"})
    assert get_mode("odd.dat") == "lfs"
    assert hub.read_files("me/model")[".gitattributes"].endswith(b"\nodd.dat filter=lfs diff=lfs merge=lfs -text\n")


def test_branches_move_and_old_commits_stay(hub: HubServer) -> None:
    first = hub.upload("me/model", {"a.txt": b"1"})
    second = hub.upload("me/model", {"a.txt": b"2"})
    hub.move_branch("me/model", "main", first)
    for revision, content in {"main": b"1", first: b"1", second: b"2", "refs%2Fheads%2Fmain": b"1"}.items():
        assert ask(f"{hub.url}/me/model/resolve/{revision}/a.txt").content == content
    line = ("file", {"path": "a.txt", "content": "3"})
    assert send_commit(hub, line, parent=second).status == 412
    assert send_commit(hub, line, parent=first).status == 200
    assert hub.read_files("me/model")["a.txt"] == b"3"


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/api/repos/create", b"{", 400),
        ("POST", "/api/repos/create", b"[]", 400),
        ("POST", "/api/repos/create", {"name": 3}, 400),
        ("POST", "/api/repos/create", {"name": "..", "organization": "me"}, 400),
        ("POST", "/api/repos/create", {"name": "a/b", "organization": "me"}, 400),
        ("POST", "/api/repos/create", {"name": "x", "type": "dataset"}, 400),
        ("DELETE", "/api/repos/delete", {"name": "none", "organization": "me"}, 404),
        ("POST", "/api/models/me/model/branch/..%2Fx", {}, 400),
        ("POST", "/api/models/me/model/branch/main", {}, 409),
        ("POST", "/api/models/me/model/branch/x", {"startingPoint": "nope"}, 404),
        ("DELETE", "/api/models/me/model/branch/main", None, 403),
        ("GET", "/api/models/me/model/tree/main?cursor=%ff", None, 400),
        ("GET", "/api/models/me/model?expand=nope", None, 400),
        ("GET", "/api/models/me/none/tree/main", None, 404),
        ("GET", "/me/model/resolve/main/..%2F..%2Fetc%2Fpasswd", None, 404),
        ("GET", "/me/model/resolve/%0d%0aX-Evil:%201/a", None, 404),
        ("GET", "/elsewhere", None, 404),
        ("POST", "/api/models/me/model/preupload/main", {"files": [3]}, 400),
        ("POST", "/api/models/me/model/preupload/main", {"files": [{"path": "../x", "size": 1, "sample": ""}]}, 400),
        ("POST", "/api/models/me/model/preupload/main", {"files": [{"path": "x", "size": 1, "sample": "?"}]}, 400),
        ("POST", "/api/models/me/model/commit/main?create_pr=1", b'{"key":"header","value":{"summary":"x"}}', 400),
        ("POST", "/api/models/me/model/commit/nope", b'{"key":"header","value":{"summary":"x"}}', 404),
        ("POST", "/api/models/me/model/commit/main", b'{"key":"file","value":{}}', 400),
        ("POST", "/api/models/me/model/commit/main", b"", 400),
        ("POST", "/me/model.git/info/lfs/objects/batch", {"operation": "upload", "objects": [{"oid": "../x"}]}, 400),
        ("POST", "/me/model.git/info/lfs/objects/batch", {"operation": "drop", "objects": [{}]}, 400),
        ("POST", "/api/complete_multipart?upload=x", {"oid": "x", "parts": []}, 403),
    ],
)  # fmt: skip
def test_bad_requests_are_refused(hub: HubServer, method: str, path: str, body: object, status: int) -> None:
    before = hub.get_head("me/model")
    answer = ask(hub.url + path, method, body)
    assert (answer.status, "error" in json.loads(answer.content)) == (status, True)
    assert "X-Evil" not in answer.headers
    assert (hub.get_head("me/model"), list(hub.repos)) == (before, ["me/model"])


@pytest.mark.parametrize("path", ["../x", "/x", "a//b", "a/./b", ".git/config", "a\\b", "a\nb", "", ".gitattributes/x"])
def test_no_commit_has_paths_that_lead_elsewhere(hub: HubServer, path: str) -> None:
    assert send_commit(hub, ("file", {"path": path, "content": "x"})).status == 400
    assert list(hub.read_files("me/model")) == [".gitattributes"]


@pytest.mark.parametrize("header", [{"Content-Length": "x"}, {"Content-Length": "-1"}])
def test_bodies_of_unknown_length_are_refused(hub: HubServer, header: dict[str, str]) -> None:
    assert ask(f"{hub.url}/api/models/me/model", headers=header).status == 400
    upload = start_upload(hub, WEIGHTS)["actions"]["upload"]["href"]
    assert ask(upload, "PUT", headers={"Transfer-Encoding": "chunked"}, body=b"0\r\n\r\n").status == 411


def test_connections_are_kept_also_after_refusals(hub: HubServer) -> None:
    [upload] = [start_upload(hub, WEIGHTS)["actions"]["upload"]["href"]]
    host = urlsplit(upload).netloc
    connection = http.client.HTTPConnection(host, timeout=10)
    connection.connect()
    socket = connection.sock
    statuses = []
    for target in (upload + "0", upload, upload):
        connection.request("PUT", target.partition(host)[2], WEIGHTS)
        response = connection.getresponse()
        response.read()
        statuses.append(response.status)
        assert connection.sock is socket
    connection.close()
    assert statuses == [403, 200, 200]


def test_the_end_is_quick(tmp_path: Path) -> None:
    with HubServer(tmp_path / "hub") as hub:
        connection = http.client.HTTPConnection(urlsplit(hub.url).netloc, timeout=10)
        connection.request("GET", "/elsewhere")
        connection.getresponse().read()
        started = time.monotonic()
    assert time.monotonic() - started < 1
    connection.close()
    with pytest.raises(ConnectionRefusedError):
        ask(f"{hub.url}/api/whoami-v2")


def test_failures_of_the_hub_itself_fail_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(hub: HubServer) -> None:
        with hub:
            monkeypatch.setattr(hub, "take_quota", lambda: 1 / 0)
            assert ask(f"{hub.url}/api/whoami-v2").status == 500

    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        fail(HubServer(tmp_path / "hub"))


def test_equal_commits_have_ids_of_their_own() -> None:
    files = {"a.bin": make_lfs_entry("0" * 64, 1)}
    oids = {make_commit(None, files, "same", "", "me").oid for _ in range(3)}
    assert all(len(oid) == 40 for oid in oids)
