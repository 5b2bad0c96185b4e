"""The engines of one machine: as many as there are models at work at once, each with its share of the processors."""

from __future__ import annotations

import os
import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from raymerge.cluster.host import count_cores
from raymerge.pipeline.engine.gpu.devices import VARIABLE
from raymerge.pipeline.evaluation.generation.engine import Engine


class Engines:
    """Lends engines to threads, and keeps their processes between models; use it in a `with` block."""

    def __init__(self, backend: str, num: int, timeout: float, gpus: Sequence[str] = ()) -> None:
        """Begin.

        Args:
            backend: which library they use.
            num: of them.
            timeout: seconds after which one is given up that tells nothing.
            gpus: for each what it has, as `CUDA_VISIBLE_DEVICES` names them; by default all have what this process has.
        """
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, count_cores() // num))
        environment = {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        own = [{**environment, **({VARIABLE: gpus[k]} if gpus else {})} for k in range(num)]
        self._all = [Engine(backend, each, timeout) for each in own]
        self._idle: queue.SimpleQueue[Engine] = queue.SimpleQueue()
        for engine in self._all:
            self._idle.put(engine)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for engine in self._all:
            engine.close()

    @contextmanager
    def lend(self) -> Iterator[Engine]:
        """Lend an engine that nobody else uses."""
        engine = self._idle.get()
        try:
            yield engine
        finally:
            self._idle.put(engine)
