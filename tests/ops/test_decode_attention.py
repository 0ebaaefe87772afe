"""decode_attention: the definition against the formula and, with cache_append_, against attention; stale memory, edge cases."""

import math

import pytest
import torch

from gptfast import Error, backend, ops, testing
from gptfast.ops.decode_attention import eager
from gptfast.testing import LAYOUTS, Target, arrange, check_op, same_bits

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


# --------------------------------------------------------------------------------------------------------------------- the kernels

ISAS = ["plain", "avx2", "avx512"]
NAMES = ("q", "k_cache", "v_cache", "block_table", "lengths")
CASES = [
    (1, [1], 2, 4), (1, [65, 3, 130], 3, 64), (2, [0, 1, 64], 1, 7), (1, [63, 64, 128], 2, 33), (5, [2, 9], 2, 1),
    (4, [129], 1, 65), (8, [131, 8], 2, 80), (17, [64, 17], 1, 31), (37, [200, 90], 1, 96), (1, [900], 12, 64),
]  # fmt: skip


def kernel_case(new, lengths, heads, size, dtype=torch.float32, cache=torch.float32):
    """As `case`, filled a page at a time."""
    rows, pages = len(lengths), max(1, -(-max(lengths) // PAGE))
    caches = [torch.full((rows * pages + 1, heads, PAGE, size), math.nan, dtype=cache) for _ in range(2)]
    table = (torch.randperm(rows * pages).view(rows, pages) + 1).int()
    for b, length in enumerate(lengths):
        for first in range(0, length, PAGE):
            count = min(PAGE, length - first)
            for filled in caches:
                filled[int(table[b, first // PAGE]), :, :count] = torch.randn(heads, count, size).to(cache)
    return torch.randn(rows, new, heads, size).to(dtype), *caches, table, torch.tensor(lengths, dtype=torch.int32)


def check(inputs, target, **more):
    long = ("y",) if int(inputs[4].max()) > 64 else ()
    named = dict(zip(NAMES, inputs, strict=True))
    return check_op("decode_attention", ops.decode_attention, eager, named, target, long_sums=long, **more)["y"]


def run_cpp(*inputs):
    with backend(decode_attention="cpp"):
        return ops.decode_attention(*inputs)


@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16], ids=["fp32-cache", "bf16-cache"])
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_kernel_shapes(target: Target, shape, cache):
    check(kernel_case(*shape, target.dtype, cache), target)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_kernel_layouts(target: Target, layout):
    q, k_cache, v_cache, table, lengths = kernel_case(3, [70, 64], 2, 16, target.dtype)
    both = torch.stack([k_cache, v_cache], 1)
    wide = table.long().t().contiguous().t()
    check((arrange(q, layout), both[:, 0], both[:, 1], wide, lengths.long()), target)


def test_pages_that_are_not_contiguous_take_eager():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    q, k_cache, v_cache, table, lengths = kernel_case(1, [70], 2, 16)
    strided = k_cache.transpose(1, 2).contiguous().transpose(1, 2)
    assert "not contiguous" in backend.supports("decode_attention", "cpp", (q, strided, v_cache))
    found = ops.decode_attention(q, strided, v_cache, table, lengths)
    torch.testing.assert_close(found, eager(q, k_cache, v_cache, table, lengths))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_instruction_set(isa, precision):
    target = Target("cpp", precision, "cpp")
    with testing.forced_isa(isa):
        for shape in CASES[1:9]:
            check(kernel_case(*shape, target.dtype, torch.float32 if shape[0] % 2 else torch.bfloat16), target)


@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16], ids=["fp32-cache", "bf16-cache"])
@pytest.mark.parametrize("isa", ISAS)
def test_a_query_has_the_same_bits_alone_and_among_many(isa, cache):
    """70 new tokens in one call, in chunks, one by one, and without the other rows."""
    with testing.forced_isa(isa):
        for size in (64, 33, 80):
            q, k_cache, v_cache, table, lengths = kernel_case(70, [70, 133, 200, 71, 191], 2, size, torch.float32, cache)
            whole = run_cpp(q, k_cache, v_cache, table, lengths)
            for chunk in (1, 3, 16, 21, 64) if size == 33 else (2, 64):
                for first in range(0, 70, chunk):
                    piece = q[:, first : first + chunk]
                    part = run_cpp(piece, k_cache, v_cache, table, lengths - 70 + first + piece.shape[1])
                    assert same_bits(part, whole[:, first : first + chunk].contiguous()), (size, chunk, first)
            for b in range(5):
                alone = run_cpp(q[b : b + 1], k_cache, v_cache, table[b : b + 1], lengths[b : b + 1])
                assert same_bits(alone, whole[b : b + 1].contiguous())


@pytest.mark.parametrize("isa", ISAS)
def test_one_thread_and_two_give_the_same_bits(isa):
    results, threads, inputs = [], torch.get_num_threads(), kernel_case(40, [90, 200, 64], 3, 64)
    with testing.forced_isa(isa):
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(run_cpp(*inputs))
        finally:
            torch.set_num_threads(threads)
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("new", [4, 20])
def test_kernel_keeps_a_non_finite_token_from_earlier_queries(target: Target, new, value):
    q, k_cache, v_cache, table, lengths = kernel_case(new, [70, 70], 2, 16, target.dtype)
    clean = run_cpp(q, k_cache, v_cache, table, lengths)
    for cache in ((k_cache,), (v_cache,), (k_cache, v_cache)):
        copies = [c.clone() for c in (k_cache, v_cache)]
        for copy in copies[: len(cache)] if cache[0] is k_cache else copies[1:]:
            copy[table[0, 1].item(), 1, 68 - PAGE] = value  # key 68: the last two queries of row 0 see it
        with target.force("decode_attention"):
            o = ops.decode_attention(q, *copies, table, lengths)
        reached = torch.zeros(2, new, 2, dtype=torch.bool)
        reached[0, new - 2 :, 1] = True
        assert torch.equal(~o.isfinite().all(-1), reached)
        assert same_bits(o[~reached], clean[~reached])


def test_large_scores_do_not_overflow(target: Target):
    q, *rest = kernel_case(2, [70, 100], 2, 16, target.dtype)
    check((q * 100, *rest), target)


def test_wrong_results_are_rejected():
    q, k_cache, v_cache, table, lengths = kernel_case(3, [70, 130], 2, 24)
    right = eager(q, k_cache, v_cache, table, lengths)
    exact = eager(q.double(), k_cache.double(), v_cache.double(), table, lengths)
    wrong = testing.wrong_results(right)
    wrong["a key too few"] = eager(q, k_cache, v_cache, table, lengths - 1)
    wrong["without the scale"] = eager(q, k_cache, v_cache, table, lengths, 1.0)
    wrong["first page only"] = eager(q, k_cache, v_cache, table, lengths.clamp(max=64))
    wrong["keys as values"] = eager(q, k_cache, k_cache, table, lengths)
    wrong["other row's pages"] = eager(q, k_cache, v_cache, table.flip(0), lengths.clamp(max=70))
    for what, value in wrong.items():
        testing.assert_rejected(what, value, right, exact, long_sum=True)


def test_opcheck():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    for dtype, cache in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)):
        torch.library.opcheck(torch.ops.gptfast.decode_attention.default, (*kernel_case(3, [70, 5], 2, 8, dtype, cache), 0.3))


