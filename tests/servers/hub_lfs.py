"""The test Hub's object storage: a second listener under another host name, reached by signed URLs only."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
import time
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, quote, unquote, urlencode

from tests.servers.hub_git import Objects, Repo
from tests.servers.hub_http import Handler, Listener, Refusal


@dataclass
class Multipart:
    """An upload in parts that was begun."""

    repo: Repo
    sha256: str
    nbytes: int
    num_parts: int
    parts: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Part number to MD5 and the name of the file that holds it."""


class Storage(Listener):
    """Keeps LFS objects; every URL carries an expiry time and a signature over method, path and the rest."""

    def __init__(self, objects: Objects) -> None:
        super().__init__(StorageHandler)
        self.objects = objects
        self.url = f"http://localhost:{self.server_address[1]}"
        self.leaked_tokens: list[str] = []
        """Authorization headers that were sent here, where none belongs."""
        self.multiparts: dict[str, Multipart] = {}
        self.repos: dict[str, Repo] = {}
        self.lock = threading.RLock()
        self.secret = secrets.token_bytes(32)

    def sign(self, base: str, method: str, path: str, seconds: float, **query: str) -> str:
        """Return the URL under which this may be done, for so many seconds."""
        query |= {"Expires": str(time.time() + seconds)}
        return f"{base}{quote(path)}?{urlencode(query | {'Signature': self._make_signature(method, path, query)})}"

    def check(self, method: str, target: str) -> tuple[str, dict[str, str]]:
        """Return path and query of a request.

        Raises:
            Refusal: The signature is not ours, or has expired.
        """
        raw, _, text = target.partition("?")
        path, query = unquote(raw), dict(parse_qsl(text))
        signature, expires = query.pop("Signature", ""), query.get("Expires", "")
        expected = self._make_signature("GET" if method == "HEAD" else method, path, query)
        if not hmac.compare_digest(signature.encode(), expected.encode()):
            raise Refusal(403, "SignatureDoesNotMatch")
        if float(expires) < time.time():
            raise Refusal(403, "Request has expired")
        return path, query

    def _make_signature(self, method: str, path: str, query: dict[str, str]) -> str:
        text = "\n".join([method, path, *(f"{name}={query[name]}" for name in sorted(query))])
        return hmac.new(self.secret, text.encode(), "sha256").hexdigest()

    def make_upload(
        self, hub_url: str, repo: Repo, sha256: str, nbytes: int, part_nbytes: int | None, seconds: float
    ) -> dict[str, object]:
        """Return the `upload` action of an LFS batch answer."""
        if part_nbytes is None or nbytes <= part_nbytes:
            query = {"repo": repo.id, "nbytes": str(nbytes)}
            return {"href": self.sign(self.url, "PUT", f"/objects/{sha256}", seconds, **query)}
        num_parts = -(-nbytes // part_nbytes)
        key = secrets.token_hex(16)
        with self.lock:
            self.multiparts[key] = Multipart(repo, sha256, nbytes, num_parts)
        header = {"chunk_size": str(part_nbytes)}
        for number in range(1, num_parts + 1):
            header[f"{number:05d}"] = self.sign(self.url, "PUT", f"/parts/{key}/{number}", seconds)
        return {"href": self.sign(hub_url, "POST", "/api/complete_multipart", seconds, upload=key), "header": header}

    def complete(self, key: str, oid: str, parts: list[tuple[int, str]]) -> None:
        """Join the parts of an upload.

        Raises:
            Refusal: Parts are missing or were named wrongly, or the content is not what was announced.
        """
        with self.lock:
            upload = self.multiparts.get(key)
            if upload is None:
                raise Refusal(404, "NoSuchUpload")
            if oid != upload.sha256:
                raise Refusal(400, "Invalid request: oid is not that of the upload")
            if upload.sha256 in upload.repo.lfs_objects:
                return
            known = [(number, upload.parts[number][0]) for number in sorted(upload.parts)]
            if [number for number, _ in known] != list(range(1, upload.num_parts + 1)) or sorted(parts) != known:
                raise Refusal(400, "InvalidPart: one or more of the specified parts could not be found")
            joined, digest = self.objects.open_temporary(), hashlib.sha256()
            with joined.open("wb") as file:
                for number, _ in known:
                    path = self.objects.get_path(upload.parts[number][1])
                    content = path.read_bytes()
                    digest.update(content)
                    file.write(content)
            if digest.hexdigest() != upload.sha256 or joined.stat().st_size != upload.nbytes:
                joined.unlink()
                raise Refusal(422, "The content does not have the announced SHA-256")
            joined.replace(self.objects.get_path(upload.sha256))
            upload.repo.lfs_objects[upload.sha256] = upload.nbytes
            for _, name in upload.parts.values():
                self.objects.get_path(name).unlink()


class StorageHandler(Handler):
    """One connection to the object storage."""

    server: Storage

    def answer(self) -> None:
        if token := self.headers.get("Authorization"):
            self.server.leaked_tokens.append(token)
            raise Refusal(400, "InvalidArgument: Only one auth mechanism allowed")
        path, query = self.server.check(self.command, self.path)
        _, kind, name, *rest = path.split("/")
        if self.command in ("GET", "HEAD") and kind == "objects":
            repo = self.server.repos.get(query["repo"])
            if repo is None or name not in repo.lfs_objects:
                raise Refusal(404, "NoSuchKey")
            self.send_file(self.server.objects.get_path(name), name, {})
        elif self.command == "PUT" and "Content-Length" not in self.headers:
            raise Refusal(411, "MissingContentLength")
        elif self.command == "PUT" and kind == "objects":
            self._put_object(name, self.server.repos.get(query["repo"]), int(query["nbytes"]))
        elif self.command == "PUT" and kind == "parts":
            self._put_part(name, int(rest[0]))
        else:
            raise Refusal(405, "MethodNotAllowed")

    def _put_object(self, sha256: str, repo: Repo | None, nbytes: int) -> None:
        name, digest, _ = self._receive("sha256")
        temporary = self.server.objects.get_path(name)
        if repo is None or digest != sha256 or temporary.stat().st_size != nbytes:
            temporary.unlink()
            raise Refusal(404, "NoSuchBucket") if repo is None else Refusal(400, "BadDigest: not the announced content")
        with self.server.lock:
            temporary.replace(self.server.objects.get_path(sha256))
            repo.lfs_objects[sha256] = nbytes
        self.send(200, headers={"ETag": f'"{sha256}"'})

    def _put_part(self, key: str, number: int) -> None:
        name, digest, _ = self._receive("md5")
        with self.server.lock:
            upload = self.server.multiparts.get(key)
            if upload is None:
                self.server.objects.get_path(name).unlink()
                raise Refusal(404, "NoSuchUpload")
            upload.parts[number] = (f'"{digest}"', name)
        self.send(200, headers={"ETag": f'"{digest}"'})

    def _receive(self, algorithm: str) -> tuple[str, str, int]:
        """Write the body to a new file; return its name, digest and nbytes."""
        temporary, digest, nbytes = self.server.objects.open_temporary(), hashlib.new(algorithm), 0
        try:
            with temporary.open("wb") as file:
                for chunk in self.read_chunks():
                    digest.update(chunk)
                    nbytes += len(chunk)
                    file.write(chunk)
        except BaseException:
            temporary.unlink()
            raise
        return temporary.name, digest.hexdigest(), nbytes
