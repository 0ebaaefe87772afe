"""Beam search with transformers' semantics (its vectorised search since 4.50), for several prompts at once.

A hypothesis is scored by the sum of its log-probabilities divided by (number of its tokens, end included) ** length_penalty. Each
step looks at the (1 + number of end ids, at least 2) x num_beams best continuations of an item; those that end, and are among the
first num_beams of them, become hypotheses; the best num_beams others run on. `early_stopping`: True stops at num_beams
hypotheses; False when the best running score, divided for its length now, is no better than the worst hypothesis; "never" as
False, but divided for the greatest possible length where length_penalty > 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from gptfast.errors import Error
from gptfast.generation.loop import prefill
from gptfast.generation.rows import Constraints, Row
from gptfast.ops.sample import penalised

if TYPE_CHECKING:
    from gptfast.model import GPT2LMHeadModel

NEVER = -1e9  # the score of a beam that does not exist


@dataclass
class Hypothesis:
    """A finished continuation: its score, its ids with the end, and why it ended ("stop" or "length"; "error" where the logits held
    NaN, for its whole prompt)."""

    score: float
    tokens: list[int]
    finish_reason: str


@dataclass
class _Item:
    """One prompt's search: `rows` are its running beams, which share the prompt's Row as a template."""

    row: Row
    rows: list[Row]
    scores: list[float]
    done: bool = False
    hypotheses: list[Hypothesis] = field(default_factory=list)


@dataclass(frozen=True)
class BeamSettings:
    """num_beams, length_penalty and early_stopping (True, False or "never") as transformers names them. Raises gptfast.Error for
    what is none of these."""

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: bool | str = False

    def __post_init__(self) -> None:
        beams, penalty = self.num_beams, self.length_penalty
        if isinstance(beams, bool) or not isinstance(beams, int) or beams < 1:
            raise Error(f"num_beams is {beams!r}; allowed: a whole number of at least 1")
        if isinstance(penalty, bool) or not isinstance(penalty, (int, float)) or not abs(penalty) < float("inf"):
            raise Error(f"length_penalty is {penalty!r}; allowed: a finite number")
        if self.early_stopping not in (True, False, "never"):
            raise Error(f"early_stopping is {self.early_stopping!r}; allowed: True, False, 'never'")

    def check(self, rows: Sequence[Row], returned: int) -> None:
        """Raises gptfast.Error for rows that beams cannot continue, and where more are to be returned than there are beams."""
        if returned > self.num_beams:
            raise Error(f"{returned} answers from num_beams={self.num_beams}; allowed: 1 to num_beams")
        for row in rows:
            if row.params.stop:
                raise Error(f"stop texts with num_beams={self.num_beams} are not supported; use stop ids or one beam")
            if row.limit < 1:
                raise Error(f"a prompt of {row.start:,} tokens and {row.limit} new ones; beam search needs room for one more")


class Source(Protocol):
    """What beams are continued by; it keeps their keys and values."""

    def start(self, rows: Sequence[Row], beams: int) -> Tensor:
        """Runs the rows' prompts: logits [rows * beams, V] behind them, each prompt's `beams` times."""

    def advance(self, parents: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Beam i goes on from what was beam parents[i], with tokens[i]: its logits [beams, V]."""


