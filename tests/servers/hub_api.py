"""The test Hub's routes, and what it answers to those who write."""

from __future__ import annotations

import base64
import re
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote

import yaml

from tests.servers.hub_collections import CollectionHandler
from tests.servers.hub_git import Commit, Entry, Repo, check_path, choose_mode, make_commit, make_lfs_entry
from tests.servers.hub_http import Refusal, get_field, parse_object

if TYPE_CHECKING:
    from tests.servers.hub import Token


class HubHandler(CollectionHandler):
    """One connection to the Hub."""

    def answer(self) -> None:
        self.hub.take_quota()
        raw, _, query = self.path.partition("?")
        self.raw_path, self.query = raw, parse_qs(query, keep_blank_values=True)
        method = "GET" if self.command == "HEAD" else self.command
        parts = [unquote(part) for part in raw.split("/")[1:]]
        match [method, *parts]:
            case ["GET", "api", "whoami-v2"]:
                self.send_user()
            case ["POST", "api", "repos", "create"]:
                self._create_repo()
            case ["DELETE", "api", "repos", "delete"]:
                self._delete_repo()
            case ["POST", "api", "validate-yaml"]:
                self._validate_card()
            case ["POST", "api", "complete_multipart"]:
                self._complete_multipart()
            case ["GET", "api", "resolve-cache", "models", owner, name, revision, *path]:
                self.send_content(f"{owner}/{name}", revision, "/".join(path), may_redirect=False)
            case [_, "api", "models", name]:
                self.find_repo(name)
            case [_, "api", "models", owner, name, *rest]:
                self._answer_model(method, f"{owner}/{name}", rest)
            case [_, "api", "buckets", owner, name, *rest]:
                self.answer_bucket(method, f"{owner}/{name}", rest)
            case [_, "api", "collections", *rest]:
                self.answer_collection(method, rest)
            case ["GET", "buckets", owner, name, "resolve", *path]:
                self.send_bucket_content(f"{owner}/{name}", "/".join(path))
            case ["POST", owner, name, "info", "lfs", "objects", "batch"] if name.endswith(".git"):
                self._send_batch(f"{owner}/{name.removesuffix('.git')}")
            case ["POST", owner, name, "info", "lfs", "objects", "verify"] if name.endswith(".git"):
                self._verify(f"{owner}/{name.removesuffix('.git')}")
            case ["GET", owner, name, "resolve", revision, *path]:
                self.send_content(f"{owner}/{name}", revision, "/".join(path), self.hub.redirect_regular)
            case ["GET", owner, name, "raw", revision, *path]:
                self.send_raw(f"{owner}/{name}", revision, "/".join(path))
            case _:
                self.get_token()
                raise Refusal(404, "Sorry, we can't find the page you are looking for.")

    def _answer_model(self, method: str, repo_id: str, rest: list[str]) -> None:
        match [method, *rest]:
            case ["GET"]:
                self.send_model(repo_id, "main")
            case ["GET", "revision", revision]:
                self.send_model(repo_id, revision)
            case ["GET", "tree", revision, *path]:
                self.send_tree(repo_id, revision, "/".join(path).strip("/"))
            case ["GET", "refs"]:
                self.send_refs(repo_id)
            case ["GET", "commits", revision]:
                self.send_commits(repo_id, revision)
            case ["POST", "paths-info", revision]:
                self.send_paths_info(repo_id, revision)
            case ["GET", "xet-write-token", _]:
                self._find_writable(repo_id)
                self.send_xet_token()
            case ["POST", "preupload", revision]:
                self._send_upload_modes(repo_id, revision)
            case ["POST", "commit", revision]:
                self._commit(repo_id, revision)
            case ["POST", "branch", branch]:
                self._create_branch(repo_id, branch)
            case ["DELETE", "branch", branch]:
                self._delete_branch(repo_id, branch)
            case _:
                self.find_repo(repo_id)
                raise Refusal(404, "Sorry, we can't find the page you are looking for.")

    def _find_writable(self, repo_id: str) -> tuple[Repo, Token]:
        repo, token = self.find_repo(repo_id), self.get_token()
        if token is None:
            raise Refusal(401, "Invalid username or password.")
        if not token.may_write(repo_id):
            raise Refusal(403, "Forbidden: you don't have write access to this repo")
        return repo, token

    def _check_namespace(self, body: Mapping[str, Any]) -> str:
        """Return the repo id in a request to create or delete, if the client may."""
        token = self.get_token()
        if token is None:
            raise Refusal(401, "Invalid username or password.")
        if body.get("type") not in (None, "model"):
            raise Refusal(400, "Only models are kept here")
        owner = body.get("organization") or token.user
        repo_id = f"{owner}/{get_field(body, 'name', str)}"
        if not token.may_write(repo_id):
            raise Refusal(403, f'You don\'t have the rights to create or delete a model under the namespace "{owner}"')
        return repo_id

    # Repos and branches

    def _create_repo(self) -> None:
        body = self.read_json()
        repo_id = self._check_namespace(body)
        private = body.get("visibility") == "private" or body.get("private") is True
        self.hub.create_repo(repo_id, private=private)
        self.send_json({"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": secrets.token_hex(12)})

    def _delete_repo(self) -> None:
        repo_id = self._check_namespace(self.read_json())
        with self.hub.lock:
            self.find_repo(repo_id)
            self.hub.delete_repo(repo_id)
        self.send(200, b"OK", {"Content-Type": "text/plain"})

    def _create_branch(self, repo_id: str, branch: str) -> None:
        body = parse_object(self.read_body() or b"{}")
        if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", branch, re.ASCII) or ".." in branch:
            raise Refusal(400, f"Invalid branch name: {branch!r}")
        with self.hub.lock:
            repo, _ = self._find_writable(repo_id)
            start = repo.get_commit(str(body.get("startingPoint", "main")))
            if branch in repo.branches:
                raise Refusal(409, f"Reference already exists: refs/heads/{branch}")
            if body.get("emptyBranch") is True:
                start = make_commit(None, {".gitattributes": start.files[".gitattributes"]}, "initial commit", "", "me")
                repo.commits[start.oid] = start
            repo.branches[branch] = start
        self.send_json({"success": True})

    def _validate_card(self) -> None:
        """Look at a model card's front matter."""
        content = get_field(self.read_json(), "content", str)
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        try:
            metadata = yaml.safe_load(match[1]) if match else None
        except yaml.YAMLError as error:
            return self.send_json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        return self.send_json({"errors": [], "warnings": warnings})

    def _delete_branch(self, repo_id: str, branch: str) -> None:
        with self.hub.lock:
            repo, _ = self._find_writable(repo_id)
            repo.get_head(branch)
            if branch == "main":
                raise Refusal(403, "Cannot delete the main branch")
            del repo.branches[branch]
        self.send_json({"success": True})

    # Uploads

    def _send_upload_modes(self, repo_id: str, revision: str) -> None:
        body = self.read_json()
        repo, _ = self._find_writable(repo_id)
        commit = repo.get_commit(revision)
        attributes = body.get("gitAttributes") or self.hub.read_attributes(commit)
        modes: list[dict[str, Any]] = []
        for file in get_field(body, "files", list):
            if not isinstance(file, dict):
                raise Refusal(400, "Invalid request: files should be objects")
            path, nbytes = check_path(get_field(file, "path", str)), get_field(file, "size", int)
            sample = _decode(get_field(file, "sample", str))
            mode = choose_mode(path, nbytes, sample, str(attributes))
            modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
            if path in commit.files:
                modes[-1]["oid"] = commit.files[path].etag
        self.send_json({"files": modes, "commitOid": commit.oid})

    def _send_batch(self, repo_id: str) -> None:
        body = self.read_json()
        operation, transfers = get_field(body, "operation", str), body.get("transfers")
        if operation == "upload":
            repo, _ = self._find_writable(repo_id)
        else:
            repo = self.find_repo(repo_id, content=True)
        part_nbytes = self.hub.part_nbytes if isinstance(transfers, list) and "multipart" in transfers else None
        objects: list[dict[str, Any]] = []
        for wanted in get_field(body, "objects", list):
            if not isinstance(wanted, dict):
                raise Refusal(400, "Invalid request: objects should be objects")
            oid, nbytes = _check_sha256(get_field(wanted, "oid", str)), get_field(wanted, "size", int)
            objects.append({"oid": oid, "size": nbytes})
            has_object = oid in repo.lfs_objects
            if operation == "upload" and not has_object:
                objects[-1] |= {"authenticated": True, "actions": self._make_upload(repo, oid, nbytes, part_nbytes)}
            elif operation == "download" and has_object:
                storage = self.hub.storage
                path, seconds = f"/objects/{oid}", self.hub.signature_seconds
                href = storage.sign(storage.url, "GET", path, seconds, repo=repo.id)
                objects[-1] |= {"authenticated": True, "actions": {"download": {"href": href}}}
            elif operation == "download":
                objects[-1]["error"] = {"code": 404, "message": "Object does not exist"}
            elif operation != "upload":
                raise Refusal(422, f"Unknown operation: {operation!r}")
        transfer = "multipart" if part_nbytes and any("header" in _get_upload(each) for each in objects) else "basic"
        head = {"Content-Type": "application/vnd.git-lfs+json"}
        self.send_json({"transfer": transfer, "objects": objects, "hash_algo": "sha256"}, headers=head)

    def _make_upload(self, repo: Repo, oid: str, nbytes: int, part_nbytes: int | None) -> dict[str, Any]:
        seconds = self.hub.signature_seconds
        upload = self.hub.storage.make_upload(self.hub.url, repo, oid, nbytes, part_nbytes, seconds)
        return {"upload": upload, "verify": {"href": f"{self.hub.url}/{repo.id}.git/info/lfs/objects/verify"}}

    def _complete_multipart(self) -> None:
        body = self.read_json()
        _, query = self.hub.storage.check(self.command, self.path)
        parts = get_field(body, "parts", list)
        if not all(isinstance(part, dict) for part in parts):
            raise Refusal(400, "Invalid request: parts should be objects")
        known = [(get_field(part, "partNumber", int), get_field(part, "etag", str)) for part in parts]
        self.hub.storage.complete(query["upload"], get_field(body, "oid", str), known)
        self.send_json({"success": True})

    def _verify(self, repo_id: str) -> None:
        body = self.read_json()
        repo, _ = self._find_writable(repo_id)
        nbytes = repo.lfs_objects.get(get_field(body, "oid", str))
        if nbytes is None:
            raise Refusal(404, "Object does not exist")
        if nbytes != get_field(body, "size", int):
            raise Refusal(422, "Object has another size")
        self.send_json({})

    def _find_lfs(self, repo: Repo, sha256: str) -> Entry | None:
        """Return what was uploaded to a repo by LFS or Xet."""
        if sha256 not in repo.lfs_objects and (content := self.hub.xet.fetch(sha256=sha256)) is not None:
            repo.lfs_objects[sha256] = self.hub.objects.add_lfs(content).nbytes
        return make_lfs_entry(sha256, repo.lfs_objects[sha256]) if sha256 in repo.lfs_objects else None

    def _commit(self, repo_id: str, branch: str) -> None:
        lines = [parse_object(line) for line in self.read_body().split(b"\n") if line.strip()]
        if self.get_flag("create_pr"):
            raise Refusal(400, "Pull requests are disabled for this repo")
        if not lines or lines[0].get("key") != "header":
            raise Refusal(400, "Invalid commit: the first line should be the header")
        header = get_field(lines[0], "value", dict)
        title = get_field(header, "summary", str)
        if not title.strip():
            raise Refusal(400, "Invalid commit: empty summary")
        with self.hub.lock:
            repo, token = self._find_writable(repo_id)
            head = repo.get_head(branch)
            if header.get("parentCommit") not in (None, head.oid):
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            changes: dict[str, Entry | None] = {}
            for line in lines[1:]:
                self._apply(repo, head, get_field(line, "key", str), get_field(line, "value", dict), changes)
            description = str(header.get("description") or "")
            commit = self.hub.commit(repo, branch, changes, title, description, token.user)
        url = f"{self.hub.url}/{repo_id}/commit/{commit.oid}"
        self.send_json({"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})

    def _apply(
        self, repo: Repo, head: Commit, key: str, value: Mapping[str, Any], changes: dict[str, Entry | None]
    ) -> None:
        """Add one line of a commit to its changes."""
        path = get_field(value, "path", str)
        path = check_path(path.rstrip("/") if key == "deletedFolder" else path)
        if key == "file":
            text = get_field(value, "content", str)
            content = _decode(text) if value.get("encoding") == "base64" else text.encode()
            if choose_mode(path, len(content), content, self.hub.read_attributes(head)) == "lfs":
                raise Refusal(400, f"Your push was rejected because {path} is binary or too large: use git-lfs")
            changes[path] = self.hub.objects.add_regular(content)
        elif key == "lfsFile":
            oid = _check_sha256(get_field(value, "oid", str))
            if (entry := self._find_lfs(repo, oid)) is None:
                raise Refusal(400, f"Your push was rejected because an LFS pointer pointed to a missing object: {path}")
            changes[path] = entry
        elif key == "deletedFile":
            if path not in head.files:
                raise Refusal(404, f"Entry not found: {path}", "EntryNotFound")
            changes[path] = None
        elif key == "deletedFolder":
            inside = [each for each in head.files if each.startswith(f"{path}/")]
            if not inside:
                raise Refusal(404, f"Entry not found: {path}", "EntryNotFound")
            changes.update(dict.fromkeys(inside))
        else:
            raise Refusal(400, f"Invalid commit: unknown operation {key!r}")


def _get_upload(described: Mapping[str, Any]) -> Mapping[str, Any]:
    upload = described.get("actions", {}).get("upload", {})
    assert isinstance(upload, dict)
    return upload


def _check_sha256(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise Refusal(400, "Invalid request: oid should be a SHA-256")
    return text


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise Refusal(400, "Invalid base64") from None
