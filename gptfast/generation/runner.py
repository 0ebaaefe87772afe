"""What a scheduler asks of a model: one step over sequences whose keys and values lie in numbered pages. And `EagerRunner`, the
definition of it: model.py with the same pages.

A runner knows nothing of requests. It owns the memory of `pages` pages of 64 tokens; which page belongs to whom is the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast.cache import PAGE, KVCache
from gptfast.errors import Error
from gptfast.generation.rows import Drawn, Row, Sampler

if TYPE_CHECKING:
    from gptfast.model import GPT2LMHeadModel


@dataclass
class Batch:
    """S sequences of one step; every list has S entries.

    tokens[s]: ids of the new tokens. starts[s]: how many tokens before them are in the cache. tables[s]: the sequence's pages, at
    least ceil((starts[s] + new tokens) / 64), for Runner.decode with room for all its steps; the page that holds position starts[s]
    and those behind it are no other sequence's. draws[s] = d: the last d of the new tokens are each followed by a draw, 0 for none.
    rows[s]: what is asked of these draws; None where d is 0. The j-th of d is at position row.start + len(row.tokens) + j.
    A sequence without new tokens draws from the last new token of the sequence before it: another choice of the same prompt.
    targets: instead of drawing, the log-probability of targets[s][j] is returned; then rows may hold None.
    """

    tokens: list[list[int]] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    tables: list[list[int]] = field(default_factory=list)
    draws: list[int] = field(default_factory=list)
    rows: list[Row | None] = field(default_factory=list)
    targets: list[list[int]] | None = None

    def add(self, tokens: list[int], start: int, table: list[int], draws: int, row: Row | None) -> None:
        """Appends a sequence."""
        self.tokens.append(tokens)
        self.starts.append(start)
        self.tables.append(table)
        self.draws.append(draws)
        self.rows.append(row)

    def __len__(self) -> int:
        return len(self.tokens)


class Interrupted(KeyboardInterrupt):
    """interrupt() ended a step() before it drew anything: nothing of it has happened, and it can be tried again."""


class Runner(Protocol):
    """What a scheduler needs. vocab: ids that can be drawn; context: longest sequence; pages: how many there are (PAGE tokens
    each; memory is best taken when a page is first written: low numbers are used first)."""

    vocab: int
    context: int
    pages: int

    def step(self, batch: Batch) -> Drawn:
        """Runs the new tokens and draws (or scores targets): results in the order of the sequences and of their draws. Rows are
        read and never written: the caller pushes what was drawn. A row of NaN has its status, and is no other row's business.
        Raises Interrupted where interrupt() came early enough."""

    def logits(self, batch: Batch) -> Tensor:
        """Runs the new tokens: instead of each draw its logits, fp32 [draws, vocab] on the model's device. Rows may be None."""

    def decode(self, batch: Batch, steps: int) -> list[Drawn]:
        """Repeats step() for sequences of one new token and one draw, each drawn token being the next step's new one. Returns after
        1 to `steps` steps: earlier once any sequence drew one of row.stop_ids or failed, or after interrupt(). No row looks at what
        was drawn, but for penalties (the caller bounds `steps` by Row.steady)."""

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies keys and values of whole pages, (from, to) each; nobody reads a page that another pair writes."""

    def interrupt(self) -> None:
        """Makes decode() that is running, in another thread or below a signal handler, return after the token it is at, and a step
        over prompts end soon, if it can."""

    def close(self) -> None:
        """Lets go of weights and pages."""


class _Pages(KVCache):
    """Some sequences' view of a pool of pages, as the model takes a cache: appends real tokens only."""

    def __init__(self, pool: EagerRunner, tables: list[list[int]], starts: list[int], counts: list[int]) -> None:
        self.config, self.keys, self.values = pool.model.config, pool.keys, pool.values
        width = max(starts, default=0) + max(counts, default=0)  # the model pads all rows to the longest
        columns = -(-width // PAGE)
        padded = [[*table[:columns], *[0] * (columns - len(table))] for table in tables]
        self.block_table = torch.tensor(padded, dtype=torch.int32, device=pool.device).view(len(tables), columns)
        self.lengths = torch.tensor(starts, dtype=torch.int32, device=pool.device)
        self.counts = counts

    def append_(self, layer: int, k: Tensor, v: Tensor) -> None:
        if min(self.counts) == k.shape[1]:
            return super().append_(layer, k, v)
        whole = self.block_table, self.lengths
        try:
            for i, count in enumerate(self.counts):  # behind a shorter row's tokens may be another's page
                self.block_table, self.lengths = whole[0][i : i + 1], whole[1][i : i + 1]
                super().append_(layer, k[i : i + 1, :count], v[i : i + 1, :count])
        finally:
            self.block_table, self.lengths = whole

    def reserve(self, tokens: int) -> None:
        """The caller has given the pages."""


class EagerRunner:
    """model.py behind the Runner protocol, on the model's device: the definition. Pages are allocated as they are first used."""

    def __init__(self, model: GPT2LMHeadModel, pages: int) -> None:
        config = model.config
        self.model, self.device, self.pages = model, model.device, pages
        self.vocab, self.context = config.real_vocabulary, config.n_positions
        dtype = torch.float32 if config.reorder_and_upcast_attn else model.dtype
        shape = (0, config.n_head, PAGE, config.n_embd // config.n_head)
        self.keys, self.values = (
            [torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(config.n_layer)] for _ in range(2)
        )
        self._sampler: tuple[list[tuple[int, int]], Sampler] | None = None

    def step(self, batch: Batch) -> Drawn:
        """One pass each over the prompts that begin, the single tokens, and the other pieces of prompts."""
        logits = self.logits(batch)
        if not len(logits):
            return Drawn()
        if batch.targets is not None:
            return _scored(logits, [token for targets in batch.targets for token in targets])
        return self._draw(batch, logits)

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """The passes of step(): fp32 [draws, vocab]."""
        self._allocate(1 + max((page for table in batch.tables for page in table), default=-1))
        kinds: dict[tuple[bool, bool], list[int]] = {}
        for s, (tokens, start) in enumerate(zip(batch.tokens, batch.starts, strict=True)):
            if tokens:
                kinds.setdefault((start > 0, len(tokens) == 1 and start > 0), []).append(s)
        logits: dict[int, Tensor] = {}
        for index in kinds.values():
            logits.update(zip(index, self._forward(batch, index), strict=True))
        parts, last = [torch.empty(0, self.vocab, device=self.device)], logits.get(0)
        for s, count in enumerate(batch.draws):
            last = logits.get(s, last)
            if count and last is not None:
                parts.append(last[len(last) - count :].float())
        return torch.cat(parts) if len(parts) > 2 else parts[-1]

    def _forward(self, batch: Batch, index: list[int]) -> list[Tensor]:
        """Logits [at least the draws, V] of these sequences' last tokens."""
        tokens = [batch.tokens[s] for s in index]
        counts = [len(ids) for ids in tokens]
        width = max(counts)
        cache = _Pages(self, [batch.tables[s] for s in index], [batch.starts[s] for s in index], counts)
        ids = torch.tensor([[*[0] * (width - len(t)), *t] for t in tokens], device=self.device)  # last tokens in the last column
        mask = None
        if min(counts) < width:
            mask = torch.tensor([[0] * (width - n) + [1] * n for n in counts], device=self.device)
        keep = max(1, *(batch.draws[s] for s in index)) if len(index) > 1 else max(1, batch.draws[index[0]])
        output = self.model(ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=keep)
        return list(output.logits.unbind(0))

    def _draw(self, batch: Batch, logits: Tensor) -> Drawn:
        rows = [(row, j) for row, count in zip(batch.rows, batch.draws, strict=True) if row is not None for j in range(count)]
        now = [(id(row), row.start + len(row.tokens) + j) for row, j in rows]
        before = self._sampler
        if before is None or [(row, place + 1) for row, place in before[0]] != now:  # else the sampler has already moved on
            before = None
        sampler = Sampler([row for row, _ in rows], self.vocab, self.device, [j for _, j in rows]) if before is None else before[1]
        drawn = sampler.draw(logits)
        self._sampler = (now, sampler)
        return drawn

    def decode(self, batch: Batch, steps: int) -> list[Drawn]:
        """One step: eager gains nothing from several."""
        return [self.step(batch)]

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies pages of all layers."""
        self._allocate(1 + max((page for pair in pairs for page in pair), default=-1))
        source, target = torch.tensor(pairs, dtype=torch.int64, device=self.device).view(-1, 2).unbind(1)
        for pool in (*self.keys, *self.values):
            pool[target] = pool[source]

    def _allocate(self, pages: int) -> None:
        if pages > self.pages:
            raise Error(f"page {pages - 1} is asked for; allowed: 0 to {self.pages - 1}")
        have = self.keys[0].shape[0]
        if pages > have:
            more = min(max(pages, have * 3 // 2), self.pages) - have
            for pools in (self.keys, self.values):
                pools[:] = [F.pad(pool, (0, 0, 0, 0, 0, 0, 0, more)) for pool in pools]

    def interrupt(self) -> None:
        """Nothing: decode() is one token long."""

    def close(self) -> None:
        """Lets go of the pages."""
        self.keys, self.values = [], []


def _scored(logits: Tensor, targets: Sequence[int]) -> Drawn:
    """Log-probabilities of given tokens; status 1 where the logits hold NaN."""
    logprobs = torch.log_softmax(logits.float(), 1).gather(1, torch.tensor(targets, device=logits.device)[:, None])[:, 0]
    return Drawn(list(targets), logprobs.isnan().int().tolist(), logprobs.tolist(), [[] for _ in targets], [[] for _ in targets])
