"""cache_append_: the definition against the formula, what is left alone, edge cases. test_decode_attention reads what it writes."""

import math

import pytest
import torch

from gptfast import Error, backend, ops, testing
from gptfast.ops.cache_append_ import eager
from gptfast.testing import LAYOUTS, Target, arrange, same_bits

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


# --------------------------------------------------------------------------------------------------------------------- the kernel

ISAS = ["plain", "avx2", "avx512"]


def kernel_case(new, size, dtype=torch.float32, cache=torch.float32, start=(0, 61, 128)):
    rows, pages = len(start), -(-(max(start) + new) // PAGE)
    caches = [torch.full((rows * pages + 2, 3, PAGE, size), math.nan, dtype=cache) for _ in range(2)]
    table = (torch.randperm(rows * pages).view(rows, pages) + 1).int()
    k, v = (torch.randn(rows, new, 3, size).to(dtype) for _ in range(2))
    return *caches, k, v, table, torch.tensor(start, dtype=torch.int32)


def check(inputs, target=None):
    """Every bit of both caches as eager writes and leaves them; tokens and tables unchanged."""
    wanted, found = ([c.clone() for c in inputs[:2]] for _ in range(2))
    before = [t.clone() for t in inputs[2:]]
    eager(*wanted, *inputs[2:])
    with backend(cache_append_="cpp") if target is None else target.force("cache_append_"):
        ops.cache_append_(*found, *inputs[2:])
    assert all(same_bits(a, b) for a, b in zip(found, wanted, strict=True))
    assert all(same_bits(a, b) for a, b in zip(inputs[2:], before, strict=True))
    if target is not None:
        testing.record("cache_append_", target.proof, target.precision, "forward")


@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16], ids=["fp32-cache", "bf16-cache"])
@pytest.mark.parametrize(("new", "size"), [(1, 64), (1, 1), (3, 7), (64, 33), (65, 16), (130, 5)])
def test_kernel_shapes(target: Target, new, size, cache):
    check(kernel_case(new, size, target.dtype, cache), target)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_kernel_layouts(target: Target, layout):
    k_cache, v_cache, k, v, table, start = kernel_case(3, 16, target.dtype)
    check((k_cache, v_cache, arrange(k, layout), arrange(v, layout), table.long().t().contiguous().t(), start.long()), target)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("token", [torch.float32, torch.bfloat16, torch.float16])
def test_every_instruction_set(isa, token):
    with testing.forced_isa(isa):
        for cache in (torch.float32, torch.bfloat16):
            for size in (1, 4, 15, 64, 65):
                check(kernel_case(5, size, token, cache))


def test_keys_and_values_of_two_dtypes_into_packed_caches(target: Target):
    k_cache, v_cache, k, v, table, start = kernel_case(3, 16, target.dtype)
    both = torch.stack([k_cache, v_cache], 1)
    ops.cache_append_(k_cache, v_cache, k, v.float(), table, start)
    with target.force("cache_append_"):
        ops.cache_append_(both[:, 0], both[:, 1], k, v.float(), table, start)
    assert same_bits(both[:, 0].contiguous(), k_cache) and same_bits(both[:, 1].contiguous(), v_cache)


def test_threads_do_not_matter(target: Target):
    threads, inputs = torch.get_num_threads(), kernel_case(700, 16, target.dtype, start=(3, 200))
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            check(inputs, target)
    finally:
        torch.set_num_threads(threads)


def test_non_finite_tokens_are_kept(target: Target):
    k_cache, v_cache, k, v, table, start = kernel_case(2, 16, target.dtype)
    k[0, 0, 0, 0], k[1, 1, 2, 3], v[0, 1, 1, 15] = math.inf, -math.inf, math.nan
    with target.force("cache_append_"):
        ops.cache_append_(k_cache, v_cache, k, v, table, start)
    assert k_cache[table[0, 0], 0, 0, 0] == math.inf and k_cache[table[1, 0], 2, 62, 3] == -math.inf
    assert v_cache[table[0, 0], 1, 1, 15].isnan() and k_cache.isinf().sum() == 2


def test_opcheck():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    for dtype, cache in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)):
        k_cache, v_cache, *rest = kernel_case(3, 8, dtype, cache)
        torch.library.opcheck(torch.ops.gptfast.cache_append_.default, (k_cache.zero_(), v_cache.zero_(), *rest))


def test_leaf_checks_its_contract():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    k_cache, v_cache, k, v, table, start = kernel_case(2, 8)
    for arguments, message in (
        ((k_cache, v_cache, k[..., ::2], v[..., ::2], table, start), "tokens is not contiguous"),
        ((k_cache, v_cache, k, v[:, :1], table, start), "v has shape"),
        ((k_cache, v_cache, k, v.double(), table, start), "v is Double"),
        ((k_cache, v_cache, k[0], v[0], table, start), "tokens have 3 dimensions"),
        ((k_cache.half(), v_cache.half(), k, v, table, start), "k_cache is Half"),
        ((k_cache, v_cache, k, v, table.short(), start), "block_table is Short"),
        ((k_cache, v_cache, k, v, table, start.float()), "start is Float"),
        ((k_cache, v_cache, k, v, table, start[:2]), "start has shape"),
        ((k_cache, v_cache, k, v, table, start - 1), "row 0 has tokens -1 to 0"),
        ((k_cache, v_cache, k, v, table, start + 63), "row 2 has tokens 191 to 192; its pages hold 192"),
        ((k_cache, v_cache, k, v, table + 10, start), "the cache has 11"),
        ((k_cache, v_cache, k, v, table - 10, start), "names page -"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.gptfast.cache_append_(*arguments)
        assert k_cache.isnan().all() and v_cache.isnan().all()


def test_compile_on_cpp_and_a_backend_switched():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    torch._dynamo.reset()
    *caches, k, v, table, start = kernel_case(3, 16)
    wanted = [c.clone() for c in caches]
    eager(*wanted, k, v, table, start)
    compiled = torch.compile(lambda *a: ops.cache_append_(*a), fullgraph=True, backend="aot_eager")
    for name in ("cpp", "eager", "cpp"):
        written = [c.clone() for c in caches]
        with backend(cache_append_=name):
            compiled(*written, k, v, table, start)
        assert all(same_bits(a, b) for a, b in zip(written, wanted, strict=True)), name
    torch._dynamo.reset()
