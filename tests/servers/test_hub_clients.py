"""The test Hub as clients that nobody here wrote see it."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import venv
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.servers import ServerProcess, free_ports
from tests.servers.hub import HubServer
from tests.servers.hub_clients import CONFIG, WEIGHTS, ask, run_client, write_model
from tests.servers.hub_git import GITATTRIBUTES, make_pointer

pytestmark = pytest.mark.slow  # a process for each client; the product's tests use huggingface_hub in their own


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


def test_huggingface_hub_waits_at_the_rate_limit(hub: HubServer, tmp_path: Path) -> None:
    hub.page_length = 1
    hub.upload("me/model", {"a.txt": b"", "b.txt": b""})
    hub.limit_rate(after=2, retry_after=1)
    assert run_client(hub.url, tmp_path, "show(len(list(api.list_repo_tree('me/model'))))") == 3
    assert [request.status for request in hub.requests if "/tree/" in request.path].count(429) == 1


# Others' clients


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
