"""Beams on a runner's pages: what two beams have in common is kept once, the page that a beam writes is its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptfast.cache import PAGE
from gptfast.errors import Error
from gptfast.generation.pages import PagePool
from gptfast.generation.rows import Row
from gptfast.generation.runner import Batch, Runner


class PagedBeams:
    """A beam.Source: `runner` computes, pages are taken from `pool`; prompts run in pieces of `chunk` tokens."""

    def __init__(self, runner: Runner, pool: PagePool, chunk: int = 512) -> None:
        self.runner, self.pool, self.chunk = runner, pool, chunk
        self._tables: list[list[int]] = []
        self._lengths: list[int] = []  # tokens of each beam that are in its pages

    def start(self, rows: Sequence[Row], beams: int) -> Tensor:
        """Each prompt is run once. Raises gptfast.Error where the pages do not suffice."""
        logits = []
        for row in rows:
            table: list[int] = []
            self._tables.append(table)
            self._lengths.append(row.start)
            while len(table) * PAGE < row.start:
                table.append(self._page())
            for begin in range(0, row.start, self.chunk):
                part = list(row.prompt[begin : begin + self.chunk])
                last = begin + len(part) == row.start
                logits.append(self.runner.logits(Batch([part], [begin], [table], [int(last)], [None])))
        parents = [i for i in range(len(rows)) for _ in range(beams)]
        self._fork(parents)
        together = torch.cat(logits)
        return together[torch.tensor(parents, device=together.device)]

    def advance(self, parents: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """One step of all beams. Raises gptfast.Error where the pages do not suffice."""
        self._fork(parents)
        batch = Batch()
        for i, token in enumerate(tokens):
            if self._lengths[i] == len(self._tables[i]) * PAGE:
                self._tables[i].append(self._page())
            batch.add([token], self._lengths[i], self._tables[i], 1, None)
            self._lengths[i] += 1
        return self.runner.logits(batch)

    def close(self) -> None:
        """Gives the pages back."""
        for table in self._tables:
            self.pool.release(table)
        self._tables, self._lengths = [], []

    def _fork(self, parents: Sequence[int]) -> None:
        """Beam i becomes what was beam parents[i]. Of several children the first keeps the page that is not full, the others copy
        it."""
        before, lengths = self._tables, self._lengths
        after: list[list[int]] = []
        copies = []
        try:
            for i, parent in enumerate(parents):
                full, partial = divmod(lengths[parent], PAGE)
                table = [self.pool.hold(page) for page in before[parent][:full]]
                after.append(table)
                if partial:
                    page = before[parent][full]
                    first = parent not in parents[:i]
                    table.append(self.pool.hold(page) if first else self._page())
                    copies += [] if first else [(page, table[-1])]
            if copies:
                self.runner.copy_pages(copies)
        except BaseException:
            self._tables = before + after
            raise
        self._tables, self._lengths = after, [lengths[parent] for parent in parents]
        for table in before:
            self.pool.release(table)

    def _page(self) -> int:
        page = self.pool.take()
        if page is None:
            raise Error(f"beam search needs more than {self.pool.pages:,} pages of {PAGE} tokens; use fewer beams or more pages")
        return page
