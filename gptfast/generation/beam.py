"""Beam search with transformers' semantics (its vectorised search since 4.50), for several prompts at once.

A hypothesis is scored by the sum of its log-probabilities divided by (number of its tokens, end included) ** length_penalty. Each
step looks at the (1 + number of end ids, at least 2) x num_beams best continuations of an item; those that end, and are among the
first num_beams of them, become hypotheses; the best num_beams others run on. `early_stopping`: True stops at num_beams
hypotheses; False when the best running score, divided for its length now, is no better than the worst hypothesis; "never" as
False, but divided for the greatest possible length where length_penalty > 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gptfast.generation.loop import evaluating, prefill
from gptfast.generation.rows import Constraints, Row
from gptfast.ops.sample import penalised

if TYPE_CHECKING:
    from gptfast.model import GPT2LMHeadModel

NEVER = -1e9  # the score of a beam that does not exist


@dataclass
class Hypothesis:
    """A finished continuation: its score, its ids with the end, and why it ended ("stop" or "length")."""

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
    """num_beams, length_penalty and early_stopping (True, False or "never") as transformers names them."""

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: bool | str = False


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
def beam_search(
    model: GPT2LMHeadModel, rows: Sequence[Row], settings: BeamSettings, embeds: Sequence[Tensor] | None = None
) -> list[list[Hypothesis]]:
    """The num_beams best continuations of each row's prompt, best first. Each row gives its prompt, limit, ends and penalties."""
    items = [_Item(row, [_branch(row, [])] * settings.num_beams, [0.0] + [NEVER] * (settings.num_beams - 1)) for row in rows]
    with evaluating(model):
        logits, cache = prefill(model, [row.prompt for row in rows], embeds)
        parents = [i for i in range(len(rows)) for _ in range(settings.num_beams)]
        logits = logits[torch.tensor(parents, device=logits.device)]
        cache.reorder_(parents)
        alive = items
        while True:
            best, index = _continuations(alive, logits, settings)
            parents = []
            for n, item in enumerate(alive):
                origins = _advance(item, best[n], index[n], logits.shape[1], settings)
                if not item.done:
                    parents += [n * settings.num_beams + origin for origin in origins]
            alive = [item for item in alive if not item.done]
            if not alive:
                return [item.hypotheses for item in items]
            cache.reorder_(parents)
            tokens = torch.tensor([[row.tokens[-1]] for item in alive for row in item.rows], device=logits.device)
            logits = model(tokens, past_key_values=cache, use_cache=True).logits[:, -1]


def _continuations(items: list[_Item], logits: Tensor, settings: BeamSettings) -> tuple[Tensor, Tensor]:
    """Scores and flat indices [items, K] of the best continuations, best first."""
    constraints = Constraints([row for item in items for row in item.rows], logits.shape[1], logits.device)
    logprobs = penalised(torch.log_softmax(logits.float(), dim=1), *constraints.now())
    scores = torch.tensor([score for item in items for score in item.scores], device=logits.device)
    total = (logprobs + scores[:, None]).view(len(items), -1)
    ends = max(len(item.row.stop_ids) for item in items)
    best, index = total.topk(min(max(2, 1 + ends) * settings.num_beams, total.shape[1]), dim=1)
    return best, index
