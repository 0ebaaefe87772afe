"""The order of the data: every window once an epoch, whoever reads it and in whatever pieces."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptfast import Error
from gptfast.data import TokenData
from gptfast.training.loader import Loader, permutation


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10**6))
def test_permutation_is_one(size: int, seed: int, epoch: int) -> None:
    order = permutation(np.arange(size), size, seed, epoch)
    assert np.array_equal(np.sort(order), np.arange(size))


def test_permutation_depends_on_seed_and_epoch_and_mixes() -> None:
    index = np.arange(10_000)
    base = permutation(index, 10_000, 0, 0)
    for other in (permutation(index, 10_000, 1, 0), permutation(index, 10_000, 0, 1), index):
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.05 and (base == other).mean() < 0.01
    assert abs(np.corrcoef(base[:-1], base[1:])[0, 1]) < 0.05


def test_one_place_of_a_huge_permutation_needs_no_memory() -> None:
    places = permutation(np.array([0, 1, 2**60 - 1]), 2**60 + 1, 3, 4)
    assert len(set(places.tolist())) == 3 and (places <= 2**60).all()


@pytest.mark.parametrize(("length", "context"), [(101, 10), (108, 10), (11, 10), (1000, 7)])
def test_an_epoch_reads_every_window_exactly_once(length: int, context: int) -> None:
    loader = Loader(TokenData.from_ids(torch.arange(length)), context, seed=5)
    assert loader.windows == (length - 1) // context
    for epoch in range(3):
        batch = loader.samples(epoch * loader.windows, loader.windows)
        assert torch.equal(batch.targets, batch.ids + 1)
        seen = batch.ids.flatten().sort().values
        assert torch.equal(seen, torch.arange(loader.windows * context) + seen[0])
        assert 0 <= int(seen[0]) <= loader.slack


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_samples_do_not_depend_on_how_they_are_read(cuts: list[int]) -> None:
    def loader() -> Loader:
        return Loader(TokenData.from_ids(torch.arange(100)), 9, seed=2)

    whole = loader().samples(0, sum(cuts)).ids
    parts, first = [], 0
    for count in cuts:  # a fresh loader each time: nothing is remembered
        parts.append(loader().samples(first, count).ids)
        first += count
    assert torch.equal(torch.cat(parts), whole)


def test_reading_across_arrays() -> None:
    parts = [np.arange(0, 5, dtype=np.uint16), np.arange(5, 6, dtype=np.uint16), np.arange(6, 40, dtype=np.uint16)]
    data = TokenData(parts)
    for start in range(35):
        assert data.read(start, 5).tolist() == list(range(start, start + 5))


def test_document_mask_gives_documents_and_positions_from_their_start() -> None:
    ids = [9, 1, 2, 9, 3, 9, 9, 4, 5, 6]
    loader = Loader(TokenData.from_ids(ids, eos_token_id=9), 9, document_mask=True)
    batch = loader.sequential(0, 1)
    assert batch.document_ids is not None and batch.positions is not None
    assert batch.document_ids.tolist() == [[1, 1, 1, 2, 2, 3, 4, 4, 4]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0, 0, 1, 2]]
    inside = Loader(TokenData.from_ids([1, 2, 9, 3, 4], eos_token_id=9), 4, document_mask=True).sequential(0, 1)
    assert inside.positions is not None and inside.positions.tolist() == [[0, 1, 0, 1]]


def test_data_shorter_than_a_window_is_an_error() -> None:
    with pytest.raises(Error, match=r"10 tokens.*context of 10 needs at least 11"):
        Loader(TokenData.from_ids(torch.arange(10)), 10)
