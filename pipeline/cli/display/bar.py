"""The bar that a terminal shows while a merge runs."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

_WIDTH = 16


class Bar:
    """A bar with text beside it on stderr, below the lines that are printed."""

    def __init__(self) -> None:
        self._progress = Progress(
            BarColumn(_WIDTH, complete_style="cyan", finished_style="green"),
            TextColumn("{task.description}", markup=False),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task("", total=None, visible=False)

    @property
    def text_width(self) -> int:
        """Characters that have room beside it."""
        return self._progress.console.width - _WIDTH - 1

    def start(self) -> None:
        """Show it, once there is something to show."""
        self._progress.start()

    def stop(self) -> None:
        """Leave it as it is."""
        self._progress.stop()

    def show(self, text: str, completed: int, total: int) -> None:
        """Show how much of the total is done."""
        self._progress.update(self._task, description=text, total=total, completed=completed, visible=True)

    def print(self, text: str) -> None:
        """Print a line, which may have colours, above it."""
        self._progress.console.print(Text.from_ansi(text), soft_wrap=True)
