"""One request's part in the engine: its answers as they are made, handed from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from gptfast.generation.engine import Completion, completion_of, piece_of
from gptfast.generation.prompt_score import PromptScore
from gptfast.generation.request import Request
from gptfast.generation.rows import Row
from gptfast.serving.errors import ApiError, engine_failed

if TYPE_CHECKING:
    from gptfast.serving.metrics import Metrics


class Job:
    """`pieces`: (prompt, piece) as they came, where the answer is streamed; `answers[prompt]`: whole ones. What is waiting to be
    read is bounded by the request's own tokens. `stopped`: why others than the client ended it; `gone`: the client went away.

    tell() and told() are called in the engine's thread, everything else in the event loop's or a worker's.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, stream: bool, metrics: Metrics, touch: Callable[[Job], None]) -> None:
        self.loop, self.stream, self.metrics = loop, stream, metrics
        self.pieces: deque[tuple[int, Completion]] = deque()
        self.requests: list[Request] = []
        self.scores: list[PromptScore] = []
        self.tokens = 0
        self.stopped: ApiError | None = None
        self.gone = False
        self.arrived = time.perf_counter()
        self._first: dict[tuple[int, int], float] = {}
        self._wake = asyncio.Event()
        self._touch = touch

    # ------------------------------------------------------------------------------------------------------- the engine's thread

    def listener(self, prompt: int) -> Callable[[Row], None]:
        """What the engine calls after every change of an answer to a prompt."""
        return lambda row: self.tell(prompt, row)

    def tell(self, prompt: int, row: Row) -> None:
        """An answer has changed."""
        if row.drew:
            self.tokens += 1
            if len(row.tokens) == 1:
                self._first[prompt, row.choice] = time.perf_counter()
        if row.finish_reason is not None:
            self._measure(prompt, row)
        if self.stream:
            self.pieces.append((prompt, piece_of(row)))
        if self.stream or row.finish_reason is not None:
            self._touch(self)

    def told(self, score: PromptScore) -> None:
        """A score has ended."""
        if score.error:
            self.metrics.numerical_errors.inc()
        self._touch(self)

    def _measure(self, prompt: int, row: Row) -> None:
        now, first = time.perf_counter(), self._first.get((prompt, row.choice))
        self.metrics.success.labels(row.finish_reason).inc()
        if row.finish_reason == "error":
            self.metrics.numerical_errors.inc()
        if first is not None:
            self.metrics.first_token.observe(first - self.arrived)
            if len(row.tokens) > 1:
                self.metrics.each_token.observe((now - first) / (len(row.tokens) - 1))

    # ------------------------------------------------------------------------------------------------------------ the event loop

    @property
    def work(self) -> list[Request | PromptScore]:
        """All that the engine has of it."""
        return [*self.requests, *self.scores]

    @property
    def done(self) -> bool:
        """Whether every answer has ended."""
        return all(request.done for request in self.requests)

    @property
    def scored(self) -> bool:
        """Whether every score has ended."""
        return all(score.done for score in self.scores)

    def wake(self) -> None:
        """Something is new. In the event loop."""
        self._wake.set()

    async def news(self, seconds: float | None = None) -> bool:
        """Waits until something is new; False after `seconds` without."""
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            return False
        self._wake.clear()
        return True

    def check(self) -> None:
        """Raises ApiError where others ended the request, or numbers failed."""
        if self.stopped is not None:
            raise self.stopped
        failed = next((score.error for score in self.scores if score.error), None)
        failed = failed or next((row.error for request in self.requests for row in request.rows if row.error), None)
        if failed is not None and not failed.startswith("numerical error"):
            raise engine_failed()  # a pass raised; the engine's thread is about to say so
        if failed is not None:
            raise ApiError(500, failed, None, "numerical_error", {"x-should-retry": "false"})

    def answers(self) -> Sequence[Sequence[Completion]]:
        """Whole answers, by prompt."""
        return [[completion_of(row, prompt) for row in request.rows] for prompt, request in enumerate(self.requests)]
