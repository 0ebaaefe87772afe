"""A task's examples as the rows that the trainer reads: padded, or several in a row; each once an epoch, in an order that is a pure
function of (seed, epoch, index), as in training/loader.py."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from gptfast.tasks.task import IGNORED, Encoded
from gptfast.training.loader import Batch, order


class ExampleRows:
    """A DataSource of encoded examples.

    A row is one example, padded to the longest of its batch; or with `pack` as many as fit into that many tokens, which do not see
    each other (document_ids, positions from 0). Which examples share a row depends on the examples alone.
    """

    bytes_per_target = 0.0  # an example's bytes are not all predicted

    def __init__(self, encoded: Sequence[Encoded], seed: int = 0, pack: int | None = None) -> None:
        lengths = [len(example.ids) for example in encoded]
        self.seed = seed
        self._starts = np.cumsum([0, *lengths])
        flat = ([token for example in encoded for token in part(example)] for part in (_ids, _targets))
        self._ids, self._targets = (np.asarray(values, dtype=np.int32) for values in flat)
        self._groups = [[number] for number in range(len(encoded))] if pack is None else packed(lengths, pack)
        self.windows = len(self._groups)
        self.context = max(sum(lengths[number] for number in group) for group in self._groups)
        digest = hashlib.sha256(repr((pack, lengths)).encode())
        digest.update(self._ids.tobytes())
        digest.update(self._targets.tobytes())
        self.fingerprint = digest.hexdigest()

    def samples(self, first: int, count: int) -> Batch:
        """Samples first .. first + count - 1 of the endless sequence of epochs."""
        return self.rows(order(first, count, self.windows, self.seed).tolist())

    def rows(self, numbers: list[int]) -> Batch:
        """The rows with these numbers, padded on the right to the longest: ids 0, targets -100, document_ids -1, positions 0."""
        made = [self._row(self._groups[number]) for number in numbers]
        width = max(row.shape[1] for row in made)
        out = np.empty((4, len(made), width), dtype=np.int64)
        out[:] = np.array([0, IGNORED, -1, 0])[:, None, None]
        for place, row in enumerate(made):
            out[:, place, : row.shape[1]] = row
        ids, targets, documents, positions = torch.from_numpy(out)
        return Batch(ids, targets, documents, positions, torch.tensor(numbers))

    def _row(self, group: list[int]) -> np.ndarray:  # type: ignore[type-arg]
        """ids, targets, document_ids and positions [4, T] of some examples side by side."""
        parts = []
        for document, number in enumerate(group):
            span = slice(self._starts[number], self._starts[number + 1])
            steps = np.arange(span.stop - span.start)
            parts.append(np.stack((self._ids[span], self._targets[span], np.full_like(steps, document), steps)))
        return np.concatenate(parts, axis=1)


def _ids(example: Encoded) -> list[int]:
    return example.ids


def _targets(example: Encoded) -> list[int]:
    return example.targets


def packed(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Groups of numbers whose lengths sum to at most `size` (or of one that alone is longer), by best fit from the longest down
    (Johnson 1973, "Near-optimal bin packing algorithms"): each goes where it leaves the least room, in O(size)."""
    groups: list[list[int]] = []
    room: list[list[int]] = [[] for _ in range(size + 1)]  # room[n]: groups with n tokens left
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        length = lengths[number]
        left = next((n for n in range(length, size + 1) if room[n]), None)
        if left is None:
            groups.append([])
            group, left = len(groups) - 1, max(size, length)
        else:
            group = room[left].pop()
        groups[group].append(number)
        room[left - length].append(group)
    return groups
