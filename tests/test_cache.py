"""The paged cache against a list of token vectors per row, through random appends, reorderings and crops."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from gptfast import Error, GPT2Config, GPT2LMHeadModel
from gptfast.cache import PAGE, KVCache, compaction, gather_tokens

CONFIG = GPT2Config(vocab_size=31, n_positions=400, n_embd=8, n_layer=2, n_head=2)


def append(cache: KVCache, vectors: Tensor) -> None:
    """Appends vectors [B, Q] of distinct numbers: key 10 l + x, value -x in block l."""
    cache.reserve(vectors.shape[1])
    for layer in range(2):
        k = (vectors + 1000 * layer)[..., None, None].expand(*vectors.shape, 2, 4)
        cache.append_(layer, k, -k)
    cache.lengths += vectors.shape[1]


def contents(cache: KVCache, row: int, layer: int = 0) -> list[float]:
    """What the cache holds of a row, read through its block table."""
    length, table = int(cache.lengths[row]), cache.block_table[row].long()
    keys = cache.keys[layer][table].transpose(1, 2).flatten(0, 1)[:length]  # [T, H, D]
    values = cache.values[layer][table].transpose(1, 2).flatten(0, 1)[:length]
    assert torch.equal(values, -keys) and (keys == keys[:, :1, :1]).all()
    return keys[:, 0, 0].tolist()


@pytest.mark.parametrize("seed", range(6))
def test_random_histories(seed: int) -> None:
    draw = random.Random(seed)
    cache, rows, count = KVCache(CONFIG, 3, capacity=draw.choice([None, 10, 200])), [[], [], []], 0.0
    for _ in range(60):
        kind = draw.random()
        if kind < 0.5 and max(map(len, rows)) < 340:
            length = draw.choice([1, 1, 2, 17, 64, 70])
            fresh = torch.arange(count, count + len(rows) * length).view(len(rows), length)
            count += len(rows) * length
            append(cache, fresh)
            rows = [row + new for row, new in zip(rows, fresh.tolist(), strict=True)]
        elif kind < 0.75:
            chosen = [draw.randrange(len(rows)) for _ in range(draw.randint(1, 5))]
            cache.reorder_(chosen if draw.random() < 0.5 else torch.tensor(chosen))
            rows = [list(rows[old]) for old in chosen]
        else:
            lengths = [draw.randint(max(0, len(row) - 80), len(row)) for row in rows]
            cache.crop_(lengths)
            rows = [row[:length] for row, length in zip(rows, lengths, strict=True)]
        assert [contents(cache, row) for row in range(len(rows))] == rows
        assert contents(cache, 0, layer=1) == [value + 1000 for value in rows[0]]
        assert cache.get_seq_length() == max(map(len, rows)) and cache.batch == len(rows)
    used = {page for row, line in zip(rows, cache.block_table.tolist(), strict=True) for page in line[: -(-len(row) // PAGE)]}
    assert len(used) <= cache.keys[0].shape[0]


def test_full_pages_are_shared_and_last_pages_are_not() -> None:
    cache = KVCache(CONFIG, 1)
    append(cache, torch.arange(2.0 * PAGE + 5).view(1, -1))
    cache.reorder_([0, 0, 0])
    table = cache.block_table
    assert (table[:, :2] == table[0, :2]).all() and len(set(table[:, 2].tolist())) == 3
    assert cache.keys[0].shape[0] < 3 * 3
    append(cache, torch.tensor([[1.0], [2.0], [3.0]]))
    assert [contents(cache, row)[-1] for row in range(3)] == [1, 2, 3]
    cache.crop_([PAGE + 3, 2 * PAGE + 6, 2 * PAGE + 6])  # row 0 now writes into a page that two others read
    append(cache, torch.tensor([[7.0], [8.0], [9.0]]))
    assert contents(cache, 0)[-1] == 7 and contents(cache, 1)[PAGE + 3] == PAGE + 3


def test_beams_that_come_and_go_do_not_grow_the_pool() -> None:
    cache = KVCache(CONFIG, 4, capacity=300)
    append(cache, torch.arange(4.0 * 150).view(4, 150))
    pages, draw = cache.keys[0].shape[0], random.Random(0)
    for _ in range(100):
        cache.reorder_([draw.randrange(4) for _ in range(4)])
        append(cache, torch.ones(4, 1))
    assert cache.keys[0].shape[0] == pages


def test_capacity_is_allocated_once() -> None:
    cache = KVCache(CONFIG, 2, capacity=130)
    assert cache.keys[0].shape == (6, 2, PAGE, 4) and cache.block_table.shape == (2, 3)
    assert sorted(cache.block_table.flatten().tolist()) == list(range(6))
    place = cache.keys[0].data_ptr()
    for _ in range(13):
        append(cache, torch.zeros(2, 10))
    assert cache.keys[0].data_ptr() == place
    append(cache, torch.zeros(2, 70))
    assert cache.block_table.shape[1] == 4


def test_bad_reorderings_and_crops_are_named() -> None:
    cache = KVCache(CONFIG, 2)
    append(cache, torch.zeros(2, 3))
    with pytest.raises(Error, match="outside 0 to 1"):
        cache.reorder_([0, 2])
    with pytest.raises(Error, match="crop_"):
        cache.crop_([4, 1])
    with pytest.raises(Error, match="crop_"):
        cache.crop_([1])
    with pytest.raises(Error, match="do not fit 2 blocks of 2 heads"):
        KVCache.from_legacy(CONFIG, [(torch.zeros(1, 2, 3, 4),) * 2])


def test_compaction_puts_real_tokens_in_front_in_their_order() -> None:
    counts, order = compaction(torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0]]))
    assert counts.tolist() == [2, 2, 0]
    moved = gather_tokens(torch.arange(12).view(3, 4), order)
    assert moved[:, :2].tolist() == [[1, 3], [4, 5], [8, 9]]
    assert torch.equal(gather_tokens(moved, torch.argsort(order, dim=1)), torch.arange(12).view(3, 4))


def test_rows_of_a_model_can_be_reordered_and_cropped() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(CONFIG).eval()
    ids, more = torch.randint(31, (2, 70)), torch.randint(31, (3, 4))
    with torch.no_grad():
        cache = model(ids).past_key_values
        cache.reorder_([1, 0, 1])
        cache.crop_([70, 66, 69])
        after = model(more, past_key_values=cache).logits
        for row, (old, length) in enumerate([(1, 70), (0, 66), (1, 69)]):
            whole = model(torch.cat([ids[old, :length], more[row]])[None], use_cache=False).logits[0, -4:]
            assert torch.allclose(after[row], whole, atol=1e-5)
