"""attention: the definition against the formula, documents, padding, dropout noise, non-finite tokens, the glue."""

import math

import pytest
import torch

from gptfast import Error, backend, ops, philox, testing
from gptfast.ops.attention import HEAD_SIZES, _keep, definition, eager
from gptfast.testing import LAYOUTS, Target, arrange, check_op, random, same_bits

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


# ------------------------------------------------------------------------------------------------------- kernels by the tolerance

SHAPES = [
    (1, 1, 1, 32), (2, 7, 3, 40), (1, 64, 2, 64), (2, 65, 1, 80), (1, 129, 2, 96), (2, 67, 1, 128), (1, 200, 12, 64),
    (0, 5, 2, 64), (2, 0, 2, 64), (1, 5, 0, 64)]  # fmt: skip


def three(shape, dtype, layout="contiguous", grad=True):
    return {name: arrange(random(*shape, dtype=dtype), layout).requires_grad_(grad) for name in ("q", "k", "v")}


def with_last(t):
    """The last token is compared by itself too: its dk and dv are small, and an error there would hide."""
    return {"": t, "last token": t[:, -1:]}


def check(target, inputs, **more):
    """attention against eager; dk and dv are sums over queries, dq and o over keys."""
    long = ("y", "dq", "dk", "dv") if inputs["q"].shape[1] > 64 else ()
    return check_op("attention", ops.attention, eager, inputs, target, long_sums=long, **more)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(target, shape):
    slices = dict.fromkeys(("y", "dq", "dk", "dv"), with_last) if shape[1] > 64 else None
    check(target, three(shape, target.dtype), slices=slices)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts(target, layout):
    check(target, three((2, 66, 3, 32), target.dtype, layout), grad_layout=layout)


def test_packed_in_place(target):
    """qkv [B, T, 3, H, D] is read where it lies, and has one gradient, of which each third is compared by itself."""
    packed = {"x": random(2, 70, 3, 2, 64, dtype=target.dtype).requires_grad_()}
    thirds = {"dx": lambda t: {name: t[:, :, i] for i, name in enumerate(("dq", "dk", "dv"))}}
    front, own = lambda x: ops.attention(x), lambda x: eager(*x.unbind(2))
    fast = check_op("attention", front, own, packed, target, slices=thirds, long_sums=("y", "dx"))
    assert fast["dx"].shape == packed["x"].shape and fast["dx"].is_contiguous()


@pytest.mark.parametrize("scale", [0.7, -0.3, 0.0])
def test_any_scale(target, scale):
    check(target, three((1, 70, 2, 40), target.dtype) | {"scale": scale})


def contiguous_documents(length):
    """Documents with padding between and after them, as a packed batch has them; row 1 is one document."""
    ids = torch.arange(length).repeat(2, 1) // 37
    ids[:, 90:95], ids[:, -3:], ids[1:2] = -1, -5, 2**40
    return ids


@pytest.mark.parametrize("kind", ["contiguous", "interleaved", "blocks"])
def test_documents(target, kind):
    length = 200
    ids = {
        "contiguous": contiguous_documents(length),
        "interleaved": torch.randint(-1, 3, (2, length)),
        "blocks": torch.tensor([0, 1, 1, -1]).repeat_interleave(64)[:length].expand(2, length),  # whole blocks in and out of sight
    }[kind]
    inputs = three((2, length, 2, 32), target.dtype)
    fast = check(target, inputs | {"document_ids": ids})
    for name in ("y", "dq", "dk", "dv"):
        assert not fast[name][ids < 0].any(), name


def test_documents_of_any_integer_type(target):
    """Of any strides too, and ids that agree in their lower 32 bits are two documents."""
    inputs, ids = three((2, 70, 1, 32), target.dtype, grad=False), torch.arange(70).repeat(2, 1) // 9 * 11
    with target.force("attention"):
        right = ops.attention(**inputs, document_ids=ids)
        for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
            for same in (ids.to(dtype), ids.t().contiguous().t().to(dtype), ids[:1].to(dtype).expand(2, 70)):
                assert same_bits(ops.attention(**inputs, document_ids=same), right)
        assert same_bits(ops.attention(**inputs, document_ids=ids << 32), right)


