"""Which tokens a step sees: a pure function of (seed, sample number), so that a resumed run continues where the first one stopped.

An epoch is every window of `context` tokens exactly once, in an order given by a permutation that is computed, not stored: a
Feistel network over the smallest even number of bits that counts the windows, walked until it lands inside (Black and Rogaway
2002, "Ciphers with arbitrary finite domains"). Sample n is window permutation(epoch, n mod windows) of epoch n div windows.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gptfast.data import TokenData
from gptfast.errors import Error

_ROUNDS = 6
U64 = npt.NDArray[np.uint64]


def _mix(x: int) -> int:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): 64 well-mixed bits."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def _feistel(x: U64, half: int, keys: list[int]) -> U64:
    """A permutation of [0, 4^half): left and right halves of `half` bits, one multiplication a round."""
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = x >> shift, x & mask
    for key in keys:
        noise = (right ^ np.uint64(key)) * np.uint64(0xD6E8FEB86659FD93)
        noise ^= noise >> np.uint64(32)
        noise *= np.uint64(0xD6E8FEB86659FD93)
        left, right = right, left ^ ((noise >> np.uint64(32)) & mask)
    return left << shift | right


def permutation(index: npt.NDArray[np.int64], size: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """index [n] in [0, size) -> its places in the order of (seed, epoch), a permutation of range(size). O(1) in size."""
    half = max(1, -(-(size - 1).bit_length() // 2))
    keys = [_mix(_mix(_mix(seed) ^ epoch) ^ number) for number in range(_ROUNDS)]
    x = _feistel(index.astype(np.uint64), half, keys)
    while (outside := x >= size).any():
        x[outside] = _feistel(x[outside], half, keys)
    return x.astype(np.int64)


def order(first: int, count: int, size: int, seed: int) -> npt.NDArray[np.int64]:
    """Which of `size` samples the places first .. first + count - 1 of the endless sequence of epochs hold [count]."""
    numbers = np.arange(first, first + count)
    places = np.empty(count, dtype=np.int64)
    for epoch in np.unique(numbers // size).tolist():
        here = numbers // size == epoch
        places[here] = permutation(numbers[here] % size, size, seed, epoch)
    return places


class Batch(NamedTuple):
    """ids, targets [B, T] int64, -100 where there is nothing to predict; document_ids (-1: padding), positions [B, T] int64 where
    attention stays inside documents, else None; numbers [B] int64 on the CPU: which sample of the data each row is, or None."""

    ids: Tensor
    targets: Tensor
    document_ids: Tensor | None = None
    positions: Tensor | None = None
    numbers: Tensor | None = None

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """The arguments of model.loss_sum."""
        return self[:4]

    @property
    def tokens(self) -> int:
        """Tokens that are not padding. Waits for the device where the batch is on one."""
        return self.ids.numel() if self.document_ids is None else int((self.document_ids >= 0).sum())

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device; `numbers` stays on the CPU."""
        moved = [None if t is None else t.to(device, non_blocking=True) for t in self.inputs]
        return Batch(*moved, self.numbers)  # type: ignore[arg-type, call-arg, misc]


@runtime_checkable
class DataSource(Protocol):
    """What Trainer reads, for training and for evaluation: Loader, and whatever a task reads its examples with.

    Rows of one batch have one length, at most `context`; shorter ones are padded (document_ids -1, targets -100).
    """

    windows: int  # samples in an epoch
    context: int  # tokens in the longest row
    fingerprint: str  # hash of the data and of what turns it into rows: a resumed run must have the same
    bytes_per_target: float  # of the text, for bits per byte; 0: unknown

    def samples(self, first: int, count: int) -> Batch:
        """Samples first .. first + count - 1 of the endless sequence of epochs: a pure function of these two numbers, in which
        every epoch has each of its `windows` samples once."""

    def rows(self, numbers: list[int]) -> Batch:
        """The samples with these numbers, 0 .. windows - 1 in the data's own order, for evaluation."""


class Loader:
    """Batches of windows of `context` tokens and their successors, as targets.

    Any range of samples can be read, by any process: neither the number of ranks nor what was read before changes a sample.
    Raises gptfast.Error where there is less than one window.
    """

    def __init__(self, data: TokenData, context: int, seed: int = 0, document_mask: bool = False) -> None:
        self.data, self.context, self.seed, self.document_mask = data, context, seed, document_mask
        self.windows, self.slack = divmod(len(data) - 1, context) if len(data) else (0, 0)
        if self.windows < 1:
            raise Error(f"the data has {len(data):,} tokens; a context of {context:,} needs at least {context + 1:,}")
        self.fingerprint = data.fingerprint
        self.bytes_per_target = data.bytes / (len(data) - 1)
        if document_mask and data.eos_token_id is None:
            raise Error("document_mask needs data that records the id of <|endoftext|>")

    def samples(self, first: int, count: int) -> Batch:
        """Samples first .. first + count - 1 of the endless sequence of epochs."""
        places = order(first, count, self.windows, self.seed)
        epochs = (np.arange(first, first + count) // self.windows).tolist()
        # windows do not fill the data: where the rest lies, at which end, changes from epoch to epoch
        shift = {epoch: _mix(_mix(self.seed) ^ ~epoch % 2**64) % (self.slack + 1) for epoch in set(epochs)}
        starts = [place * self.context + shift[epoch] for place, epoch in zip(places.tolist(), epochs, strict=True)]
        return self.at(starts)._replace(numbers=torch.from_numpy(places))

    def sequential(self, first: int, count: int) -> Batch:
        """Windows first .. first + count - 1 in the data's own order."""
        return self.rows(list(range(first, first + count)))

    def rows(self, numbers: list[int]) -> Batch:
        """The windows with these numbers in the data's own order, for evaluation."""
        return self.at([number * self.context for number in numbers])._replace(numbers=torch.tensor(numbers))

    def at(self, starts: list[int]) -> Batch:
        """The windows that start at these tokens."""
        rows = torch.from_numpy(np.stack([self.data.read(start, self.context + 1) for start in starts]))
        ids, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        if not self.document_mask:
            return Batch(ids, targets)
        first = ids.eq(self.data.eos_token_id or 0)  # a document starts at the <|endoftext|> that its first token is predicted from
        place = torch.arange(self.context).expand_as(ids)
        return Batch(ids, targets, first.cumsum(1), place - torch.where(first, place, 0).cummax(1).values)
