"""One answer in the making, and what the answers of a batch ask of `ops.sample` at the next token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gptfast import ops
from gptfast.generation.parameters import SamplingParams
from gptfast.generation.stream import TextStream
from gptfast.ops.sample import Sampled, pack_bits

LLAMA_WINDOW = 64  # llama.cpp's penalties look at the last 64 tokens of prompt and output


@dataclass
class Row:
    """One answer: what was asked, and what has been made of it so far.

    finish_reason: "stop" (a stop token or text, or nothing was allowed), "length", "cancelled", "error" with its line in `error`.
    """

    prompt: Sequence[int]  # empty where the prompt was given as vectors
    params: SamplingParams
    seed: int  # as int64
    limit: int  # most tokens of the answer
    stop_ids: frozenset[int]
    choice: int = 0
    start: int = 0  # tokens of the prompt
    bad_words: Sequence[Sequence[int]] = ()  # sequences of several ids that must not be completed
    stream: TextStream | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    text: str = ""
    piece: str = ""  # the text that the last step released
    drew: bool = False  # whether the last step drew a token
    finish_reason: str | None = None
    error: str | None = None

    def push(self, token: int, status: int, logprob: float, top: dict[int, float]) -> None:
        """Takes one drawn token and decides whether the answer ends with it."""
        self.piece, self.drew = "", status == 0
        if not self.drew:
            self.finish_reason = "error" if status == 1 else "stop"
            self.error = f"numerical error: the logits of token {len(self.tokens)} hold NaN" if status == 1 else None
            return self._finish()
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self.params.logprobs:
            self.top_logprobs.append(top)
        if token in self.stop_ids:
            self.finish_reason = "stop"
        elif self.stream is not None:
            self.piece = self.stream.push(token)
            self.finish_reason = "stop" if self.stream.stopped else None
        if self.finish_reason is None and len(self.tokens) >= self.limit:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            self._finish()
        else:
            self.text += self.piece

    def cancel(self) -> None:
        """Ends the answer where it is: finish_reason "cancelled", and the text that was held back is released."""
        self.piece, self.drew, self.finish_reason = "", False, "cancelled"
        self._finish()

    def _finish(self) -> None:
        if self.stream is not None:
            self.piece += self.stream.finish()
        self.text += self.piece

    @property
    def stateful(self) -> bool:
        """Whether what may be drawn depends on what was drawn: then tokens cannot be drawn ahead (speculation)."""
        p = self.params
        penalised = p.repetition_penalty != 1 or p.frequency_penalty != 0 or p.presence_penalty != 0
        return penalised or bool(self.bad_words) or p.order == "llama.cpp" or len(self.tokens) < p.min_tokens

    @property
    def steady(self) -> int:
        """How many tokens can be drawn in a row with this row's masks as they are now; penalties are counted by the sampler."""
        p = self.params
        windowed = p.order == "llama.cpp" and (p.repetition_penalty != 1 or p.frequency_penalty != 0 or p.presence_penalty != 0)
        left = p.min_tokens - len(self.tokens)
        return 1 if self.bad_words or windowed else left if left > 0 else self.limit

    def banned_next(self, vocab: int) -> set[int]:
        """Ids that may not be drawn next because of where the answer stands: ends that come too early, completed bad words."""
        banned = {i for i in self.stop_ids if 0 <= i < vocab} if len(self.tokens) < self.params.min_tokens else set()
        for word in self.bad_words:
            tail = len(word) - 1
            if tail <= self.start + len(self.tokens) and [*self.prompt, *self.tokens[-tail:]][-tail:] == list(word[:-1]):
                banned.add(word[-1])
        return banned


def int64(seed: int) -> int:
    """A seed of the int64 or uint64 range as the int64 with the same bits."""
    return (seed + 2**63) % 2**64 - 2**63


class Constraints:
    """Penalties, bias and masks of some rows, as tensors for `ops.sample`; what no row asks for is None."""

    def __init__(self, rows: Sequence[Row], vocab: int, device: torch.device) -> None:
        self.rows, self.vocab, self.device = rows, vocab, device
        params = [row.params for row in rows]
        self.windowed = params[0].order == "llama.cpp"
        self.repetition = self._numbers([p.repetition_penalty for p in params], 1.0)
        self.frequency = self._numbers([p.frequency_penalty for p in params], 0.0)
        self.presence = self._numbers([p.presence_penalty for p in params], 0.0)
        self.penalised = any(t is not None for t in (self.repetition, self.frequency, self.presence))
        self.bias = self._bias() if any(p.logit_bias for p in params) else None
        self.allowed = self._allowed() if any(p.allowed_tokens is not None or p.banned_tokens for p in params) else None
        self.mask = None if self.allowed is None else pack_bits(self.allowed)
        self.prompt = None if self.repetition is None or self.windowed else pack_bits(self._count([r.prompt for r in rows]) > 0)
        self.counts = self._count([row.tokens for row in rows]) if self.penalised and not self.windowed else None

    def _numbers(self, values: list[float], off: float) -> Tensor | None:
        return None if all(v == off for v in values) else torch.tensor(values, dtype=torch.float32, device=self.device)

    def _bias(self) -> Tensor:
        bias = torch.zeros(len(self.rows), self.vocab)
        for i, row in enumerate(self.rows):
            for token, value in (row.params.logit_bias or {}).items():
                bias[i, token] = value
        return bias.to(self.device)

    def _allowed(self) -> Tensor:
        allowed = torch.ones(len(self.rows), self.vocab, dtype=torch.bool)
        for i, row in enumerate(self.rows):
            if row.params.allowed_tokens is not None:
                allowed[i] = False
                allowed[i, list(row.params.allowed_tokens)] = True
            allowed[i, list(row.params.banned_tokens)] = False
        return allowed.to(self.device)

    def _count(self, texts: Sequence[Sequence[int]]) -> Tensor:
        counts = torch.stack([torch.bincount(torch.tensor(list(ids), dtype=torch.int64), minlength=self.vocab) for ids in texts])
        return counts.to(self.device, torch.int32)

    def now(self) -> tuple[Tensor | None, ...]:
        """repetition, frequency, presence, bias, mask, prompt, counts for the token that is drawn next."""
        mask, counts = self.mask, self.counts
        banned = [row.banned_next(self.vocab) if row.bad_words or row.params.min_tokens else set() for row in self.rows]
        if any(banned):
            allowed = torch.ones(len(self.rows), self.vocab, dtype=torch.bool) if self.allowed is None else self.allowed.clone()
            for i, ids in enumerate(banned):
                allowed[i, list(ids)] = False
            mask = pack_bits(allowed.to(self.device))
        if self.penalised and self.windowed:
            counts = self._count([[*row.prompt[-LLAMA_WINDOW:], *row.tokens[-LLAMA_WINDOW:]][-LLAMA_WINDOW:] for row in self.rows])
        return self.repetition, self.frequency, self.presence, self.bias, mask, self.prompt, counts


