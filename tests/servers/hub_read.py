"""What the test Hub answers to those who read: who may, listings, contents."""

from __future__ import annotations

import base64
import hmac
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, urlencode

from tests.servers.hub_git import Commit, Entry, Repo, make_pointer
from tests.servers.hub_http import Handler, Listener, Refusal, get_field, parse_object

if TYPE_CHECKING:
    from tests.servers.hub import HubServer, Token


EXPANDABLE = (
    "author baseModels cardData childrenModelCount config createdAt disabled downloads downloadsAllTime evalResults "
    "gated gguf inference inferenceProviderMapping lastModified library_name likes mask_token model-index pipeline_tag "
    "private resourceGroup safetensors sha siblings spaces tags transformersInfo trendingScore usedStorage widgetData"
)
"""What may be asked for; what this Hub knows nothing of is left out of the answer."""


class HubListener(Listener):
    """The Hub's own port."""

    def __init__(self, handler: type[Handler], hub: HubServer) -> None:
        super().__init__(handler)
        self.hub = hub


class ReadHandler(Handler):
    """One connection to the Hub, as far as it reads."""

    server: HubListener
    raw_path: str
    query: dict[str, list[str]]

    @property
    def hub(self) -> HubServer:
        return self.server.hub

    # Who may what

    def get_token(self) -> Token | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        kind, _, name = header.partition(" ")
        for known, token in self.hub.tokens.items():
            if kind.lower() == "bearer" and hmac.compare_digest(name.strip().encode(), known.encode()):
                return token
        raise Refusal(401, "Invalid credentials in Authorization header")

    def find_repo(self, repo_id: str, *, content: bool = False) -> Repo:
        """Return a repo whose listing, or also content, the client may read."""
        token, repo = self.get_token(), self.hub.repos.get(repo_id)
        may_read = token is not None and token.may_read(repo_id)
        if repo is None or (repo.private and not may_read):
            if token is None:
                raise Refusal(401, "Invalid username or password.", "RepoNotFound")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if content and repo.gated and not may_read:
            message = f"Access to model {repo_id} is restricted"
            if token is None:
                raise Refusal(401, f"{message}. You must have access to it and be authenticated.", "GatedRepo")
            raise Refusal(403, f"{message} and you are not in the authorized list.", "GatedRepo")
        return repo

    def send_user(self) -> None:
        token = self.get_token()
        if token is None:
            raise Refusal(401, "Invalid username or password.")
        role = {"displayName": "test", "role": "write" if token.can_write else "read"}
        auth = {"type": "access_token", "accessToken": role}
        self.send_json({"type": "user", "name": token.user, "fullname": token.user, "orgs": [], "auth": auth})

    # Listings

    def send_model(self, repo_id: str, revision: str) -> None:
        repo = self.find_repo(repo_id)
        commit = repo.get_commit(revision)
        siblings: list[dict[str, Any]] = []
        for path, entry in sorted(commit.files.items()):
            siblings.append({"rfilename": path})
            if self.get_flag("blobs"):
                siblings[-1] |= {"size": entry.nbytes, "blobId": entry.oid}
                if lfs := _describe_lfs(entry):
                    siblings[-1]["lfs"] = {"sha256": lfs["oid"], **lfs}
        dates = [each.date for each in commit.iter_history()]
        model: dict[str, Any] = {
            "id": repo_id,
            "modelId": repo_id,
            "author": repo_id.partition("/")[0],
            "sha": commit.oid,
        }
        model |= {"lastModified": dates[0], "createdAt": dates[-1], "private": repo.private, "gated": repo.gated}
        model |= {
            "author": repo_id.partition("/")[0],
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": siblings,
        }
        model |= {"author": repo_id.partition("/")[0], "usedStorage": sum(repo.lfs_objects.values())}
        if names := [*self.query.get("expand", []), *self.query.get("expand[]", [])]:
            if unknown := [name for name in names if name not in EXPANDABLE.split()]:
                raise Refusal(400, f'"expand" must be one of: {EXPANDABLE}; not {unknown[0]!r}')
            model = {name: value for name, value in model.items() if name in ("id", *names)}
        self.send_json(model, headers={"X-Repo-Commit": commit.oid})

    def send_tree(self, repo_id: str, revision: str, folder: str) -> None:
        commit = self.find_repo(repo_id).get_commit(revision)
        if folder not in commit.trees:
            raise Refusal(404, f'{folder} does not exist on "{revision}"', "EntryNotFound")
        prefix = f"{folder}/" if folder else ""
        paths = sorted({*commit.files, *commit.trees} - {""})
        paths = [path for path in paths if path.startswith(prefix) and path != folder]
        if not self.get_flag("recursive"):
            paths = [path for path in paths if "/" not in path.removeprefix(prefix)]
        expand = self.get_flag("expand")
        self.send_page(paths, lambda path: _describe(commit, path, expand), commit)

    def send_commits(self, repo_id: str, revision: str) -> None:
        head = self.find_repo(repo_id).get_commit(revision)
        history = {f"{number:09d}": commit for number, commit in enumerate(head.iter_history())}
        self.send_page(list(history), lambda key: _describe_commit(history[key]), head)

    def send_page(self, keys: list[str], describe: Callable[[str], dict[str, Any]], commit: Commit | None) -> None:
        """Send the entries (keys: in order) after the cursor, and where to go on."""
        length = self.hub.page_length
        try:
            after = base64.urlsafe_b64decode(self.query.get("cursor", [""])[0]).decode()
            length = min(length, int(self.query.get("limit", [str(length)])[0]))
        except ValueError:
            raise Refusal(400, "Invalid cursor or limit") from None
        left = [key for key in keys if key > after]
        page, headers = left[: max(1, length)], {"X-Repo-Commit": commit.oid} if commit else {}
        if len(page) < len(left):
            query = [(name, value) for name, values in self.query.items() for value in values if name != "cursor"]
            cursor = base64.urlsafe_b64encode(page[-1].encode()).decode()
            target = f"{self.hub.url}{self.raw_path}?{urlencode([*query, ('cursor', cursor)])}"
            headers["Link"] = f'<{target}>; rel="next"'
        self.send_json([describe(key) for key in page], headers=headers)

    def send_refs(self, repo_id: str) -> None:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit.oid}
            for name, commit in sorted(self.find_repo(repo_id).branches.items())
        ]
        self.send_json({"branches": branches, "converts": [], "tags": [], "pullRequests": []})

    def send_paths_info(self, repo_id: str, revision: str) -> None:
        text = self.read_body()
        commit = self.find_repo(repo_id).get_commit(revision)
        if "json" in self.headers.get("Content-Type", ""):
            body = parse_object(text)
            paths, expand = get_field(body, "paths", list), body.get("expand") is True
        else:
            form = parse_qs(text.decode("utf-8", "replace"))
            paths, expand = form.get("paths", []), form.get("expand", [""])[0].lower() in ("true", "1")
        known = [path for path in paths if isinstance(path, str) and (path in commit.files or path in commit.trees)]
        self.send_json([_describe(commit, path, expand) for path in known if path])

    def get_flag(self, name: str) -> bool:
        return self.query.get(name, ["false"])[0].lower() in ("true", "1")

    # Contents

    def send_content(self, repo_id: str, revision: str, path: str, may_redirect: bool) -> None:
        repo = self.find_repo(repo_id, content=True)
        commit = repo.get_commit(revision)
        headers, entry = {"X-Repo-Commit": commit.oid}, commit.files.get(path)
        if entry is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", headers)
        name = quote(path.rpartition("/")[2])
        headers["Content-Disposition"] = f"inline; filename*=UTF-8''{name}; filename=\"{name}\";"
        linked = {"X-Linked-ETag": f'"{entry.etag}"', "X-Linked-Size": str(entry.nbytes)}
        if entry.sha256:
            storage, object_path = self.hub.storage, f"/objects/{entry.sha256}"
            target = storage.sign(storage.url, "GET", object_path, self.hub.signature_seconds, repo=repo.id)
        elif may_redirect:
            target = f"/api/resolve-cache/models/{repo_id}/{commit.oid}/{quote(path)}"
        else:
            return self.send_file(self.hub.objects.get_path(entry.etag), entry.etag, headers)
        headers |= {**linked, "Location": target, "ETag": f'"{entry.oid}"', "Accept-Ranges": "bytes"}
        headers |= {"Vary": "Origin, Accept", "Content-Type": "text/plain; charset=utf-8"}
        status = 302 if entry.sha256 else 307
        return self.send(status, f"Redirecting to {target}".encode(), headers)

    def send_raw(self, repo_id: str, revision: str, path: str) -> None:
        commit = self.find_repo(repo_id, content=True).get_commit(revision)
        entry = commit.files.get(path)
        headers = {"X-Repo-Commit": commit.oid}
        if entry is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", headers)
        if entry.sha256:
            return self.send(200, make_pointer(entry.sha256, entry.nbytes), {"ETag": f'"{entry.oid}"', **headers})
        return self.send_file(self.hub.objects.get_path(entry.etag), entry.etag, headers)


def _describe(commit: Commit, path: str, expand: bool) -> dict[str, Any]:
    """Return an entry of a listing."""
    entry = commit.files.get(path)
    if entry:
        row = {"type": "file", "oid": entry.oid, "size": entry.nbytes, "path": path}
        if lfs := _describe_lfs(entry):
            row["lfs"] = lfs
    else:
        row = {"type": "directory", "oid": commit.trees[path], "size": 0, "path": path}
    if expand:
        last = commit.find_last_change(path)
        row["lastCommit"] = {"id": last.oid, "title": last.title, "date": last.date}
    return row


def _describe_lfs(entry: Entry) -> dict[str, Any] | None:
    if entry.sha256 is None:
        return None
    pointer = make_pointer(entry.sha256, entry.nbytes)
    return {"oid": entry.sha256, "size": entry.nbytes, "pointerSize": len(pointer)}


def _describe_commit(commit: Commit) -> dict[str, Any]:
    row = {"id": commit.oid, "title": commit.title, "message": commit.description, "date": commit.date}
    return {**row, "authors": [{"user": commit.author}], "parents": [commit.parent.oid] if commit.parent else []}
