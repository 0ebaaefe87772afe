"""A progress bar for work whose length is known in bytes."""

from __future__ import annotations

import os
import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from gptfast.training.log import Line


class Bar:
    """A Rich progress bar on stderr; where stderr is no terminal or NO_COLOR is set, a plain line every 10 s. A context manager."""

    def __init__(self, enabled: bool = True) -> None:
        self._rich: Progress | None = None
        if enabled and sys.stderr.isatty() and not os.environ.get("NO_COLOR"):
            columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
            self._rich = Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True))
            self._task = self._rich.add_task("", total=None)
        self._line = Line(enabled and self._rich is None)
        self._what, self._total = "", 0

    def __enter__(self) -> Self:
        if self._rich is not None:
            self._rich.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._rich is not None:
            self._rich.stop()

    def begin(self, what: str, total: int = 0) -> None:
        """Starts a stage of `total` bytes (0: unknown)."""
        self._what, self._total = what, total
        if self._rich is not None:
            self._rich.reset(self._task, description=what, total=total or None)

    def to(self, done: int) -> None:
        """`done` bytes of the stage are behind us."""
        if self._rich is not None:
            self._rich.update(self._task, completed=done)
        elif self._line.due():
            of = f" of {self._total / 1e6:,.1f}" if self._total else ""
            self._line.show(f"{self._what}: {done / 1e6:,.1f}{of} MB")

    def say(self, text: str) -> None:
        """Prints a line that stays, above the bar."""
        if self._rich is not None:
            self._rich.console.print(text, markup=False, highlight=False)
        else:
            self._line.say(text)