class _Group:
    """Rows that share an order of filters and a kind of log-probabilities: one call of `ops.sample`."""

    def __init__(self, index: list[int], rows: list[Row], places: list[int], vocab: int, device: torch.device) -> None:
        params = [row.params for row in rows]
        self.rows, self.index = rows, torch.tensor(index, device=device)
        self.constraints = Constraints(rows, vocab, device)
        self.order, self.mode = params[0].order, params[0].logprobs_mode
        self.top_n = min(max(p.logprobs or 0 for p in params), vocab)

        def tensor(values: list[Any], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        self.temperature = tensor([p.temperature for p in params], torch.float32)
        largest = [min(max(p.top_k, 0), vocab) for p in params]
        self.top_k = tensor(largest, torch.int64) if any(largest) else None
        self.top_p = tensor([p.top_p for p in params], torch.float32) if any(p.top_p < 1 for p in params) else None
        self.min_p = tensor([p.min_p for p in params], torch.float32) if any(p.min_p > 0 for p in params) else None
        self.typical_p = tensor([p.typical_p for p in params], torch.float32) if any(p.typical_p < 1 for p in params) else None
        self.seed = tensor([row.seed for row in rows], torch.int64)
        self.choice = tensor([row.choice for row in rows], torch.int64)
        self.position = tensor(places, torch.int64)

    def draw(self, logits: Tensor) -> Sampled:
        result = ops.sample(
            logits, self.temperature, self.top_k, self.top_p, self.min_p, self.typical_p, *self.constraints.now(), seed=self.seed,
            position=self.position, choice=self.choice, top_n=self.top_n, order=self.order, logprobs_mode=self.mode,
        )
        self.position += 1
        return result


@dataclass
class Drawn:
    """What one step drew, an entry for each drawn row: ids (-1 where the row failed), statuses of `ops.sample`, log-probabilities,
    and the largest ones with their ids (as many as any row asked for; each row takes its own number)."""

    tokens: list[int] = field(default_factory=list)
    status: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_ids: list[list[int]] = field(default_factory=list)
    top_logprobs: list[list[float]] = field(default_factory=list)

    def give(self, i: int, row: Row) -> None:
        """Pushes the i-th entry to its row."""
        count = row.params.logprobs or 0
        top = dict(zip(self.top_ids[i][:count], self.top_logprobs[i][:count], strict=True)) if count else {}
        row.push(self.tokens[i], self.status[i], self.logprobs[i], top)


class Sampler:
    """Draws the next token of every row of a batch; made anew when rows leave it.

    `ahead`: how many tokens each draw is ahead of its row (default 0): a row may stand in the batch several times, for positions
    that follow each other, where nothing that it asks for depends on what it drew (Row.stateful).
    """

    def __init__(self, rows: Sequence[Row], vocab: int, device: torch.device, ahead: Sequence[int] | None = None) -> None:
        kinds: dict[tuple[str, str], list[int]] = {}
        for i, row in enumerate(rows):
            kinds.setdefault((row.params.order, row.params.logprobs_mode), []).append(i)
        places = [row.start + len(row.tokens) + j for row, j in zip(rows, ahead or [0] * len(rows), strict=True)]
        self.groups = [_Group(i, [rows[n] for n in i], [places[n] for n in i], vocab, device) for i in kinds.values()]

    def draw(self, logits: Tensor) -> Drawn:
        """logits [B, V] -> what was drawn; the next call draws the position after it. Rows are not written."""
        if len(self.groups) == 1:
            return _listed(self.groups[0].draw(logits))
        result = Drawn([0] * len(logits), [0] * len(logits), [0.0] * len(logits), [[]] * len(logits), [[]] * len(logits))
        for group in self.groups:
            part = _listed(group.draw(logits[group.index]))
            for j, i in enumerate(group.index.tolist()):
                result.tokens[i], result.status[i], result.logprobs[i] = part.tokens[j], part.status[j], part.logprobs[j]
                result.top_ids[i], result.top_logprobs[i] = part.top_ids[j], part.top_logprobs[j]
        return result

    def step(self, logits: Tensor) -> Tensor:
        """logits [B, V] -> the drawn ids [B] int64, which each row has been given; -1 where a row failed."""
        drawn = self.draw(logits)
        for group in self.groups:
            for row, i in zip(group.rows, group.index.tolist(), strict=True):
                drawn.give(i, row)
        return torch.tensor(drawn.tokens, device=logits.device)


def _listed(sampled: Sampled) -> Drawn:
    return Drawn(*(values.tolist() for values in sampled))
