"""decode_attention: the definition against the formula and, with cache_append_, against attention; stale memory, edge cases."""

import math

import pytest
import torch

from gptfast import Error, backend, ops
from gptfast.ops.decode_attention import eager

pytestmark = pytest.mark.usefixtures("eager")
PAGE = 64


def formula_of(q, k_cache, v_cache, block_table, lengths, scale):
    o = torch.zeros_like(q)
    for b, new in ((b, q.shape[1]) for b in range(q.shape[0])):
        for j in range(new):
            places = [(int(block_table[b, n // PAGE]), n % PAGE) for n in range(int(lengths[b]) - new + j + 1)]
            for h in range(q.shape[2]):
                if places:
                    k, v = (torch.stack([c[page, h, slot] for page, slot in places]).to(q.dtype) for c in (k_cache, v_cache))
                    o[b, j, h] = torch.softmax(scale * (k @ q[b, j, h]), 0) @ v
    return o


def case(new, lengths, heads=2, size=4, dtype=torch.float64, pages=3):
    """Caches whose pages lie in random order and whose unused part is NaN."""
    rows = len(lengths)
    caches = [torch.full((rows * pages + 1, heads, PAGE, size), math.nan, dtype=dtype) for _ in range(2)]
    table = (torch.randperm(rows * pages).view(rows, pages) + 1).int()
    for b, length in enumerate(lengths):
        for n in range(length):
            for cache in caches:
                cache[int(table[b, n // PAGE]), :, n % PAGE] = torch.randn(heads, size).to(dtype)
    return torch.randn(rows, new, heads, size).to(dtype), *caches, table, torch.tensor(lengths, dtype=torch.int32)


@pytest.mark.parametrize(
    ("new", "lengths"),
    [(1, [1]), (1, [64, 64]), (1, [65, 3, 130]), (1, [0, 5]), (1, [0, 0]), (3, [3, 3]), (3, [70, 64, 5]), (5, [2, 9]), (8, [131])],
)
def test_formula(formula, new, lengths):
    q, *rest = case(new, lengths)
    wanted = formula_of(q, *rest, 0.5)
    torch.testing.assert_close(ops.decode_attention(q, *rest, 0.5), wanted, rtol=1e-12, atol=1e-12)
    with formula("decode_attention", formula_of):
        torch.testing.assert_close(ops.decode_attention(q, *rest), eager(q, *rest), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunks", [[150], [64, 64, 22], [1] * 5 + [3, 142], [63, 2, 1, 84]])
def test_equal_to_attention_on_the_whole_sequence(chunks):
    q, k, v = (torch.randn(2, sum(chunks), 2, 8).double() for _ in range(3))
    caches = [torch.full((8, 2, PAGE, 8), math.nan, dtype=torch.float64) for _ in range(2)]
    table, start, parts = torch.tensor([[5, 0, 3], [1, 7, 2]], dtype=torch.int32), torch.zeros(2, dtype=torch.int32), []
    for chunk in chunks:
        piece = slice(int(start[0]), int(start[0]) + chunk)
        ops.cache_append_(*caches, k[:, piece], v[:, piece], table, start)
        start = start + chunk
        parts.append(ops.decode_attention(q[:, piece], *caches, table, start))
    torch.testing.assert_close(torch.cat(parts, 1), ops.attention(q, k, v), rtol=1e-12, atol=1e-12)
    untouched = torch.ones(8, 2, PAGE, 8, dtype=torch.bool)
    for row in table.tolist():
        for n in range(sum(chunks)):
            untouched[row[n // PAGE], :, n % PAGE] = False
    assert all(cache[untouched].isnan().all() and cache[~untouched].isfinite().all() for cache in caches)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_token_reaches_only_queries_that_see_it(value):
    q, k_cache, v_cache, table, lengths = case(4, [70, 70])
    clean = ops.decode_attention(q, k_cache, v_cache, table, lengths)
    for cache in (k_cache, v_cache):
        cache[table[0, 1].item(), 1, 68 - PAGE, 0] = value  # key 68: queries 2 and 3 of row 0 see it
    o = ops.decode_attention(q, k_cache, v_cache, table, lengths)
    reached = torch.zeros(2, 4, 2, dtype=torch.bool)
    reached[0, 2:, 1] = True
    assert torch.equal(~o.isfinite().all(-1), reached)
    torch.testing.assert_close(o[~reached], clean[~reached])


def test_dtypes_and_autocast():
    q, *rest = case(1, [5, 70], dtype=torch.bfloat16)
    assert ops.decode_attention(q, *rest).dtype == torch.bfloat16
    o = ops.decode_attention(q.float(), *rest)
    assert o.dtype == torch.float32
    torch.testing.assert_close(o, formula_of(q.float(), *rest, 0.5))
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.decode_attention(q.float(), *rest).dtype == torch.bfloat16


def test_strided_queries_and_packed_caches(formula):
    q, k_cache, v_cache, table, lengths = case(2, [5, 70])
    both = torch.stack([k_cache, v_cache], 1)
    wide = q.transpose(1, 2).contiguous().transpose(1, 2)
    for context in (backend("eager"), formula("decode_attention", formula_of)):
        with context:
            o = ops.decode_attention(wide, both[:, 0], both[:, 1], table.t().contiguous().t(), lengths)
        torch.testing.assert_close(o, formula_of(q, k_cache, v_cache, table, lengths, 0.5), rtol=1e-12, atol=1e-12)


def test_size_zero():
    q, k_cache, v_cache, table, lengths = case(2, [5, 70])
    assert ops.decode_attention(q[:, :0], k_cache, v_cache, table, lengths).shape == (2, 0, 2, 4)
    assert ops.decode_attention(q[:0], k_cache, v_cache, table[:0], lengths[:0]).shape == (0, 2, 2, 4)
    assert not ops.decode_attention(q, k_cache, v_cache, table[:, :0], lengths * 0).any()


def test_compile(compiled):
    q, *rest = case(3, [70, 64])
    torch.testing.assert_close(compiled(lambda *a: ops.decode_attention(*a))(q, *rest), ops.decode_attention(q, *rest))


def test_limits_of_kernels(monkeypatch):
    monkeypatch.setitem(backend._missing, ("decode_attention", "cpp"), None)
    q, k_cache, v_cache, *_ = case(1, [3], dtype=torch.float16)
    assert "float16 cache" in backend.supports("decode_attention", "cpp", (q, k_cache, v_cache))
    assert backend.supports("decode_attention", "cpp", (q, k_cache.bfloat16(), v_cache.bfloat16())) is None
    assert backend.supports("decode_attention", "cpp", (q, k_cache.bfloat16(), v_cache.bfloat16()), True) == "it has no backward"


def test_bad_input():
    q, k_cache, v_cache, table, lengths = case(2, [5, 70])
    with pytest.raises(Error, match="lengths hold 193; allowed: 0 to 192"):
        ops.decode_attention(q, k_cache, v_cache, table, lengths + 123)
    with pytest.raises(Error, match="block_table holds -1; allowed: 0 to 6"):
        ops.decode_attention(q, k_cache, v_cache, torch.where(table == table.max(), -1, table), lengths)
    with pytest.raises(Error, match="lengths is float32 of shape"):
        ops.decode_attention(q, k_cache, v_cache, table, lengths.float())
    with pytest.raises(Error, match=r"block_table has shape \(1, 3\); needed is \[2, pages a row\]"):
        ops.decode_attention(q, k_cache, v_cache, table[:1], lengths)
    with pytest.raises(Error, match=r"needed are .* twice"):
        ops.decode_attention(q, k_cache[..., :3], v_cache, table, lengths)
