"""Speculation: several tokens are proposed, one step of the model checks them all, and those that it would have drawn are kept.

A draw is a function of the logits, the seed and the position (the Gumbel coupling), so a proposal is kept exactly if it is the
token of the plain run, and the tokens are those of the plain run. A draft model that draws with the same noise proposes the same
token wherever its logits are near enough.

Whether it pays depends on the text and on what a step with more rows costs. `Speculation` measures both, and spends no more time on
trials than 0.5 % of the whole plus what trials have saved: where it does not pay, it is off but for rare trials.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from gptfast.cache import PAGE
from gptfast.generation.pages import PagePool
from gptfast.generation.rows import Row
from gptfast.generation.runner import Batch, Runner

if TYPE_CHECKING:
    from gptfast.generation.request import Answer

ALLOWANCE = 0.005  # part of the plain time that trials may lose
CREDIT = 1.0  # steps that the first trials may lose before any of it was earned
SAVINGS = 4.0  # steps of what was gained that later trials may lose
PATIENCE = 4  # tokens drawn in one call where nothing was found to propose, though it would pay


def agreeing(proposed: Sequence[int], drawn: Sequence[int]) -> int:
    """How many of the proposed tokens were drawn, up to the first that was not."""
    count = 0
    while count < min(len(proposed), len(drawn)) and proposed[count] == drawn[count]:
        count += 1
    return count


class Proposer(Protocol):
    """Where proposals come from. guess: the part of them that is right, as long as nothing is known."""

    guess: float

    def propose(self, answers: Sequence[Answer], counts: Sequence[int]) -> list[list[int]]:
        """At most counts[i] tokens that may follow answers[i].ids."""

    def keep(self, answers: Sequence[Answer]) -> None:
        """Forgets all answers but these."""

    def close(self) -> None:
        """Lets go of what it holds."""


@dataclass
class _Index:
    """Where each run of 3 and of 2 ids ended last; `seen` tokens are in it."""

    ends: dict[tuple[int, ...], int] = field(default_factory=dict)
    seen: int = 0


class PromptLookup:
    """Proposes what followed the last earlier occurrence of the last 3 ids, else of the last 2. O(1) a token."""

    guess = 0.5

    def __init__(self) -> None:
        self._indices: dict[Answer, _Index] = {}

    def propose(self, answers: Sequence[Answer], counts: Sequence[int]) -> list[list[int]]:
        """The tokens that followed; where these reach the end of the text they repeat, as the text would."""
        return [self._one(answer, count) if count else [] for answer, count in zip(answers, counts, strict=True)]

    def _one(self, answer: Answer, count: int) -> list[int]:
        index, ids = self._indices.setdefault(answer, _Index()), answer.ids
        for end in range(index.seen + 1, len(ids)):  # the run that ends the text is what is looked up
            for size in (2, 3):
                if end >= size:
                    index.ends[tuple(ids[end - size : end])] = end
        index.seen = max(index.seen, len(ids) - 1)
        for size in (3, 2):
            found = index.ends.get(tuple(ids[-size:])) if len(ids) >= size else None
            if found is not None:
                period = len(ids) - found
                return [ids[found + i % period] for i in range(count)]
        return []

    def keep(self, answers: Sequence[Answer]) -> None:
        """Forgets the index of every other answer."""
        alive = set(answers)
        self._indices = {answer: index for answer, index in self._indices.items() if answer in alive}

    def close(self) -> None:
        """Nothing is held."""


@dataclass
class _Draft:
    """What the draft model has computed of an answer: its first `base` tokens, and `guesses` behind them."""

    pages: list[int] = field(default_factory=list)
    base: int = 0
    guesses: list[int] = field(default_factory=list)


class DraftModel:
    """A smaller model with the same vocabulary draws the proposals, with the answer's own settings and noise."""

    guess = 0.7

    def __init__(self, runner: Runner, chunk: int = 512) -> None:
        self.runner, self.chunk = runner, chunk
        self._pool = PagePool(runner.pages, idle=0)
        self._drafts: dict[Answer, _Draft] = {}

    def propose(self, answers: Sequence[Answer], counts: Sequence[int]) -> list[list[int]]:
        """Draws as many tokens for each as for the one that wants most; none for an answer that the draft has no room for."""
        result: list[list[int]] = [[] for _ in answers]
        most = max(counts, default=0)
        able = [i for i, count in enumerate(counts) if count and self._reserve(answers[i], most)]
        if not able:
            return result
        rows = [_draft_row(answers[i]) for i in able]
        try:
            self._draw(answers, able, rows, most, result)
        except BaseException:
            for i in able:  # what was computed of these is not known: all of it is computed again
                self._drafts[answers[i]].base = 0
            raise
        for i in able:
            draft = self._drafts[answers[i]]
            draft.base, draft.guesses = len(answers[i].ids), result[i][:-1]
        return [ids[:count] for ids, count in zip(result, counts, strict=True)]

    def _draw(self, answers: Sequence[Answer], able: list[int], rows: list[Row], most: int, result: list[list[int]]) -> None:
        """Fills result[i] of those that are able with `most` tokens."""
        self._catch_up([answers[i] for i in able], rows, able, result)
        while (steps := most - max(len(result[i]) for i in able)) > 0:
            batch = Batch()
            for i, row in zip(able, rows, strict=True):
                batch.add([result[i][-1]], len(answers[i].ids) + len(result[i]) - 1, self._drafts[answers[i]].pages, 1, row)
            for drawn in self.runner.decode(batch, steps):
                for n, i in enumerate(able):
                    result[i].append(max(drawn.tokens[n], 0))  # of a failed draw any id will do: it is only a proposal
                    rows[n].tokens.append(result[i][-1])

    def _reserve(self, answer: Answer, count: int) -> bool:
        """Pages for the answer and `count` tokens more, and what is right of what was computed before."""
        draft = self._drafts.setdefault(answer, _Draft())
        draft.base += agreeing(draft.guesses, answer.ids[draft.base :])
        draft.guesses = []
        length = len(answer.ids) + count
        if length > self.runner.context:
            return False
        while len(draft.pages) * PAGE < length:
            page = self._pool.take()
            if page is None:
                return False
            draft.pages.append(page)
        return True

    def _catch_up(self, answers: list[Answer], rows: list[Row], places: list[int], result: list[list[int]]) -> None:
        """Computes what the draft has not seen, in chunks, and draws the first token of each."""
        waiting = dict(zip(places, zip(answers, rows, strict=True), strict=True))
        while waiting:
            batch, budget, ended = Batch(), self.chunk, []
            for i, (answer, row) in waiting.items():
                draft = self._drafts[answer]
                new = answer.ids[draft.base : draft.base + budget]
                if not new:
                    break
                last = draft.base + len(new) == len(answer.ids)
                batch.add(new, draft.base, draft.pages, int(last), row if last else None)
                draft.base, budget = draft.base + len(new), budget - len(new)
                if last:
                    ended.append((i, row))
            drawn = self.runner.step(batch)
            for n, (i, row) in enumerate(ended):
                result[i].append(max(drawn.tokens[n], 0))
                row.tokens.append(result[i][0])
                del waiting[i]

    def keep(self, answers: Sequence[Answer]) -> None:
        """Releases the pages of every other answer."""
        for answer in self._drafts.keys() - set(answers):
            self._pool.release(self._drafts.pop(answer).pages)

    def close(self) -> None:
        """Lets go of the draft model."""
        self.runner.close()


