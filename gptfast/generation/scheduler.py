"""One scheduler for every engine: which sequences take part in the next step, with how many tokens, on which pages.

Requests wait in the order of their arrival. A sequence is admitted when its pages are there; those of its beginning that are known
from earlier texts are taken as they are. Prompts run in chunks beside the sequences that are already drawing. When pages run out,
the youngest sequence gives up its own, waits in front of the others and is computed again later: nothing that was drawn is lost,
and since every sequence alone fits, the oldest one always goes on. What a request is given depends on none of this.

A request's n answers share its prompt: all draw from the prompt's last logits, then hold its full pages together and a copy each of
the page that is not full.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gptfast.cache import PAGE
from gptfast.errors import Error
from gptfast.generation.beam import BeamSettings, Hypothesis, beam_search
from gptfast.generation.interrupt import interruptible
from gptfast.generation.paged_beams import PagedBeams
from gptfast.generation.pages import PagePool, keys_of
from gptfast.generation.request import Answer, Request
from gptfast.generation.rows import Drawn, Row
from gptfast.generation.runner import Batch, Interrupted, Runner
from gptfast.generation.shares import Share, batch_of, places_of
from gptfast.generation.speculation import Speculation, agreeing

CALL = 0.05  # seconds that one call of Runner.decode should last: so long a newcomer waits, and so seldom is it called
MOST_STEPS = 32


class Scheduler:
    """Feeds a Runner. submit() and cancel() may be called from any thread, step() from one at a time.

    `sequences`: most of them in a step; `chunk`: most tokens of prompts in a step; `idle`: most pages kept for their text when
    nobody uses them (default: all).
    """

    def __init__(
        self, runner: Runner, sequences: int = 64, chunk: int = 512, idle: int | None = None, speculation: Speculation | None = None
    ) -> None:
        for name, value in (("sequences", sequences), ("chunk", chunk)):
            if value < 1:
                raise Error(f"{name} is {value}; allowed: at least 1")
        self.runner, self.sequences, self.chunk, self.speculation = runner, sequences, chunk, speculation
        self.pool = PagePool(runner.pages, idle)
        self.running: list[Answer] = []  # the longest admitted first
        self.waiting: deque[Answer] = deque()
        self.preemptions = 0
        self.reused = 0  # prompt tokens that were found in the cache
        self._arrived: deque[Answer] = deque()
        self._pace = 0.0  # seconds of a decode step, smoothed
        self._stepping = threading.Lock()

    # ------------------------------------------------------------------------------------------------------------ requests

    def submit(self, rows: Sequence[Row], on_token: Callable[[Row], None] | None = None) -> Request:
        """Queues the answers to one prompt, which the rows share. Raises gptfast.Error where one cannot fit into the pages at all.

        Row.limit may not lead beyond the context. A row with limit 0 ends at once with "length".
        """
        request = Request(list(rows), on_token)
        for row in rows:
            longest = row.start + max(row.limit, 0)
            if longest > self.runner.context or not row.prompt:
                allowed = f"allowed: 1 to {self.runner.context:,} in all"
                raise Error(f"a prompt of {row.start:,} tokens and {row.limit:,} new ones; {allowed}")
            if -(-longest // PAGE) > self.runner.pages:
                raise Error(f"a request of {longest:,} tokens needs {-(-longest // PAGE)} pages; allowed: {self.runner.pages}")
        sequences = [Answer(row, request, [*row.prompt, *row.tokens]) for row in rows if row.limit > 0 and not row.finish_reason]
        for row in rows:
            if row.limit <= 0 and row.finish_reason is None:
                row.finish_reason = "length"
                self._tell(request, row)
        if sequences:
            request.followers = sequences[1:]
            self._arrived.append(sequences[0])
        return request

    def cancel(self, request: Request) -> None:
        """Ends the request's answers with what they have, before the next step."""
        request.cancelled = True

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.running or self.waiting or self._arrived)

    def run(self, requests: Iterable[Request]) -> None:
        """Steps until these requests are done; what is left of them on an exception is cancelled."""
        requests = list(requests)
        try:
            while not all(request.done for request in requests):
                self.step()
        finally:
            self.abandon(requests)

    def abandon(self, requests: Iterable[Request]) -> None:
        """Cancels what is left of these requests, at once."""
        for request in requests:
            if not request.done:
                self.cancel(request)
        with self._stepping:
            self._retire()

    def close(self) -> None:
        """Cancels everything, and lets go of the runner and the proposer."""
        with self._stepping:
            for sequence in (*self._arrived, *self.waiting, *self.running):
                self.cancel(sequence.request)
            self._retire()
            self.runner.close()
            if self.speculation is not None:
                self.speculation.close()

    # ---------------------------------------------------------------------------------------------------------------- steps

    def step(self) -> bool:
        """One call of the runner, and its results handed out; False where there was nothing to do.

        Ctrl-C on the main thread ends the call after the token it is at, and in the middle of a prompt where the runner can;
        KeyboardInterrupt is raised once its results are out.
        """
        with self._stepping:
            with interruptible(self.runner) as interrupted:
                self._retire()
                try:
                    shares = self._plan()
                    if shares:
                        self._call(shares, interrupted)
                        self._retire()
                    found = bool(shares)
                except Interrupted:
                    found = True  # and it is still to be done
            if interrupted:
                raise KeyboardInterrupt
            return found

    def _call(self, shares: list[Share], interrupted: list[Any]) -> None:
        plain = all(share.single for share in shares)
        steps = self._steps(shares) if plain and not any(share.ahead for share in shares) else 1
        start = time.perf_counter()
        try:
            if interrupted:
                raise Interrupted
            batch = batch_of(shares)
            results = self.runner.decode(batch, steps) if steps > 1 else [self.runner.step(batch)]
        except BaseException:
            for share in shares:  # nothing has happened: the same step can be tried again
                self._unfork(share)
            raise
        if plain:
            self._measure(shares, results, time.perf_counter() - start)
        for drawn in results:
            self._hand_out(shares, drawn)

    def _retire(self) -> None:
        """Takes in what has arrived, and lets go of what has ended or was cancelled."""
        while self._arrived:
            self.waiting.append(self._arrived.popleft())
        for sequence in [*self.running, *self.waiting]:
            if sequence.request.cancelled:
                for each in (sequence, *sequence.request.followers):
                    if each.row.finish_reason is None:
                        each.row.cancel()
                        self._tell(each.request, each.row)
                sequence.request.followers.clear()
        if any(sequence.row.finish_reason for sequence in self.waiting):
            self.waiting = deque(sequence for sequence in self.waiting if not sequence.row.finish_reason)
        for sequence in [sequence for sequence in self.running if sequence.row.finish_reason]:
            if sequence.row.finish_reason == "error":
                self.pool.forget(sequence.pages)
            self._drop(sequence)
        if self.speculation is not None:
            self.speculation.keep(self.running)

    def _drop(self, sequence: Answer) -> None:
        self.running.remove(sequence)
        self.pool.release(sequence.pages)
        sequence.pages, sequence.computed, sequence.published = [], 0, 0

    def _plan(self) -> list[Share]:
        shares: dict[Answer, Share] = {}
        budget = self.chunk
        for sequence in list(self.running):  # the oldest first: it takes pages from the youngest
            if sequence not in self.running:
                continue
            count = 1 if sequence.todo == 1 else min(sequence.todo, budget)
            if count and self._extend(sequence, sequence.computed + count, shares):
                shares[sequence] = Share(sequence, count, count == sequence.todo)
                budget -= count if sequence.todo > 1 else 0
        while self.waiting and len(self.running) < self.sequences and budget > 0:
            sequence = self.waiting[0]
            if not self._admit(sequence):
                break
            self.waiting.popleft()
            count = min(sequence.todo, budget)
            shares[sequence] = Share(sequence, count, count == sequence.todo)
            budget -= count
        planned = list(shares.values())
        room = self.sequences - len(self.running)
        for share in planned:
            if share.draws and share.sequence.request.followers:
                room -= self._fork(share, room)
        if self.speculation is not None and all(share.single for share in planned):  # beside a prompt nothing is gained
            self._propose(planned)
        return planned

    def _admit(self, sequence: Answer) -> bool:
        """Gives a sequence all pages that its tokens need, those that are known first; False, and nothing taken, if there are too
        few. Some pages are left to the running sequences, so that newcomers are not driven out at once."""
        known = (len(sequence.ids) - 1) // PAGE  # the last token is always computed: its logits are needed
        pages = self.pool.match(keys_of(sequence.ids, sequence.keys, known)[:known])
        need = -(-len(sequence.ids) // PAGE) - len(pages)
        if self.pool.available < need + len(self.running) // 8:
            self.pool.release(pages)
            return False
        sequence.pages, sequence.computed, sequence.published = pages, PAGE * len(pages), len(pages)
        self.reused += sequence.computed
        for _ in range(need):
            page = self.pool.take()
            assert page is not None
            sequence.pages.append(page)
        self.running.append(sequence)
        return True

    def _extend(self, sequence: Answer, tokens: int, shares: dict[Answer, Share]) -> bool:
        """Pages for `tokens` tokens, taken from the youngest sequence where none are left; False where that is this one itself."""
        while len(sequence.pages) * PAGE < tokens:
            page = self.pool.take()
            if page is not None:
                sequence.pages.append(page)
                continue
            youngest = self.running[-1]
            self._drop(youngest)
            shares.pop(youngest, None)
            self.waiting.appendleft(youngest)
            self.preemptions += 1
            if youngest is sequence:
                return False
        return True

    def _fork(self, share: Share, room: int) -> int:
        """The other answers to a prompt whose last token is in this step: at most `room`, and as there are pages; the rest waits
        for its turn and finds the prompt in the cache. Returns how many there are."""
        leader, followers = share.sequence, share.sequence.request.followers
        full, partial = divmod(len(leader.ids), PAGE)
        while followers and len(share.forks) < room and not leader.row.tokens:
            page = self.pool.take() if partial else None
            if partial and page is None:
                break
            fork = followers.pop(0)
            fork.pages = [self.pool.hold(shared) for shared in leader.pages[:full]] + ([] if page is None else [page])
            share.forks.append(fork)
        self.waiting.extendleft(reversed(followers))
        followers.clear()
        return len(share.forks)

    def _unfork(self, share: Share) -> None:
        for fork in share.forks:
            self.pool.release(fork.pages)
            fork.pages = []
        self.waiting.extendleft(reversed(share.forks))

    def _propose(self, shares: list[Share]) -> None:
        assert self.speculation is not None
        able = [share for share in shares if not share.sequence.row.stateful]
        for share, ahead in zip(able, self.speculation.propose([share.sequence for share in able]), strict=True):
            row = share.sequence.row
            most = min(len(ahead), row.limit - len(row.tokens) - 1)  # the last token is not a proposal: it is always drawn
            share.ahead = ahead[: self._room(share.sequence, 1 + most) - 1] if most > 0 else []

    def _room(self, sequence: Answer, tokens: int) -> int:
        """Takes pages for so many tokens more, without taking any from others; how many of them there is room for."""
        while len(sequence.pages) * PAGE < sequence.computed + tokens:
            page = self.pool.take()
            if page is None:
                break
            sequence.pages.append(page)
        return min(tokens, len(sequence.pages) * PAGE - sequence.computed)

    def _steps(self, shares: list[Share]) -> int:
        """How many tokens may be drawn in one call: nothing that a row asks for may change on the way."""
        most = 1 if self._pace == 0 else max(1, min(MOST_STEPS, int(CALL / self._pace)))  # a first step shows how long one is
        if self.speculation is not None:
            most = min(most, self.speculation.patience())
        for share in shares:
            row = share.sequence.row
            most = min(most, row.limit - len(row.tokens), row.steady)
        for share in shares:
            most = min(most, self._room(share.sequence, most))
        return most

    # -------------------------------------------------------------------------------------------------------------- results

    def _measure(self, shares: list[Share], results: list[Drawn], seconds: float) -> None:
        each = seconds / len(results)
        ahead = [len(share.ahead) for share in shares]
        if not any(ahead):
            self._pace = each if self._pace == 0 else 0.8 * self._pace + 0.2 * each
        if self.speculation is not None:
            kept = [agreeing(share.ahead, results[0].tokens[i:]) for share, i in zip(shares, places_of(shares), strict=True)]
            self.speculation.observe([share.sequence for share in shares], ahead, kept, seconds, len(results))

    def _hand_out(self, shares: list[Share], drawn: Drawn) -> None:
        for share, place in zip(shares, places_of(shares), strict=True):
            sequence = share.sequence
            if sequence.row.finish_reason is not None:
                continue  # ended by its text in an earlier step of this call
            sequence.computed += share.count
            if share.draws:
                for i in range(1 + agreeing(share.ahead, drawn.tokens[place:])):
                    sequence.computed += i > 0  # the proposal before this token is now part of the answer
                    self._give(sequence, drawn, place + i)
                    if sequence.row.finish_reason is not None:
                        break
            self._publish(sequence)
            self._start(share, drawn, place + 1)

    def _give(self, sequence: Answer, drawn: Drawn, i: int) -> None:
        before = len(sequence.row.tokens)
        drawn.give(i, sequence.row)
        sequence.ids += sequence.row.tokens[before:]
        self._tell(sequence.request, sequence.row)

    def _start(self, share: Share, drawn: Drawn, place: int) -> None:
        """The forks' first tokens, and their copies of the prompt's last page."""
        leader, copies = share.sequence, []
        for i, fork in enumerate(share.forks):
            fork.computed, fork.keys = len(fork.ids), list(leader.keys)
            fork.published = fork.computed // PAGE
            if fork.computed % PAGE:
                copies.append((leader.pages[fork.published], fork.pages[fork.published]))
            self.running.append(fork)
            self._give(fork, drawn, place + i)
        if copies:
            self.runner.copy_pages(copies)

    def _publish(self, sequence: Answer) -> None:
        full = sequence.computed // PAGE
        if full > sequence.published and sequence.row.finish_reason != "error":
            keys = keys_of(sequence.ids, sequence.keys, full)
            for i in range(sequence.published, full):
                self.pool.publish(sequence.pages[i], keys[i])
            sequence.published = full

    def _tell(self, request: Request, row: Row) -> None:
        if request.on_token is not None:
            request.on_token(row)

    # -------------------------------------------------------------------------------------------------------------- scoring

    def score(self, tokens: Sequence[int], targets: Sequence[int]) -> list[float]:
        """log P of each of `targets` behind the last len(targets) of `tokens`, at most a context of them. For when nothing runs.

        Raises gptfast.Error where the pages do not suffice.
        """
        with self._stepping:
            need = -(-len(tokens) // PAGE)
            if self.pool.available < need:
                raise Error(f"a text of {len(tokens):,} tokens needs {need} pages, {self.pool.available} are free")
            pages = [page for _ in range(need) if (page := self.pool.take()) is not None]
            result: list[float] = []
            first = len(tokens) - len(targets)  # of the scored positions
            try:
                for begin in range(0, len(tokens), self.chunk):
                    part = list(tokens[begin : begin + self.chunk])
                    count = max(0, begin + len(part) - max(begin, first))
                    wanted = list(targets[len(result) : len(result) + count])
                    drawn = self.runner.step(Batch([part], [begin], [pages], [count], [None], [wanted]))
                    result += drawn.logprobs
            finally:
                self.pool.release(pages)
            return result

    def beams(self, rows: Sequence[Row], settings: BeamSettings) -> list[list[Hypothesis]]:
        """The best continuations of each row's prompt, as beam_search() gives them, in one call. For when nothing runs.

        Raises gptfast.Error where the pages do not suffice.
        """
        with self._stepping:
            source = PagedBeams(self.runner, self.pool, self.chunk)
            try:
                return beam_search(source, rows, settings)
            finally:
                source.close()

    def exclusive(self) -> threading.Lock:
        """Held while the runner and the pages are somebody's who is no step."""
        return self._stepping

    def check(self) -> None:
        """Raises AssertionError where pages are not those of the running sequences, or two sequences write one page."""
        self.pool.check(sequence.pages for sequence in self.running)
        assert len(self.running) <= self.sequences and not any(sequence.pages for sequence in self.waiting)
        written = [page for s in self.running for page in s.pages[s.computed // PAGE :]]
        assert len(written) == len(set(written)), "two sequences write one page"
        for s in self.running:
            assert s.ids == [*s.row.prompt, *s.row.tokens] and 0 <= s.computed <= min(len(s.ids), PAGE * len(s.pages))
            assert not set(s.pages[s.computed // PAGE :]) & {p for o in self.running if o is not s for p in o.pages}
