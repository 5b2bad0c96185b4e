"""Models brought to this machine's disk for an evaluation, and deleted after it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from raymerge.cluster.directory import make_directory
from raymerge.pipeline.checkpoint.files import (
    ADAPTER_CONFIG,
    CONFIG,
    PIPELINE,
    is_hidden,
    is_of_component,
    is_rewritten,
    is_side_file,
    is_weights,
)
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.evaluation.adapters import find_base, plan_sum
from raymerge.pipeline.evaluation.subjects import Planned, Subject
from raymerge.pipeline.options import MergeOptions
from raymerge.pipeline.spectrum.materialise import materialised
from raymerge.pipeline.spectrum.places import locate_ref, parse_ref
from raymerge.pipeline.stores.local.path import local_path
from raymerge.pipeline.stores.open import Stores
from raymerge.pipeline.urls import scheme_of


@dataclass(frozen=True, slots=True)
class Brought:
    """A model on a disk of this machine."""

    directory: str
    base: str = ""
    """The model that an adapter, which a planned point came out as, names as its base, and was applied to."""


@contextmanager
def bring_here(
    stores: Stores, subject: Subject, merging: MergeOptions, check: Callable[[], None] = lambda: None
) -> Iterator[Brought]:
    """Have a model in a directory of this machine: where it is, or copied or merged for as long as the context lasts.

    Args:
        stores: that have it.
        subject: the model.
        merging: how it is merged, if it is.
        check: called while it is copied or merged; raises when the run is to end.

    Raises:
        RaymergeError: it cannot be read or merged.
    """
    if subject.url and scheme_of(subject.url) == "file":
        yield Brought(str(local_path(subject.url)))
        return
    if (planned := subject.planned) is not None:
        with ExitStack() as stack:
            make = partial(materialised, options=merging, on_event=lambda event: check())
            made = make(planned.directory, planned.spectrum, planned.point)
            directory, named = stack.enter_context(made), ""
            if not Path(directory, CONFIG).exists() and Path(directory, ADAPTER_CONFIG).exists():
                named = str(find_base(stores, directory, planned.base))
                whole = plan_sum(subject.name, locate_base(planned, named), ModelRef(directory))
                directory = stack.enter_context(make("", *whole))
            yield Brought(directory, named)
        return
    with make_directory(Path(tempfile.gettempdir())) as scratch:
        directory = f"{scratch}/{subject.name}"
        _fetch(stores, subject.url, directory, check)
        yield Brought(directory)


def locate_base(planned: Planned, named: str) -> ModelRef:
    """Return the model that a planned point is applied to if it comes out as an adapter, where it is now.

    Args:
        planned: the point.
        named: the base that the adapter names; what the user names goes before it.
    """
    if planned.base:
        return parse_ref(planned.base)
    return locate_ref(planned.spectrum, planned.directory, parse_ref(named))


def _fetch(stores: Stores, url: str, directory: str, check: Callable[[], None]) -> None:
    files = stores.at(url).list(url)
    with_safetensors = {name.rpartition("/")[0] for name in files if name.endswith(".safetensors")}
    wanted = {
        name: file
        for name, file in files.items()
        if not is_hidden(name)
        and (
            is_side_file(name)
            or is_rewritten(name)
            or (is_weights(name) and "/" not in name)
            or (PIPELINE in files and is_of_component(name))
        )
        and not (is_weights(name) and not name.endswith(".safetensors") and name.rpartition("/")[0] in with_safetensors)
    }
    stores.at(directory).check_space(directory, sum(file.nbytes for file in wanted.values()))
    for name, file in wanted.items():
        path = Path(directory, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as copy:
            for piece in stores.read_pieces(file):
                copy.write(piece)
                check()