@pytest.mark.parametrize("p", [1e-12, 0.3, 0.999999999999, 1.0])
def test_dropout(target, p):
    check(target, three((2, 130, 2, 40), target.dtype) | {"dropout_p": p, "seed": SEED})


def test_dropout_drops_what_eager_drops(target):
    """With equal scores and one-hot values the output is the weights themselves."""
    q, v = (t.to(target.dtype) for t in (torch.zeros(2, 128, 3, 128), torch.eye(128)[None, :, None].expand(2, 128, 3, 128)))
    keep = _keep(q.shape, 0.4, SEED).transpose(1, 2) & torch.ones(128, 128, dtype=torch.bool).tril()[None, :, None]
    with target.force("attention"):
        o = ops.attention(q, q, v, dropout_p=0.4, seed=SEED)
    assert torch.equal(o != 0, keep)


@pytest.mark.parametrize("documents", [False, True])
def test_log_sum_exp(target, documents):
    ids = contiguous_documents(150) if documents else None
    q, k, v = (t.detach() * 3 for t in three((2, 150, 2, 64), target.dtype).values())
    with testing.poisoned():
        _, lse = backend.impl("attention", target.backend).forward(q, k, v, 0.125, ids, 0.0, None)
    own = definition(q, k, v, 0.125, ids)[1]
    testing.assert_close_to_reference(lse, own, definition(q.double(), k.double(), v.double(), 0.125, ids)[1], name="lse")


@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_instruction_set(isa, precision):
    target = Target("cpp", precision, "cpp")
    with testing.forced_isa(isa):
        for size in (32, 80, 128):
            check(target, three((1, 70, 1, size), target.dtype))
        more = {"document_ids": contiguous_documents(131), "dropout_p": 0.25, "seed": SEED}
        check(target, three((2, 131, 1, 40), target.dtype) | more)


@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_thread_and_two_give_the_same_bits(isa, dtype):
    inputs, upstream = three((1, 140, 5, 40), dtype), {"y": random(1, 140, 5, 40, dtype=dtype)}
    results, threads = [], torch.get_num_threads()
    with testing.forced_isa(isa), backend.use(attention="cpp"):
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(testing.evaluate(ops.attention, inputs, upstream=upstream))
        finally:
            torch.set_num_threads(threads)
    for name, value in results[0].items():
        assert all(same_bits(value, other[name]) for other in results[1:]), name


def gradients(target, inputs, upstream, **more):
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    with target.force("attention"):
        return testing.evaluate(lambda **a: ops.attention(**a, **more), leaves, upstream={"y": upstream})


@pytest.mark.parametrize("cut", [1, 63, 64, 101])
@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_the_past_does_not_feel_the_future(target, cut, value):
    """o and dq before a token keep their bits, whatever the tokens from there on hold."""
    inputs, upstream = three((2, 140, 2, 40), target.dtype), random(2, 140, 2, 40, dtype=target.dtype)
    later = {name: t.clone() for name, t in inputs.items()}
    for t in later.values():
        t[:, cut:] = torch.randn(t[:, cut:].shape).to(t.dtype) if value is None else value
    one, other = (gradients(target, x, upstream) for x in (inputs, later))
    for name in ("y", "dq"):
        assert same_bits(one[name][:, :cut], other[name][:, :cut]), name
        assert other[name][:, cut:].isnan().all() == (value is not None), name