def _draft_row(answer: Answer) -> Row:
    row = answer.row
    params = dataclasses.replace(row.params, min_tokens=0, logprobs=None, stop=())
    return Row(answer.ids, params, row.seed, len(answer.ids), frozenset(), row.choice, len(answer.ids))


class Speculation:
    """Decides how many tokens are proposed, from what they cost and what became of them.

    `most`: proposals for an answer in a step; `adaptive` False proposes that many always.
    """

    def __init__(self, proposer: Proposer, most: int = 8, adaptive: bool = True) -> None:
        self.proposer, self.most, self.adaptive = proposer, most, adaptive
        self.proposed = self.accepted = 0
        self._plain: dict[int, float] = {}  # seconds of a step without proposals, by the number of its sequences
        self._row = 0.0  # seconds that one more row costs
        self._rates: dict[Answer, float] = {}
        self._rate = proposer.guess  # of answers that ended: where a new one starts
        self._balance: float | None = None  # seconds that trials may lose now
        self._spent = 0.0  # seconds for the proposals of this step
        self._wanted = False

    def propose(self, answers: Sequence[Answer]) -> list[list[int]]:
        """Tokens to check behind each answer, [] for those that draw one token."""
        counts = [self._count(answer, len(answers)) for answer in answers]
        self._wanted = any(counts)
        if not self._wanted:
            return [[] for _ in answers]
        start = time.perf_counter()
        proposals = self.proposer.propose(answers, counts)
        self._spent = time.perf_counter() - start
        return proposals

    def _count(self, answer: Answer, batch: int) -> int:
        if not self.adaptive:
            return self.most
        plain = self._plain.get(batch.bit_length())
        if plain is None or self._balance is None or self._balance < 0:
            return 0
        worth, rate, count = plain / batch, self._rates.get(answer, self._rate), 0
        while count < self.most and rate ** (count + 1) * worth > (self._row or 0.1 * worth):
            count += 1
        return count if count else 2 * (self._balance >= CREDIT * plain)  # a trial: the text may have changed

    def patience(self) -> int:
        """How many tokens may be drawn before the next look at proposals."""
        if not self.adaptive:
            return 1
        return PATIENCE if self._wanted or not self._plain else 1 << 30

    def observe(
        self, answers: Sequence[Answer], proposed: Sequence[int], accepted: Sequence[int], seconds: float, steps: int
    ) -> None:
        """What a call of `steps` steps took, and how many proposals of each answer were right."""
        spent, self._spent = self._spent, 0.0
        size, extra = len(answers).bit_length(), sum(proposed)
        if extra == 0:
            each = seconds / steps
            plain = self._plain[size] = each if size not in self._plain else 0.8 * self._plain[size] + 0.2 * each
            self._balance = CREDIT * plain if self._balance is None else self._balance + ALLOWANCE * seconds - spent
        elif size in self._plain:
            plain = self._plain[size]
            worth = plain * (1 + sum(accepted) / len(answers))
            row = max(seconds + spent - plain, 0.0) / extra
            self._row = row if self._row == 0 else 0.8 * self._row + 0.2 * row
            self._balance = (self._balance or 0.0) + worth * (1 + ALLOWANCE) - seconds - spent
        else:
            plain = 0.0
        self._balance = min(self._balance or 0.0, SAVINGS * plain) if plain else self._balance
        for answer, count, right in zip(answers, proposed, accepted, strict=True):
            if count:
                rate = self._rates.get(answer, self._rate)
                self._rates[answer] = 0.8 * rate + 0.2 * right / min(right + 1, count)
        self.proposed += extra
        self.accepted += sum(accepted)

    def keep(self, answers: Sequence[Answer]) -> None:
        """Forgets all answers but these."""
        gone = self._rates.keys() - set(answers)
        for answer in gone:
            self._rate = 0.8 * self._rate + 0.2 * self._rates.pop(answer)
        self.proposer.keep(answers)

    def close(self) -> None:
        """Lets go of what the proposer holds."""
        self.proposer.close()
