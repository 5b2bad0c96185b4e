"""Mutated headers of safetensors files, against the safetensors library."""

from __future__ import annotations

from math import prod
from pathlib import Path
from random import Random
from typing import NamedTuple

import safetensors

from raymerge.pipeline.checkpoint.dtypes import DTYPES
from raymerge.pipeline.checkpoint.header import read_header
from raymerge.pipeline.stores.local.storage import LocalStorage
from tests.fuzz.campaign import Campaign, write
from tests.fuzz.mutation import NUMBERS, VALUES, Pairs, Raw, dump, mutate, spoil

_NAMES = ("a", "b", "model.layers.0.w", "", "é", "__metadata__", "dtype")
_VALUES = (*VALUES, *(f'"{name}"' for name in DTYPES), '"f32"', '"F8_E4M3"', "[0,4]", "[4,0]", "[2,2]",
           "[4294967296,4294967296]", "[0,4294967296,4294967296]", "[9223372036854775807,3]", '{"format":"pt"}',
           '{"format":1}', '{"format":null}', "[" + "1," * 40 + "1]")  # fmt: skip


class HeaderCase(NamedTuple):
    """A file."""

    content: bytes


class Headers(Campaign[HeaderCase]):
    """Files of a few tensors."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "x.safetensors"
        self._storage = LocalStorage()

    def make(self, random: Random) -> HeaderCase:
        header, start = Pairs(), 0
        if random.random() < 0.3:
            header.append(("__metadata__", Pairs([("format", "pt")])))
        for _ in range(random.randint(0, 3)):
            dtype = random.choice([*DTYPES, "F32", "BF16"])
            shape = [random.choice([0, 1, 2, 4, 8]) for _ in range(random.randint(0, 3))]
            stop = start + prod(shape) * DTYPES[dtype].num_bits // 8
            entry = [("dtype", dtype), ("shape", shape), ("data_offsets", [start, stop])]
            header.append((random.choice(_NAMES) + str(start), Pairs(random.sample(entry, 3))))
            start = stop
        if random.random() < 0.3:
            header.append(("x", Pairs([("dtype", "U8"), ("shape", [0]), ("data_offsets", [start, start]),
                                       ("more", Raw(random.choice(NUMBERS)))])))  # fmt: skip
        tree = mutate(header, random, _VALUES) if random.random() < 0.95 else header
        text = spoil(dump(tree) + " " * random.randint(0, 3), random, 0.08)
        length = len(text)
        if random.random() < 0.04:
            length = random.choice([0, length - 1, length + 1, length + 9, 2**63, 2**64 - 1, 100_000_001, 2**32])
        data = bytes(max(0, start + random.choice([0] * 12 + [-1, 1, 4])))
        return HeaderCase(max(0, length).to_bytes(8, "little") + text + data)

    def attempt(self, case: HeaderCase) -> None:
        write(self._path, case.content)
        read_header(self._storage, self._storage.stat(str(self._path)))

    def explain_refusal(self, case: HeaderCase) -> str:
        try:
            with safetensors.safe_open(self._path, "numpy") as file:
                file.keys()
            safetensors.deserialize(case.content)  # type: ignore[no-untyped-call]
        except safetensors.SafetensorError as error:
            return str(error)
        return ""
