"""log P of every token of a prompt, with the most probable ones beside it, computed in pieces between the steps of a scheduler.

All positions of a prompt are run, none is taken from the cache: their logits are what is asked for. The pages that are filled on
the way are published, so that the answers to the same prompt find it there.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from gptfast.cache import PAGE
from gptfast.generation.pages import keys_of
from gptfast.generation.runner import Batch

if TYPE_CHECKING:
    from gptfast.generation.scheduler import Scheduler

ROWS = 128  # positions in a step; each takes a row of logits


@dataclass(eq=False)
class PromptScore:
    """ids [T]; logprobs [T]: the first is None, nothing precedes it; top_logprobs: {id: logprob} of the largest for each of them.
    `on_end(self)` is called once, in the thread that steps; error: why there is no result."""

    ids: list[int]
    top: int
    on_end: Callable[[PromptScore], None]
    logprobs: list[float | None] = field(default_factory=lambda: [None])
    top_logprobs: list[dict[int, float] | None] = field(default_factory=lambda: [None])
    error: str | None = None
    cancelled: bool = False
    done: bool = False
    pages: list[int] = field(default_factory=list)

    @property
    def computed(self) -> int:
        """Tokens whose keys and values are in `pages`."""
        return len(self.logprobs) - 1

    @property
    def todo(self) -> int:
        """Tokens that are to be run; the last one predicts nothing of the prompt."""
        return len(self.ids) - 1 - self.computed


class PromptScorer:
    """Shares a scheduler's runner and pages. submit() may be called from any thread, step() from one at a time."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self._arrived: deque[PromptScore] = deque()
        self._running: list[PromptScore] = []
        self.active = False  # whether a pass is running

    @property
    def waiting(self) -> int:
        """How many have not ended."""
        return len(self._arrived) + len(self._running)

    def submit(self, ids: Sequence[int], top: int, on_end: Callable[[PromptScore], None]) -> PromptScore:
        """Queues the scores of `ids`, which fit into the context."""
        score = PromptScore(list(ids), top, on_end)
        self._arrived.append(score)
        return score

    def step(self) -> bool:
        """One pass over at most ROWS positions; False where there is nothing to do or no page is free."""
        if not self.waiting:
            return False
        with self.scheduler.exclusive():
            self._admit()
            for score in [score for score in self._running if score.cancelled or score.todo <= 0]:
                self._end(score)
            shares, budget = [], ROWS
            for score in self._running:
                count = min(score.todo, budget)
                if count:
                    shares.append((score, count))
                    budget -= count
            if shares:
                self.active = True
                try:
                    self._run(shares)
                finally:
                    self.active = False
            return bool(shares)

    def close(self) -> None:
        """Ends what is left, as cancelled."""
        for score in (*self._arrived, *self._running):
            score.cancelled = True
            self._end(score)
        self._arrived.clear()

    def _admit(self) -> None:
        pool = self.scheduler.pool
        while self._arrived and sum(score.todo for score in self._running) < ROWS:
            score = self._arrived[0]
            need = max(-(-score.todo // PAGE), 0)
            if not score.cancelled and pool.available < need:
                return
            self._arrived.popleft()
            if not score.cancelled:
                score.pages = [page for _ in range(need) if (page := pool.take()) is not None]
            self._running.append(score)

    def _run(self, shares: list[tuple[PromptScore, int]]) -> None:
        batch, targets = Batch(), []
        for score, count in shares:
            at = score.computed
            batch.add(score.ids[at : at + count], at, score.pages, count, None)
            targets += score.ids[at + 1 : at + count + 1]
        try:
            logits = self.scheduler.runner.logits(batch)
        except Exception:
            for score, _ in shares:
                score.error = "the pass over the prompt failed"
                self._end(score)
            raise
        place = 0
        logprobs = torch.log_softmax(logits, 1)
        chosen = logprobs.gather(1, torch.tensor(targets, device=logits.device)[:, None])[:, 0].tolist()
        largest = logprobs.topk(min(max(score.top for score, _ in shares), logits.shape[1]), dim=1)
        ids, values = largest.indices.tolist(), largest.values.tolist()
        for score, count in shares:
            for i in range(place, place + count):
                score.logprobs.append(chosen[i])
                score.top_logprobs.append(dict(zip(ids[i][: score.top], values[i][: score.top], strict=True)))
            if any(math.isnan(value) for value in chosen[place : place + count]):
                score.error = f"numerical error: the logits of the prompt's first {score.computed} tokens hold NaN"
            place += count
            if score.todo == 0 or score.error:
                self._end(score)

    def _end(self, score: PromptScore) -> None:
        pool = self.scheduler.pool
        if score in self._running:
            self._running.remove(score)
        if not score.error:
            full = score.computed // PAGE
            for page, key in zip(score.pages, keys_of(score.ids, [], full), strict=False):
                pool.publish(page, key)
        pool.release(score.pages)
        score.pages, score.done = [], True
        score.on_end(score)
