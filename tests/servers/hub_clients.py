"""Clients of the test Hub: huggingface_hub in a process of its own, and plain HTTP."""

from __future__ import annotations

import http.client
import json
import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.servers.hub_git import GITATTRIBUTES

WEIGHTS = random.Random(1).randbytes(2_500_000)
CONFIG = b'{"model_type": "llama"}\n'


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
