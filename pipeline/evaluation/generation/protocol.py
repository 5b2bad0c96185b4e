"""Requests and answers of an engine's process: a JSON object a line."""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

Serve = Callable[[dict[str, Any]], Iterator[dict[str, Any]]]
"""Yields the answers to a request."""


def serve_requests(serve: Serve) -> None:
    """Answer requests until nobody can make any; also in the middle of one, so that no process outlives who asks."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever libraries print is no answer
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin.buffer:
            requests.put(json.loads(line))
        os._exit(0)

    threading.Thread(target=listen, name="listen", daemon=True).start()

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    while True:
        request = requests.get()
        try:
            for answer in serve(request):
                say(answer)
            say({"done": True})
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            say({"failed": f"{type(error).__name__}: {' '.join(lines)[:600]}" if lines else type(error).__name__})
