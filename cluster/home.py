"""The home directory, and the directory for state in it. A user may have none."""

from __future__ import annotations

import os
from pathlib import Path

from raymerge.cluster.errors import NoHomeError


def find_home() -> Path | None:
    """Return the home directory; None where HOME is not set and the user has no passwd entry, as in some containers."""
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home if home.is_absolute() else None


def expand_home(path: str | Path) -> Path:
    """Return a path with `~` or `~user` at its beginning replaced by the home directory.

    Raises:
        NoHomeError: nobody knows where that is.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        name = Path(path).parts[0]
        why = "HOME is not set and this user has no passwd entry" if name == "~" else "there is no such user"
        raise NoHomeError(f"{path}: no home directory is known for {name} ({why}); write the path out") from None


def find_state() -> Path:
    """Return the directory for what is kept between runs; it need not be there yet.

    Raises:
        NoHomeError: the user has none.
    """
    if given := os.environ.get("XDG_STATE_HOME"):
        return (expand_home(given) / "raymerge").absolute()
    home = find_home()
    if home is None:
        raise NoHomeError(
            "this user has no home directory (HOME is not set, and there is no passwd entry) to keep what is not"
            " published yet; set XDG_STATE_HOME to a directory that you may write to"
        )
    return home / ".local/state/raymerge"


def is_writable(path: Path) -> bool:
    """Tell whether a directory may be written to, or made if it is not there."""
    there = next(parent for parent in (path, *path.parents) if os.access(parent, os.F_OK))
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def make_private_cache(*names: str) -> Path | None:
    """Make a directory in the user's cache; None where there is none that nobody else may write to."""
    home, given = find_home(), Path(os.environ.get("XDG_CACHE_HOME", ""))
    if home is None and not given.is_absolute():
        return None
    directory = Path(given if given.is_absolute() else f"{home}/.cache", "raymerge", *names)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
    except OSError:
        return None
    return directory if status.st_uid == os.geteuid() and not status.st_mode & 0o022 else None