class ModelBeams:
    """Beams continued by model.py; `embeds` in place of prompts' tokens."""

    def __init__(self, model: GPT2LMHeadModel, embeds: Sequence[Tensor] | None = None) -> None:
        self.model, self.embeds = model, embeds
        self._cache: Any = None

    def start(self, rows: Sequence[Row], beams: int) -> Tensor:
        """One pass over all prompts."""
        logits, self._cache = prefill(self.model, [row.prompt for row in rows], self.embeds)
        parents = [i for i in range(len(rows)) for _ in range(beams)]
        self._cache.reorder_(parents)
        return logits[torch.tensor(parents, device=logits.device)]

    def advance(self, parents: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """One pass over the new tokens."""
        self._cache.reorder_(parents)
        ids = torch.tensor(tokens, device=self.model.device)[:, None]
        logits: Tensor = self.model(ids, past_key_values=self._cache, use_cache=True).logits[:, -1]
        return logits


def _branch(row: Row, tokens: list[int]) -> Row:
    return Row(row.prompt, row.params, row.seed, row.limit, row.stop_ids, start=row.start, bad_words=row.bad_words, tokens=tokens)


def _advance(item: _Item, best: Tensor, index: Tensor, vocab: int, settings: BeamSettings) -> list[int]:
    """Takes an item's best continuations in falling order (flat index: beam * vocab + id); returns each new beam's parent."""
    beams, length = settings.num_beams, len(item.rows[0].tokens) + 1
    running: list[tuple[float, int, int]] = []
    ending: list[tuple[float, int, int]] = []
    full = len(item.hypotheses) == beams and settings.early_stopping is True
    for rank, (score, flat) in enumerate(zip(best.tolist(), index.tolist(), strict=True)):
        parent, token = divmod(flat, vocab)
        if token not in item.row.stop_ids and length < item.row.limit:
            running.append((score, parent, token))
            continue
        ending.append((score + NEVER, parent, token))
        if rank < beams and not full:
            reason = "stop" if token in item.row.stop_ids else "length"
            tokens = [*item.rows[parent].tokens, token]
            item.hypotheses.append(Hypothesis(score / length**settings.length_penalty, tokens, reason))
    item.hypotheses = sorted(item.hypotheses, key=lambda h: -h.score)[:beams]  # stable: of equal scores the earlier one
    chosen = [*running, *ending][:beams]
    item.rows = [_branch(item.row, [*item.rows[parent].tokens, token]) for _, parent, token in chosen]
    item.scores = [score for score, _, _ in chosen]
    item.done = not running or _finished(item, length, settings)
    return [parent for _, parent, _ in chosen]


def _finished(item: _Item, length: int, settings: BeamSettings) -> bool:
    if len(item.hypotheses) < settings.num_beams:
        return False
    if settings.early_stopping is True:
        return True
    longest = settings.early_stopping == "never" and settings.length_penalty > 0
    possible = item.scores[0] / (item.row.limit if longest else length) ** settings.length_penalty
    return not possible > min(h.score for h in item.hypotheses)


@torch.no_grad()
def beam_search(source: Source, rows: Sequence[Row], settings: BeamSettings) -> list[list[Hypothesis]]:
    """The num_beams best continuations of each row's prompt, best first. Each row gives its prompt, limit, ends and penalties."""
    items = [_Item(row, [_branch(row, [])] * settings.num_beams, [0.0] + [NEVER] * (settings.num_beams - 1)) for row in rows]
    logits = source.start(rows, settings.num_beams)
    alive = items
    while True:
        best, index = _continuations(alive, logits, settings)
        parents = []
        failed = logits.reshape(len(alive), -1).isnan().any(1).tolist()
        for n, item in enumerate(alive):
            if failed[n]:
                item.hypotheses = [Hypothesis(-math.inf, item.rows[0].tokens, "error")] * settings.num_beams
                item.done = True
                continue
            origins = _advance(item, best[n], index[n], logits.shape[1], settings)
            if not item.done:
                parents += [n * settings.num_beams + origin for origin in origins]
        alive = [item for item in alive if not item.done]
        if not alive:
            return [item.hypotheses for item in items]
        logits = source.advance(parents, [row.tokens[-1] for item in alive for row in item.rows])


def _continuations(items: list[_Item], logits: Tensor, settings: BeamSettings) -> tuple[Tensor, Tensor]:
    """Scores and flat indices [items, K] of the best continuations, best first."""
    constraints = Constraints([row for item in items for row in item.rows], logits.shape[1], logits.device)
    logprobs = penalised(torch.log_softmax(logits.float(), dim=1), *constraints.now())
    scores = torch.tensor([score for item in items for score in item.scores], device=logits.device)
    total = (logprobs + scores[:, None]).view(len(items), -1)
    ends = max(len(item.row.stop_ids) for item in items)
    best, index = total.topk(min(max(2, 1 + ends) * settings.num_beams, total.shape[1]), dim=1)
    return best, index
