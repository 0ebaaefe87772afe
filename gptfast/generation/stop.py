"""Stop strings on the byte stream: a match may begin and end inside tokens, and what could still become one is held back."""

from __future__ import annotations

from collections.abc import Iterable


class StopMatcher:
    """Passes bytes through until one of `stops` appears in them.

    The match that ends first wins, of those that end together the longest; it and what follows are never released. At any time the
    longest suffix that begins one of the stops is held back. O(bytes x stops).
    """

    def __init__(self, stops: Iterable[bytes] = ()) -> None:
        self.stops = sorted(set(stops), key=len, reverse=True)
        self.matched: bytes | None = None  # the stop that was found
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """What may be released after `data` arrived. Once `matched` is set, nothing more."""
        if not self.stops or self.matched is not None:
            return b"" if self.matched is not None else data
        start = len(self._held)
        text = self._held + data
        for end in range(start + 1, len(text) + 1):
            for stop in self.stops:
                if text.endswith(stop, 0, end):
                    self.matched, self._held = stop, b""
                    return text[: end - len(stop)]
        keep = self._overlap(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> bytes:
        """What was held back, for when the answer ends for another reason."""
        held, self._held = self._held, b""
        return held

    def _overlap(self, text: bytes) -> int:
        """Length of the longest suffix of `text` that begins a stop."""
        for length in range(min(len(self.stops[0]) - 1, len(text)), 0, -1):
            if any(stop.startswith(text[len(text) - length :]) for stop in self.stops):
                return length
        return 0