@pytest.mark.parametrize(("which", "value"), [("k", math.nan), ("k", -math.inf), ("v", math.nan), ("v", math.inf)])
@pytest.mark.parametrize("extra", ["causal", "documents", "dropout"])
def test_a_token_that_is_not_finite(target, which, value, extra):
    """NaN in the rows that see it, in every column as eager has it, and nowhere else; documents end at 60 and 120."""
    ids = (torch.arange(140) // 60).repeat(2, 1)
    more = {"causal": {}, "documents": {"document_ids": ids}, "dropout": {"dropout_p": 0.3, "seed": SEED}}[extra]
    inputs = three((2, 140, 1, 32), target.dtype, grad=False)
    inputs[which][1, 70, 0, 3] = value
    fast = check(target, inputs | more)["y"]
    end = 120 if extra == "documents" else 140
    assert fast[1, 70:end].isnan().all() and fast.isnan().sum() == (end - 70) * 32


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("which", ["q", "k", "upstream"])
def test_tokens_that_no_bad_row_sees_keep_their_bits(target, which, documents):
    ids = (torch.arange(140) // 60).repeat(2, 1) if documents else None
    inputs, upstream = three((2, 140, 2, 32), target.dtype, grad=False), random(2, 140, 2, 32, dtype=target.dtype)
    clean = gradients(target, inputs, upstream, document_ids=ids)
    (upstream if which == "upstream" else inputs[which])[1, 70, 1, 3] = math.inf
    dirty = gradients(target, inputs, upstream, document_ids=ids)
    end = 120 if documents else 140
    rows = (70, end) if which == "k" else (70, 71)  # queries that are bad or see a bad token
    keys = (60 if documents else 0, rows[1])  # keys that they see
    for name, (first, last) in {"y": rows if which != "upstream" else (0, 0), "dq": rows, "dk": keys, "dv": keys}.items():
        spoiled = torch.zeros(2, 140, 2, dtype=torch.bool)
        spoiled[1, first:last, 1] = True
        assert dirty[name][spoiled].isnan().all(), name
        assert same_bits(dirty[name][~spoiled], clean[name][~spoiled]), name


def test_padding_may_hold_anything(target):
    ids = contiguous_documents(140)
    inputs, upstream = three((2, 140, 2, 32), target.dtype, grad=False), random(2, 140, 2, 32, dtype=target.dtype)
    clean = gradients(target, inputs, upstream, document_ids=ids)
    for t in (*inputs.values(), upstream):
        t[ids < 0] = math.nan
    for name, value in gradients(target, inputs, upstream, document_ids=ids).items():
        assert same_bits(value, clean[name]), name


def test_scores_that_overflow_stay_in_their_row(target):
    inputs = three((1, 70, 1, 32), torch.float32, grad=False)
    inputs["q"][0, 40], inputs["k"][0, 20] = 1e30, 1e30
    with target.force("attention"):
        o = ops.attention(**inputs)
    assert o[0, 40].isnan().all() and o[0, :40].isfinite().all()


def by_formula(q, k, v, *, mask=0, scale=None, first=0, steps=None, delta=True):
    """Attention in plain PyTorch with a fault: another mask, scale, first key or number of columns of q k, or ds without delta."""
    length, size = q.shape[1], q.shape[-1]
    qh, kh, vh = (t.transpose(1, 2).float() for t in (q, k, v))
    steps = steps or size
    s = (qh[..., :steps] @ kh[..., :steps].transpose(-1, -2)) * (size**-0.5 if scale is None else scale)
    seen = torch.ones(length, length, dtype=torch.bool).tril(mask)
    seen[0, 0] = True
    s = s.masked_fill(~seen, -math.inf)
    p = s.softmax(-1) if delta else (s - s.logsumexp(-1, keepdim=True).detach()).exp()
    return (p[..., first:] @ vh[:, :, first:]).transpose(1, 2).to(q.dtype)


WRONG = {
    "future seen": ({"mask": 1}, ("y", "dq", "dk", "dv")),
    "own token not seen": ({"mask": -1}, ("y", "dq", "dk", "dv")),
    "scale missing": ({"scale": 1.0}, ("y", "dq", "dk")),
    "first key missing": ({"first": 1}, ("y", "dv")),
    "last column of q k missing": ({"steps": 31}, ("y", "dq", "dk")),
    "delta missing": ({"delta": False}, ("dq", "dk")),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_wrong_results_are_rejected(precision):
    inputs = three((2, 70, 2, 32), testing.checks.DTYPES[precision])
    upstream = random(2, 70, 2, 32, dtype=inputs["q"].dtype)
    own = testing.evaluate(eager, inputs, upstream={"y": upstream})
    exact = {name: testing.checks.in_double(t) for name, t in inputs.items()}
    ref = testing.evaluate(eager, exact, upstream={"y": upstream.double()})
    for name, value in own.items():
        rule = {"gradient": name != "y", "long_sum": True, "slices": with_last}
        for what, wrong in testing.wrong_results(value).items():
            testing.assert_rejected(f"{name}: {what}", wrong, value, ref[name], **rule)
        block = value.clone()
        block[:, 64:] = 0
        testing.assert_rejected(f"{name}: last block of tokens unwritten", block, value, ref[name], **rule)
    for what, (fault, names) in WRONG.items():
        found = testing.evaluate(lambda fault=fault, **a: by_formula(**a, **fault), inputs, upstream={"y": upstream})
        for name in names:
            testing.assert_rejected(f"{name}: {what}", found[name], own[name], ref[name], gradient=name != "y", long_sum=True)
    right = testing.evaluate(by_formula, inputs, upstream={"y": upstream})
    for name in own:
        testing.assert_close_to_reference(right[name], own[name], ref[name], gradient=name != "y", long_sum=True)


# ---------------------------------------------------------------------------------------------------- dispatcher, compile, errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("documents", "p"), [(None, 0.0), (DOCUMENTS, 0.3)])
def test_opcheck(dtype, documents, p):
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    leaves = torch.ops.gptfast
    q, k, v = random(2, 7, 3, 2, 32, dtype=dtype).unbind(2)
    seed = SEED if p else None
    o, lse = leaves.attention(q, k, v, 0.2, documents, p, seed)
    torch.library.opcheck(leaves.attention.default, (q, k, v, 0.2, documents, p, seed))
    torch.library.opcheck(leaves.attention_backward.default, (torch.randn_like(o), q, k, v, o, lse, 0.2, documents, p, seed, True))


def test_leaf_checks_its_contract():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    x, rest = torch.randn(2, 7, 2, 32), (0.2, None, 0.0, None)
    turned = x.transpose(2, 3).contiguous().transpose(2, 3)
    o, lse = torch.ops.gptfast.attention(x, x, x, *rest)
    for arguments, message in (
        ((x[0], x[0], x[0], *rest), "needs 4: .B, T, H, D."),
        ((x.double(), x.double(), x.double(), *rest), "allowed: fp32, bf16, fp16"),
        ((x, x[:, :6], x, *rest), "k has shape"),
        ((x, x, x.bfloat16(), *rest), "v is"),
        ((x, turned, x, *rest), "k has strides"),
        ((turned, x, x, *rest), "q has strides"),
        ((x[..., :16], x[..., :16], x[..., :16], *rest), "the head size is 16, allowed: 32, 40"),
        ((x, x, x, 0.2, DOCUMENTS[:, :6], 0.0, None), "document_ids has shape"),
        ((x, x, x, 0.2, DOCUMENTS.float(), 0.0, None), "document_ids is"),
        ((x, x, x, 0.2, None, 1.5, SEED), "dropout_p is 1.5"),
        ((x, x, x, 0.2, None, -0.5, SEED), "dropout_p is -0.5"),
        ((x, x, x, 0.2, None, 0.5, None), "there is no seed"),
        ((x, x, x, 0.2, None, 0.5, SEED.int()), "seed is"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.gptfast.attention(*arguments)
    for (do, out, statistics), message in (
        ((turned, o, lse), "do is not contiguous"), ((x.bfloat16(), o, lse), "do is"), ((x, o[:, :6], lse), "o has shape"),
        ((x, o.bfloat16(), lse), "o is"), ((x, o, lse[:, :1]), "lse has shape"), ((x, o, lse.double()), "lse is"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            torch.ops.gptfast.attention_backward(do, x, x, x, out, statistics, *rest, False)


def test_compiled_kernels_and_a_switch_of_backend(compiled):
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    function = compiled(lambda q, k, v: ops.attention(q, k, v))
    inputs = three((1, 7, 2, 32), torch.float32)
    upstream = {"y": torch.randn(1, 7, 2, 32)}
    results = []
    for name in ("cpp", "eager", "cpp"):
        with backend.use(attention=name):
            results.append(testing.evaluate(function, inputs, upstream=upstream))
            plain = testing.evaluate(ops.attention, inputs, upstream=upstream)
        assert all(same_bits(results[-1][key], plain[key]) for key in plain if key == "y" or name == "cpp"), name
    assert any(not same_bits(results[0][key], results[1][key]) for key in results[0])
