"""The key-value cache: pages of 64 tokens that rows own through a block table, so that rows of different lengths share one pool.

Row b has `lengths[b]` tokens; token t of it is in slot t % 64 of page `block_table[b, t // 64]`. Only real tokens are counted:
padding is compacted away before an append (model.py). Full pages may belong to several rows at once (n answers to one prompt,
beams); the page that a row writes next, and those after it, are its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptfast import ops
from gptfast.config import GPT2Config
from gptfast.errors import Error

PAGE = 64


class KVCache:
    """Keys and values of all blocks: `keys[l]`, `values[l]` [pages, H, 64, D]; `block_table` [B, pages a row], `lengths` [B] int32.

    `capacity` tokens a row are allocated at once (default: on demand); reserve() grows it. `dtype` is the storage's.
    """

    def __init__(
        self,
        config: GPT2Config,
        batch: int,
        capacity: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        shape = (0, config.n_head, PAGE, config.n_embd // config.n_head)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]
        self.block_table = torch.zeros(batch, 0, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self._rows: list[list[int]] = [[] for _ in range(batch)]  # the block table on the host
        self._uses: list[int] = []  # how many rows hold each page
        self._free: list[int] = []
        if capacity is not None:
            self._widen(-(-capacity // PAGE))

    @classmethod
    def from_legacy(cls, config: GPT2Config, past: Sequence[Sequence[Tensor]], mask: Tensor | None = None) -> KVCache:
        """A cache of ((k, v), ...), one pair a block, each [B, H, T, D], without the tokens whose mask [B, T] is 0."""
        first = past[0][0]
        batch, heads, length, size = first.shape
        if len(past) != config.n_layer or heads != config.n_head or heads * size != config.n_embd:
            shape = f"{len(past)} pairs of {tuple(first.shape)}"
            raise Error(f"past_key_values: {shape} do not fit {config.n_layer} blocks of {config.n_head} heads")
        cache = cls(config, batch, length, first.dtype, first.device)
        counts, order = compaction(mask) if mask is not None else (torch.full_like(cache.lengths, length), None)
        for layer, (k, v) in enumerate(past):
            rows = [t.transpose(1, 2) if order is None else gather_tokens(t.transpose(1, 2), order) for t in (k, v)]
            cache.append_(layer, rows[0], rows[1])
        cache.lengths += counts
        return cache

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.lengths.numel()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that keys and values are stored in."""
        return self.keys[0].dtype

    def get_seq_length(self) -> int:
        """Tokens in the longest row."""
        return int(self.lengths.max()) if self.batch else 0

    def append_(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Writes k, v [B, Q, H, D] of one block behind each row's `lengths`, which the caller advances after the last block."""
        with torch.no_grad():
            ops.cache_append_(
                self.keys[layer], self.values[layer], k.to(self.dtype), v.to(self.dtype), self.block_table, self.lengths
            )

    def reserve(self, tokens: int) -> None:
        """Makes room for `tokens` more in every row. Grows by at least a half, so that single tokens cost amortised O(1)."""
        needed = -(-(self.get_seq_length() + tokens) // PAGE)
        if needed > self.block_table.shape[1]:
            limit = -(-self.config.n_positions // PAGE)
            self._widen(max(needed, min(self.block_table.shape[1] * 3 // 2, limit)))

    def reorder_(self, rows: Tensor | Sequence[int]) -> None:
        """Row i becomes what row rows[i] was; the batch becomes len(rows). Full pages are shared, only last pages are copied."""
        old = torch.as_tensor(rows).tolist()
        lengths = self.lengths.tolist()
        if any(not 0 <= row < len(lengths) for row in old):
            raise Error(f"reorder_: rows {old} name a row outside 0 to {len(lengths) - 1}")
        table = [self._rows[row][: -(-lengths[row] // PAGE)] for row in old]
        uses = [0] * len(self._uses)
        for row in table:
            for page in row:
                uses[page] += 1
        self._uses, self._free = uses, [page for page, count in enumerate(uses) if count == 0]
        width = self.block_table.shape[1]
        self.lengths = self.lengths[torch.tensor(old, dtype=torch.int64, device=self.lengths.device)]
        self._rows = table
        self._make_writable()
        self._widen(width)

    def crop_(self, lengths: Tensor | Sequence[int]) -> None:
        """Shortens row b to lengths[b] tokens. Raises gptfast.Error where that is longer than the row."""
        new = torch.as_tensor(lengths, dtype=torch.int32).to(self.lengths.device)
        if new.shape != self.lengths.shape or bool(((new > self.lengths) | (new < 0)).any()):
            raise Error(f"crop_: lengths {new.tolist()} do not shorten rows of {self.lengths.tolist()}")
        self.lengths = new.clone()
        self._make_writable()
        self._upload()

    def _make_writable(self) -> None:
        """Gives each row a copy of its shared pages from the one that it writes next on."""
        copies = []
        for row, length in zip(self._rows, self.lengths.tolist(), strict=True):
            for column in range(length // PAGE, len(row)):
                if self._uses[row[column]] > 1:
                    copies.append((row[column], page := self._take()))
                    self._uses[row[column]] -= 1
                    row[column] = page
        if copies:
            source, target = torch.tensor(copies, device=self.lengths.device).unbind(1)
            for pool in (*self.keys, *self.values):
                pool[target] = pool[source]

    def _take(self) -> int:
        if not self._free:
            self._grow(max(len(self._rows), 1))
        page = self._free.pop()
        self._uses[page] = 1
        return page

    def _grow(self, pages: int) -> None:
        """Adds pages of zeros (not torch.empty: a page's unwritten end is multiplied by weights of 0, and 0 * NaN is NaN)."""
        self._free += range(len(self._uses) + pages - 1, len(self._uses) - 1, -1)
        self._uses += [0] * pages
        self.keys = [torch.cat((pool, pool.new_zeros(pages, *pool.shape[1:]))) for pool in self.keys]
        self.values = [torch.cat((pool, pool.new_zeros(pages, *pool.shape[1:]))) for pool in self.values]

    def _widen(self, width: int) -> None:
        missing = sum(width - len(row) for row in self._rows)
        if missing > len(self._free):
            self._grow(missing - len(self._free))
        for row in self._rows:
            row += [self._take() for _ in range(width - len(row))]
        self._upload()

    def _upload(self) -> None:
        self.block_table = torch.tensor(self._rows, dtype=torch.int32, device=self.lengths.device).view(len(self._rows), -1)


def compaction(mask: Tensor) -> tuple[Tensor, Tensor]:
    """mask [B, Q] (0 = padding) -> number of real tokens [B] int32, and the order [B, Q] int64 that puts them in front."""
    real = mask != 0
    return real.sum(1, dtype=torch.int32), torch.argsort((~real).to(torch.int8), dim=1, stable=True)


def gather_tokens(x: Tensor, order: Tensor) -> Tensor:
    """x [B, Q, ...] -> y with y[b, i] = x[b, order[b, i]]."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], order]
