"""Ctrl-C while a step runs: the step ends early and whole, instead of being lost with what it has drawn."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gptfast.generation.runner import Runner


@contextmanager
def interruptible(runner: Runner) -> Iterator[list[Any]]:
    """On the main thread: Ctrl-C interrupts the runner and is noted in the list, to be raised when the results are safe; a second
    one is raised at once. A handler that somebody else has set is left alone."""
    noted: list[Any] = []

    def note(number: int, frame: Any) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)
        runner.interrupt()

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield noted
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
