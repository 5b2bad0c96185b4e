"""The places that a sweep's models go to, checked before the first is made."""

from __future__ import annotations

from collections.abc import Sequence

from raymerge.pipeline.checkpoint.files import CONFIG
from raymerge.pipeline.driver import check_target, count_nbytes
from raymerge.pipeline.errors import OutputError
from raymerge.pipeline.output.state import measure_nbytes
from raymerge.pipeline.spectrum.batches import Batch
from raymerge.pipeline.spectrum.record import Spectrum, locate_point
from raymerge.pipeline.stores.local.path import local_path
from raymerge.pipeline.stores.open import Stores
from raymerge.pipeline.urls import scheme_of


def check_no_model(stores: Stores, directory: str) -> None:
    """Refuse a directory that holds a model of its own.

    Raises:
        OutputError: it does.
    """
    url = f"{directory}/{CONFIG}"
    try:
        stores.at(url).stat(url)
    except FileNotFoundError:
        return
    raise OutputError(f"{directory} holds a model ({CONFIG}); choose another directory for the sweep's models")


def check_targets(
    stores: Stores, directory: str, spectrum: Spectrum, batches: Sequence[Batch], *, overwrite: bool
) -> list[list[str]]:
    """Return where the models of each batch go, once nothing is in the way there and all have room together.

    Raises:
        RaymergeError: something is in the way of a model, or there is no room.
    """
    urls = {point.name: locate_point(directory, point) for point in spectrum.points}
    targets = []
    missing = 0
    for batch in batches:
        places = []
        for k, point in enumerate(batch.points):
            url = urls[point.name]
            if scheme_of(url) == "file":
                if local_path(url).exists() and not local_path(url).is_dir():
                    raise OutputError(f"{url} is a file, and the model {point.name} goes there; move it away")
                missing += max(0, count_nbytes(batch.plan, k) - measure_nbytes(stores, url))
            places.append(check_target(stores, batch.plan, k, url, overwrite=overwrite))
        targets.append(places)
    if missing:
        stores.at(directory).check_space(directory, missing)
    return targets
