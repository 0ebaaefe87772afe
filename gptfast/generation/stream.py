"""From tokens to text: bytes through the stop strings, then whole code points only."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable

from gptfast.generation.stop import StopMatcher


class TextStream:
    """Turns token ids into text piece by piece; the pieces joined are the bytes decoded at once, invalid ones as U+FFFD.

    `token_bytes` gives a token's bytes. A code point split over tokens comes out with its last byte.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], stops: Iterable[str] = ()) -> None:
        self.token_bytes = token_bytes
        self.stop = StopMatcher(stop.encode() for stop in stops)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self.stop.matched is not None

    def push(self, token: int) -> str:
        """The text that is certain after `token`; may be empty."""
        return self._decoder.decode(self.stop.feed(self.token_bytes(token)), final=self.stopped)

    def finish(self) -> str:
        """The rest, after the last token."""
        return self._decoder.decode(self.stop.flush(), final=True)
