"""What a run says while it runs: one live line on stderr, and log.jsonl, always."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

VERSION = 1
_PLAIN_EVERY = 10.0  # seconds between plain lines
_LIVE_EVERY = 0.2


class Line:
    """A line on stderr that is rewritten in place; where stderr is no terminal or NO_COLOR is set, a plain line every 10 s."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._live: Live | None = None
        if enabled and sys.stderr.isatty() and not os.environ.get("NO_COLOR"):
            self._live = Live(console=Console(stderr=True), auto_refresh=False)
        self._last = 0.0 if self._live is not None else time.monotonic() - _PLAIN_EVERY + 1

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def due(self) -> bool:
        """Whether show() would print now; saves the work of making the text."""
        every = _PLAIN_EVERY if self._live is None else _LIVE_EVERY
        return self.enabled and time.monotonic() - self._last >= every

    def show(self, text: str, now: bool = False) -> None:
        """Replaces the line, at most a few times a second; `now` shows it in any case."""
        if not self.enabled or not (now or self.due()):
            return
        self._last = time.monotonic()
        if self._live is not None:
            self._live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Prints a line that stays, above the live one."""
        if self._live is not None:
            self._live.console.print(Text(text))
        elif self.enabled:
            print(text, file=sys.stderr, flush=True)


class Log:
    """log.jsonl: one JSON object a line, each with the format's version and the seconds since the start of this process's run.

    A disk that is full stops the log, not the run: the first failure is returned by write() as a text, later ones are silent.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.start = time.monotonic()
        self._failed = False
        with contextlib.suppress(OSError):
            if path is not None and path.exists() and not path.read_bytes().endswith(b"\n"):
                path.write_bytes(path.read_bytes() + b"\n")  # a crash cut the last line off

    def write(self, event: str, **values: Any) -> str | None:
        """Appends a line at once. Numbers that JSON lacks (NaN, infinity) become null."""
        if self.path is None:
            return None
        plain = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()}
        record = {"version": VERSION, "event": event, "seconds": round(time.monotonic() - self.start, 3), **plain}
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            first, self._failed = not self._failed, True
            return f"the log {self.path} cannot be written: {error.strerror or error}" if first else None
        return None


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl; a last line that was cut off by a crash is left out. Where a resumed run wrote a step again, the
    later record counts."""
    records: dict[tuple[str, Any], dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines()):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and record.get("version") == VERSION:
            records[str(record.get("event")), record.get("step", -number)] = record
    return list(records.values())


def duration(seconds: float) -> str:
    """'1:05:03', '5:03'."""
    minutes, rest = divmod(max(int(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
