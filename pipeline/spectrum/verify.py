"""Checks the models of a spectrum, each against its own manifest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from raymerge.pipeline.errors import CheckpointError, ConfigError, OutputError
from raymerge.pipeline.messages import counted
from raymerge.pipeline.output.state import locate_output
from raymerge.pipeline.output.verify import VerifyReport, check_model
from raymerge.pipeline.spectrum.record import has_spectrum, locate_point, read_spectrum
from raymerge.pipeline.stores.open import open_stores
from raymerge.pipeline.stores.settings import Library, StoreSettings


def verify_all(out: str, *, workers: int = 2, storage: Library = "auto") -> Iterator[tuple[str, VerifyReport]]:
    """Yield what is found of a model, or of each complete model of a spectrum, once it is checked, with its directory.

    Args:
        out: directory or URL of either.
        workers: files read at once.
        storage: what serves object stores and the web.

    Raises:
        ConfigError: `workers` is below 1.
        OutputError: models are not what was written, or a spectrum has none; all others have been yielded by then.
    """
    if workers < 1:
        raise ConfigError(f"workers is {workers}; it must be 1 or more")
    with open_stores(StoreSettings(storage)) as stores:
        directory = locate_output(stores, out)
        is_spectrum = False
        with suppress(CheckpointError):  # no such repository: the model's own error says more
            is_spectrum = has_spectrum(stores, directory)
        if not is_spectrum:
            yield out, check_model(stores, directory, workers)
            return
        points = read_spectrum(stores, directory).sorted_points
        places = dict.fromkeys(locate_point(directory, point) for point in points if point.state == "complete")
        problems = []
        for place in places:
            try:
                yield place, check_model(stores, place, workers)
            except OutputError as error:
                problems.append(str(error))
    if not places:
        raise OutputError(f"{out}: none of {counted(len(points), 'point')} is complete; there is no model to check")
    if problems:
        raise OutputError(
            f"{len(problems)} of {counted(len(places), 'model')} of {out} cannot be used; `raymerge sweep` with"
            " --overwrite makes them again:\n" + "\n".join(problems)
        )
