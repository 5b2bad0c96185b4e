"""Buckets of the test Hub: what huggingface_hub asks of the Hub's, answered as it expects."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from tests.servers.hub_git import Repo
from tests.servers.hub_http import Refusal, get_field, parse_object
from tests.servers.hub_read import ReadHandler

_EMPTY = "0" * 64
"""What hf_xet calls a file without bytes."""


@dataclass(frozen=True)
class BucketEntry:
    """A file of a bucket."""

    nbytes: int
    xet_hash: str
    sha256: str
    """What the storage keeps it under."""
    mtime: int
    uploaded_at: str

    def describe(self, path: str) -> dict[str, Any]:
        """Return its entry in a listing."""
        mtime = datetime.fromtimestamp(self.mtime / 1000, UTC).isoformat(timespec="milliseconds")
        known = {"type": "file", "path": path, "size": self.nbytes, "xetHash": self.xet_hash}
        return known | {"mtime": mtime.replace("+00:00", "Z"), "uploadedAt": self.uploaded_at}


@dataclass
class Bucket(Repo):
    """Files without a history."""

    entries: dict[str, BucketEntry] = field(default_factory=dict)


class BucketHandler(ReadHandler):
    """One connection to the Hub, as far as it is about buckets."""

    def answer_bucket(self, method: str, bucket_id: str, rest: list[str]) -> None:
        match [method, *rest]:
            case ["POST"]:
                self._create(bucket_id)
            case ["GET"]:
                self._send_info(bucket_id)
            case ["GET", "tree", *prefix]:
                self._send_tree(bucket_id, "/".join(prefix))
            case ["POST", "paths-info"]:
                paths = get_field(self.read_json(), "paths", list)
                entries = self._find_bucket(bucket_id).entries
                self.send_json([entries[path].describe(path) for path in paths if path in entries])
            case ["GET", "xet-write-token"]:
                self._find_bucket(bucket_id, write=True)
                self.send_xet_token()
            case ["POST", "batch"]:
                self._change(bucket_id)
            case _:
                raise Refusal(404, "Sorry, we can't find the page you are looking for.")

    def send_xet_token(self) -> None:
        self.send_json({"accessToken": "xet", "exp": int(time.time()) + 3600, "casUrl": self.hub.xet.open()})

    def send_bucket_content(self, bucket_id: str, path: str) -> None:
        entry = self._find_bucket(bucket_id).entries.get(path)
        if entry is None:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        storage = self.hub.storage
        seconds = self.hub.signature_seconds
        target = storage.sign(storage.url, "GET", f"/objects/{entry.sha256}", seconds, repo=f"buckets/{bucket_id}")
        headers = {"X-Linked-Size": str(entry.nbytes), "X-Xet-Hash": entry.xet_hash, "Location": target}
        refresh = f"{self.hub.url}/api/buckets/{quote(bucket_id)}/xet-read-token"
        self.send(302, b"", headers | {"Link": f'<{refresh}>; rel="xet-auth"'})

    def _find_bucket(self, bucket_id: str, *, write: bool = False) -> Bucket:
        token, bucket = self.get_token(), self.hub.buckets.get(bucket_id)
        if bucket is None or (bucket.private and (token is None or not token.may_read(bucket_id))):
            raise Refusal(401 if token is None else 404, "Repository not found", "RepoNotFound")
        if write and (token is None or not token.may_write(bucket_id)):
            raise Refusal(403, "Forbidden: you don't have write access to this bucket")
        return bucket

    def _create(self, bucket_id: str) -> None:
        body, token = self.read_json(), self.get_token()
        if token is None:
            raise Refusal(401, "Invalid username or password.")
        if not token.may_write(bucket_id):
            raise Refusal(403, "You don't have the rights to create a bucket in this namespace")
        with self.hub.lock:
            is_new = bucket_id not in self.hub.buckets
            if is_new:
                self.hub.create_bucket(bucket_id, private=body.get("visibility") == "private")
        answer = {"url": f"{self.hub.url}/buckets/{bucket_id}"}
        self.send_json(
            answer if is_new else {**answer, "error": "You already created this bucket"}, 200 if is_new else 409
        )

    def _send_info(self, bucket_id: str) -> None:
        bucket = self._find_bucket(bucket_id)
        sizes = [entry.nbytes for entry in bucket.entries.values()]
        info = {"id": bucket_id, "private": bucket.private, "createdAt": "2026-01-01T00:00:00.000Z"}
        self.send_json({**info, "size": sum(sizes), "totalFiles": len(sizes)})

    def _send_tree(self, bucket_id: str, prefix: str) -> None:
        """Send all files whose path begins so, or the entries of one directory."""
        entries = self._find_bucket(bucket_id).entries
        if self.get_flag("recursive"):
            paths = sorted(path for path in entries if path.startswith(prefix))
        else:
            top = f"{prefix.rstrip('/')}/" if prefix else ""
            below = [path.removeprefix(top) for path in entries if path.startswith(top)]
            paths = sorted({f"{top}{path.partition('/')[0]}" for path in below})

        def describe(path: str) -> dict[str, Any]:
            return entries[path].describe(path) if path in entries else {"type": "directory", "path": path}

        self.send_page(paths, describe, None)

    def _change(self, bucket_id: str) -> None:
        lines = [parse_object(line) for line in self.read_body().split(b"\n") if line.strip()]
        failed = []
        with self.hub.lock:
            bucket = self._find_bucket(bucket_id, write=True)
            for line in lines:
                path = get_field(line, "path", str)
                if line.get("type") == "deleteFile":
                    if bucket.entries.pop(path, None) is None:
                        failed.append({"path": path, "error": "no such file"})
                elif line.get("type") == "addFile":
                    if not self._add(bucket, path, get_field(line, "xetHash", str), get_field(line, "mtime", int)):
                        failed.append({"path": path, "error": "its content was not uploaded"})
                else:
                    raise Refusal(400, f"Unknown operation {line.get('type')!r}")
        self.send_json({"success": not failed, "failed": failed}, 422 if len(failed) == len(lines) else 200)

    def _add(self, bucket: Bucket, path: str, xet_hash: str, mtime: int) -> bool:
        content = b"" if xet_hash == _EMPTY else self.hub.xet.fetch(xet_hash=xet_hash)
        if content is None:
            return False
        kept = self.hub.objects.add_lfs(content)
        bucket.lfs_objects[kept.etag] = kept.nbytes
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        bucket.entries[path] = BucketEntry(kept.nbytes, xet_hash, kept.etag, mtime, now)
        return True
