"""attention: the definition against the formula, documents, padding, dropout noise, non-finite tokens, the glue."""

import math

import pytest
import torch

from gptfast import Error, backend, ops, philox
from gptfast.ops.attention import HEAD_SIZES, definition, eager

pytestmark = pytest.mark.usefixtures("eager")
SEED = torch.tensor([2**40 + 11])
DOCUMENTS = torch.tensor([[-1, -1, 0, 0, 1, 1, 1], [4, 4, 4, 4, 4, 9, -1]])


def weights(q, k, scale, document_ids, dropout_p, seed):
    """(p, p after dropout, lse) [B, H, T, T], one query at a time."""
    batch, length, heads, _ = q.shape
    p = torch.zeros(batch, heads, length, length, dtype=q.dtype)
    dropped, lse = torch.zeros_like(p), torch.full((batch, heads, length), -math.inf, dtype=q.dtype)
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                ids = torch.zeros(length) if document_ids is None else document_ids[b]
                if ids[i] < 0:
                    continue
                js = [j for j in range(i + 1) if ids[j] == ids[i]]
                s = scale * (k[b, js, h] @ q[b, i, h])
                lse[b, h, i] = s.logsumexp(0)
                p[b, h, i, js] = torch.exp(s - lse[b, h, i])
                for j in js:
                    if dropout_p == 0 or int(philox.words(int(seed), j, i, b * heads + h, 1)) >= dropout_p * 2**32:
                        dropped[b, h, i, j] = p[b, h, i, j] / (1 - dropout_p)
    return p, dropped, lse


def forward(q, k, v, scale, document_ids, dropout_p, seed):
    assert all(t.stride(-1) == 1 for t in (q, k, v))
    _, dropped, lse = weights(q, k, scale, document_ids, dropout_p, seed)
    return torch.einsum("bhij,bjhd->bihd", dropped, v), lse


def backward(do, q, k, v, o, lse, scale, document_ids, dropout_p, seed, deterministic):
    assert do.is_contiguous() and isinstance(deterministic, bool)
    p, dropped, again = weights(q, k, scale, document_ids, dropout_p, seed)
    assert torch.equal(lse, again)
    keep = torch.where(p > 0, dropped / p.clamp(min=1e-300), 0)
    dp = torch.einsum("bihd,bjhd->bhij", do, v) * keep
    ds = p * (dp - (do * o).sum(-1).transpose(1, 2)[..., None])
    dq, dk = scale * torch.einsum("bhij,bjhd->bihd", ds, k), scale * torch.einsum("bhij,bihd->bjhd", ds, q)
    return torch.stack([dq, dk, torch.einsum("bhij,bihd->bjhd", dropped, do)], dim=2)


