"""torch and numpy stay out until one of their names is used."""

from __future__ import annotations

import subprocess
import sys

import torch

from raymerge.ops import lazy


def test_planning_imports_neither_torch_nor_numpy() -> None:
    code = """
import sys
from raymerge.ops.kernel import Site
from raymerge.ops.registry import find_op, load_ops
load_ops()
kernel = find_op("ties").kernel({"weight": (1.0, 2.0), "density": (0.5, 0.5)})
site = Site("w", (3, 4), 3, 0)
kernel.grid(site), kernel.num_passes(site), kernel.num_scratch(site), kernel.state_nbytes(site), kernel.measuring(site)
assert not {"torch", "numpy"} & sys.modules.keys()
kernel.start(site)
from raymerge.ops.lazy import np, torch
assert torch.float32.itemsize == np.float32().itemsize == 4
assert {"torch", "numpy"} <= sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_are_those_of_the_module() -> None:
    assert lazy.torch.Tensor is torch.Tensor
    assert not hasattr(lazy.torch, "no_such_name")