def test_leaf_checks_its_contract():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    q, k_cache, v_cache, table, lengths = kernel_case(2, [70, 5], 2, 8)
    leaf = torch.ops.gptfast.decode_attention
    for arguments, message in (
        ((q.transpose(1, 2).contiguous().transpose(1, 2), k_cache, v_cache, table, lengths), "tokens is not contiguous"),
        ((q.double(), k_cache, v_cache, table, lengths), "allowed: fp32, bf16, fp16"),
        ((q, k_cache.half(), v_cache.half(), table, lengths), "k_cache is Half"),
        ((q, k_cache, v_cache.bfloat16(), table, lengths), "v_cache is BFloat16"),
        ((q, k_cache[:, :, :32], v_cache, table, lengths), "k_cache has shape"),
        ((q, k_cache, v_cache[1:], table, lengths), "v_cache has 4 pages"),
        ((q, k_cache, v_cache.transpose(1, 2).contiguous().transpose(1, 2), table, lengths), "v_cache has pages that are not"),
        ((q, k_cache, v_cache, table[0], lengths), "block_table has 1 dimensions"),
        ((q, k_cache, v_cache, table.float(), lengths), "block_table is Float"),
        ((q, k_cache, v_cache, table, lengths[:1]), "lengths has shape"),
        ((q, k_cache, v_cache, table, lengths + 60), "its pages hold 128"),
        ((q, k_cache, v_cache, table, lengths - 10), "lengths hold -5"),
        ((q, k_cache, v_cache, table - 5, lengths), "row [01] names page -"),
        ((q, k_cache, v_cache, table + 4, lengths), "the cache has 5"),
    ):
        with pytest.raises(RuntimeError, match=message):
            leaf(*arguments, 1.0)
    assert leaf(q[:, :0], k_cache, v_cache, table, lengths, 1.0).shape == (2, 0, 2, 8)


def test_compile_on_cpp_and_a_backend_switched():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    torch._dynamo.reset()
    inputs = kernel_case(3, [70, 64], 2, 16)
    compiled = torch.compile(lambda *a: ops.decode_attention(*a) * 2, fullgraph=True, backend="aot_eager")
    for name in ("cpp", "eager", "cpp"):
        with backend(decode_attention=name):
            found, right = compiled(*inputs), ops.decode_attention(*inputs) * 2
        torch.testing.assert_close(found, right)
        assert name == "eager" or same_bits(found, right)  # a graph has no lengths to look at: eager's has another mask
    torch._dynamo.reset()