def tokens(batch=2, length=7, heads=2, size=4, dtype=torch.float64):
    return [torch.randn(batch, length, heads, size).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("upstream", ["dense", "transposed", "expanded"])
@pytest.mark.parametrize(("documents", "p"), [(None, 0.0), (DOCUMENTS, 0.0), (None, 0.4), (DOCUMENTS, 0.4)])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_formula(formula, same, upstream, documents, p, scale):
    inputs = [*tokens(), scale, documents, p, SEED if p else None]
    with formula("attention", forward, backward):
        same(ops.attention, eager, inputs, upstream=upstream)


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_definition_and_its_log_sum_exp(documents):
    q, k, v = tokens()
    o, lse = definition(q, k, v, 0.5, documents)
    torch.testing.assert_close(o, eager(q, k, v, 0.5, documents), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, weights(q, k, 0.5, documents, 0.0, None)[2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("one", range(3))
def test_gradient_of_one_input(formula, same, one):
    with formula("attention", forward, backward):
        same(ops.attention, eager, tokens(), [i == one for i in range(3)])


def test_packed_and_strided(formula, same):
    packed = torch.randn(2, 7, 3 * 2 * 4).double()

    def views(x):
        return ops.attention(*x.view(2, 7, 3, 2, 4).unbind(2))

    def columns(x):  # last stride 2
        return ops.attention(*(x.view(2, 7, 2, 3 * 4).transpose(2, 3)[:, :, i::3].transpose(2, 3) for i in range(3)))

    with formula("attention", forward, backward):
        same(lambda x: ops.attention(x.view(2, 7, 3, 2, 4)), lambda x: eager(*x.view(2, 7, 3, 2, 4).unbind(2)), [packed])
        same(views, lambda x: ops.attention(x.view(2, 7, 3, 2, 4)), [packed])
        fast = columns(packed)
    assert torch.allclose(fast, columns(packed), rtol=1e-12)
    same(lambda x: ops.attention(x.view(2, 7, 3, 2, 4)), views, [packed])


@pytest.mark.parametrize("shape", [(0, 5, 2, 4), (2, 0, 2, 4), (1, 1, 1, 3), (1, 5, 0, 4)])
def test_sizes(formula, same, shape):
    with formula("attention", forward, backward):
        same(ops.attention, eager, [torch.randn(shape).double() for _ in range(3)])


@pytest.mark.parametrize(("documents", "p"), [(None, 0.0), (DOCUMENTS, 0.3)])
def test_gradcheck(documents, p):
    inputs = [t[:, :, :1].requires_grad_() for t in tokens()]
    assert torch.autograd.gradcheck(lambda *a: ops.attention(*a, None, documents, p, SEED), inputs)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_padding_gives_zero_and_takes_nothing(p):
    q, k, v = (t.requires_grad_() for t in tokens())
    o = ops.attention(q, k, v, None, DOCUMENTS, p, SEED)
    padding = DOCUMENTS < 0
    assert not o[padding].any() and (p > 0 or o[~padding].all())
    for g in torch.autograd.grad(o, (q, k, v), torch.randn_like(o)):
        assert not g[padding].any()
    poisoned = [t.detach().clone() for t in (q, k, v)]
    for t in poisoned:
        t[padding] = math.nan
    leaves = [t.requires_grad_() for t in poisoned]
    again = ops.attention(*leaves, None, DOCUMENTS, p, SEED)
    torch.testing.assert_close(again, o)
    assert all(g.isfinite().all() for g in torch.autograd.grad(again.sum(), leaves))


def test_documents_do_not_see_each_other():
    q, k, v = tokens(1, 6)
    apart = torch.cat([ops.attention(*(t[:, :4] for t in (q, k, v))), ops.attention(*(t[:, 4:] for t in (q, k, v)))], 1)
    torch.testing.assert_close(ops.attention(q, k, v, document_ids=torch.tensor([[3, 3, 3, 3, 5, 5]])), apart)


def test_one_document_a_row_is_none():
    q, k, v = tokens()
    for ids in (torch.zeros(2, 7, dtype=torch.int32), torch.tensor([[3], [8]]).expand(2, 7)):
        assert torch.equal(ops.attention(q, k, v, document_ids=ids), ops.attention(q, k, v))
    assert not ops.attention(q, k, v, document_ids=torch.tensor([[0], [-1]]).expand(2, 7))[1].any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_non_finite_token_never_reaches_earlier_rows(value, which, dtype):
    clean = tokens(2, 70, 2, 32, dtype)
    dirty = [t.clone() for t in clean]
    dirty[which][1, 40, 1, 3] = value
    documents = torch.zeros(2, 70, dtype=torch.int64)
    documents[:, 60:] = 1
    for extra in ((), (documents,), (None, 0.5, SEED)):
        arguments = (None, *extra)
        o, wanted = ops.attention(*dirty, *arguments), ops.attention(*clean, *arguments)
        finite = o.isfinite().all(-1)
        assert finite[0].all() and finite[1, :40].all() and finite[1, :, 0].all()
        torch.testing.assert_close(o[1, :40], wanted[1, :40])
        if which > 0:
            assert not finite[1, 40:60, 1].any()
        if extra and extra[0] is not None:
            assert finite[1, 60:].all()


def test_a_non_finite_token_under_compile(compiled):
    clean = tokens(1, 6, 1, 4, torch.float32)
    clean[2][0, 4, 0, 1] = math.nan
    o = compiled(lambda *a: ops.attention(*a))(*clean)
    assert o[0, :4].isfinite().all() and o[0, 4:].isnan().all()


def test_causality():
    q, k, v = tokens()
    later = [torch.cat([t[:, :4], torch.randn_like(t[:, 4:])], 1) for t in (q, k, v)]
    assert torch.equal(ops.attention(q, k, v)[:, :4], ops.attention(*later)[:, :4])


def test_the_boundary_of_dropout_is_exact():
    word = int(philox.words(int(SEED), 0, 0, 0, 1))
    x = torch.ones(1, 1, 1, 1)
    assert ops.attention(x, x, x, dropout_p=word / 2**32, seed=SEED) != 0
    assert ops.attention(x, x, x, dropout_p=(word + 1) / 2**32, seed=SEED) == 0


def test_share_of_dropped_weights():
    q, k, v = torch.zeros(1, 200, 2, 2), torch.zeros(1, 200, 2, 2), torch.ones(1, 200, 2, 2)
    o = ops.attention(q, k, v, dropout_p=0.25, seed=SEED)
    kept = o[0, :, :, 0] * 0.75 * torch.arange(1, 201)[:, None]  # how many keys each query kept
    assert torch.allclose(kept, kept.round(), atol=1e-2)
    total = 2 * 200 * 201 / 2
    assert abs(float(kept.sum()) / total - 0.75) < 5 * math.sqrt(0.25 * 0.75 / total)
    assert not torch.equal(o[0, :, 0], o[0, :, 1])


def test_autocast(formula):
    q, k, v = (t.requires_grad_() for t in tokens(dtype=torch.float32))
    seen = []

    def watch(*arguments):
        seen.extend(t.dtype for t in arguments[:3])
        o, lse = forward(*arguments)
        return o, lse

    with torch.autocast("cpu", torch.bfloat16):
        o = ops.attention(q, k, v)
        with formula("attention", watch):
            assert ops.attention(q, k, v).dtype == torch.bfloat16
    assert o.dtype == torch.bfloat16 and seen == [torch.bfloat16] * 3
    assert torch.autograd.grad(o.sum(), q)[0].dtype == torch.float32


@pytest.mark.parametrize(("documents", "p"), [(None, 0.0), (DOCUMENTS, 0.0), (DOCUMENTS, 0.5)])
def test_compile(compiled, same, documents, p):
    same(compiled(lambda *a: ops.attention(*a)), eager, [*tokens(), None, documents, p, SEED])


def test_compile_of_the_glue(formula, compiled, same):
    def simple_backward(do, q, k, v, o, lse, *rest):
        return torch.stack([do * q, do * k, do * v * lse.transpose(1, 2)[..., None]], 2)

    with formula("attention", lambda *a: definition(*a), simple_backward):
        same(compiled(lambda q, k, v: ops.attention(q, k, v)), lambda q, k, v: ops.attention(q, k, v), tokens())
        same(compiled(lambda x: ops.attention(x)), lambda x: ops.attention(x), [torch.randn(2, 7, 3, 2, 4).double()])


def test_limits_of_kernels(monkeypatch):
    monkeypatch.setitem(backend._missing, ("attention", "cpp"), None)
    for size in (*HEAD_SIZES, 48):
        x = torch.randn(1, 2, 1, size)
        reason = backend.supports("attention", "cpp", (x, x, x))
        assert reason == (None if size != 48 else "head size 48; kernels take 32, 40, 64, 80, 96, 128")
    x = x[..., :32].double()
    assert backend.supports("attention", "cpp", (x, x, x)) == "float64; kernels take float32, bfloat16, float16"
    with backend(attention="cpp"), pytest.raises(Error, match="attention: backend cpp was forced and cannot run: float64"):
        ops.attention(x, x, x)


def test_bad_input():
    q, k, v = tokens()
    with pytest.raises(Error, match=r"q, k, v have shapes \(2, 7, 2, 4\), \(2, 6, 2, 4\), \(2, 7, 2, 4\)"):
        ops.attention(q, k[:, :6], v)
    with pytest.raises(Error, match=r"q has shape .* without k and v"):
        ops.attention(q)
    with pytest.raises(Error, match=r"document_ids have shape \(2, 6\), needed is \(2, 7\)"):
        ops.attention(q, k, v, document_ids=DOCUMENTS[:, :6])
    with pytest.raises(Error, match="attention: the dropout seed is None"):
        ops.attention(q, k, v, dropout_p=0.1)
    with pytest.raises(Error, match="the dtypes differ"):
        ops.attention(q, k.float(), v)
