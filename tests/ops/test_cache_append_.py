"""cache_append_: the definition against the formula, what is left alone, edge cases. test_decode_attention reads what it writes."""

import math

import pytest
import torch

from gptfast import Error, backend, ops

pytestmark = pytest.mark.usefixtures("eager")
PAGE = 64


def formula_of(k_cache, v_cache, k, v, block_table, start):
    assert all(t.is_contiguous() for t in (k, v, block_table, start))
    for b in range(k.shape[0]):
        for j in range(k.shape[1]):
            n = int(start[b]) + j
            k_cache[int(block_table[b, n // PAGE]), :, n % PAGE] = k[b, j].to(k_cache.dtype)
            v_cache[int(block_table[b, n // PAGE]), :, n % PAGE] = v[b, j].to(v_cache.dtype)


def case(new, dtype=torch.float32, cache_dtype=torch.float32):
    caches = [torch.full((6, 2, PAGE, 4), math.nan, dtype=cache_dtype) for _ in range(2)]
    table = torch.tensor([[4, 1], [0, 5]], dtype=torch.int32)
    k, v = (torch.randn(2, 2, new, 4).to(dtype).transpose(1, 2) for _ in range(2))
    return *caches, k, v, table, torch.tensor([0, 128 - new], dtype=torch.int32)


@pytest.mark.parametrize("new", [1, 2, 63, 64, 65, 128])
@pytest.mark.parametrize("token", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16])
def test_formula(formula, new, token, cache):
    k_cache, v_cache, *rest = case(new, token, cache)
    fast = [k_cache.clone(), v_cache.clone()]
    assert ops.cache_append_(k_cache, v_cache, *rest) is None
    with formula("cache_append_", formula_of):
        ops.cache_append_(*fast, *rest)
    for cache, wanted in ((k_cache, fast[0]), (v_cache, fast[1])):
        torch.testing.assert_close(cache, wanted, rtol=0, atol=0, equal_nan=True)
        assert int(cache.isfinite().all(-1).sum()) == 2 * new * 2


def test_expanded_tokens_and_caches_of_one_tensor():
    both = torch.zeros(6, 2, 2, PAGE, 4)
    _, _, k, v, table, start = case(3)
    ops.cache_append_(both[:, 0], both[:, 1], k[:1, :, :, :1].expand(2, 3, 2, 4), v, table, start)
    assert torch.equal(both[4, 0, :, :3], k[0, :, :, :1].transpose(0, 1).expand(2, 3, 4))
    assert torch.equal(both[5, 1, :, -3:], v[1].transpose(0, 1))


def test_size_zero():
    k_cache, v_cache, k, v, table, start = case(2)
    ops.cache_append_(k_cache, v_cache, k[:, :0], v[:, :0], table, start)
    ops.cache_append_(k_cache, v_cache, k[:0], v[:0], table[:0], start[:0])
    assert k_cache.isnan().all() and v_cache.isnan().all()


def test_tokens_that_require_grad_are_written_without_a_graph():
    k_cache, v_cache, k, v, table, start = case(2)
    ops.cache_append_(k_cache, v_cache, k.requires_grad_(), v, table, start)
    assert not k_cache.requires_grad and k_cache[4, :, :2].isfinite().all()


def test_compile(compiled):
    k_cache, v_cache, *rest = case(3)
    wanted = [k_cache.clone(), v_cache.clone()]
    ops.cache_append_(*wanted, *rest)
    compiled(lambda *a: ops.cache_append_(*a))(k_cache, v_cache, *rest)
    assert torch.equal(k_cache.nan_to_num(), wanted[0].nan_to_num()) and torch.equal(v_cache.nan_to_num(), wanted[1].nan_to_num())


def test_limits_of_kernels(monkeypatch):
    monkeypatch.setitem(backend._missing, ("cache_append_", "cpp"), None)
    k_cache, v_cache, k, v, *_ = case(1)
    assert "float16 cache" in backend.supports("cache_append_", "cpp", (k_cache.half(), v_cache.half(), k, v))
    assert backend.supports("cache_append_", "cpp", (k_cache, v_cache, k, v)) is None


def test_bad_input():
    k_cache, v_cache, k, v, table, start = case(2)
    with pytest.raises(Error, match="writes tokens 0 to 128; the pages of a row hold 0 to 127"):
        ops.cache_append_(k_cache, v_cache, k, v, table, start + torch.tensor([0, 1]))
    with pytest.raises(Error, match="writes tokens -1 to"):
        ops.cache_append_(k_cache, v_cache, k, v, table, start - torch.tensor([1, 0]))
    with pytest.raises(Error, match="block_table holds 6; allowed: 0 to 5"):
        ops.cache_append_(k_cache, v_cache, k, v, torch.where(table == 5, 6, table), start)
    with pytest.raises(Error, match=r"k has shape \(2, 2, 2, 4\), v \(2, 1, 2, 4\)"):
        ops.cache_append_(k_cache, v_cache, k, v[:, :1], table, start)
    with pytest.raises(Error, match="the dtypes differ"):
        ops.cache_append_(k_cache, v_cache.bfloat16(), k, v, table, start)
