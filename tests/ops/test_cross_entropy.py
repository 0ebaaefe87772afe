"""cross_entropy: the definition against the formula, ignored targets, padded vocabulary, reductions, the glue."""

import math

import pytest
import torch

from gptfast import Error, backend, ops
from gptfast.ops.cross_entropy import eager

pytestmark = pytest.mark.usefixtures("eager")
TARGETS = torch.tensor([[3, -100, 0, 5], [-100, 8, 8, 1]])


def forward(logits, targets, ignore_index, vocab):
    assert logits.dim() == 2 and logits.is_contiguous() and targets.shape == logits.shape[:1] and targets.is_contiguous()
    x = logits[:, :vocab]
    lse = x.logsumexp(1)
    target = torch.where(targets == ignore_index, 0, targets).long()
    return torch.where(targets == ignore_index, 0, lse - x.gather(1, target[:, None])[:, 0]), lse


def backward(dloss, logits, targets, lse, ignore_index, vocab):
    assert dloss.is_contiguous() and dloss.shape == lse.shape
    p = torch.exp(logits - lse[:, None])
    p = p - (torch.arange(logits.shape[1]) == targets[:, None]).to(p.dtype)
    p = torch.where((targets == ignore_index)[:, None] | (torch.arange(logits.shape[1]) >= vocab), 0, p)
    return dloss[:, None] * p


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("vocab", [None, 9])
@pytest.mark.parametrize("upstream", ["dense", "transposed", "expanded"])
def test_formula(formula, same, reduction, vocab, upstream):
    inputs = [torch.randn(2, 4, 13).double() * 3, TARGETS, -100, vocab, reduction]
    with formula("cross_entropy", forward, backward):
        same(ops.cross_entropy, eager, inputs, upstream=upstream)


def test_padded_columns_and_ignored_rows_take_no_gradient():
    logits = torch.randn(2, 4, 13, requires_grad=True)
    with torch.no_grad():
        logits[..., 9:] = math.inf  # whatever lies there
    (g,) = torch.autograd.grad(ops.cross_entropy(logits, TARGETS, vocab=9), logits)
    assert not g[..., 9:].any() and not g[TARGETS == -100].any() and g[TARGETS != -100][:, :9].all()
    wanted = torch.nn.functional.cross_entropy(logits[..., :9].flatten(0, 1), TARGETS.flatten())
    assert torch.equal(ops.cross_entropy(logits, TARGETS, vocab=9), wanted)


@pytest.mark.parametrize("index", [-100, 7, -1])
@pytest.mark.parametrize("context", ["eager", "formula"])
def test_all_ignored(formula, index, context):
    logits, targets = torch.randn(3, 9, requires_grad=True), torch.full((3,), index)
    with backend("eager") if context == "eager" else formula("cross_entropy", forward, backward):
        loss = ops.cross_entropy(logits, targets, index, reduction="sum")
        assert loss == 0 and not torch.autograd.grad(loss, logits)[0].any()
        assert ops.cross_entropy(logits, targets, index).isnan()
        assert not ops.cross_entropy(logits, targets, index, reduction="none").any()


@pytest.mark.parametrize("shape", [(0, 9), (2, 0, 9), (9,), (1, 1)])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_sizes(formula, same, shape, reduction):
    inputs = [torch.randn(shape).double(), torch.zeros(shape[:-1], dtype=torch.int64), -100, None, reduction]
    with formula("cross_entropy", forward, backward):
        same(ops.cross_entropy, eager, inputs)


def test_strided_and_expanded_logits(formula, same):
    def through(op):
        return lambda x, t: op(x.transpose(0, 1)[..., ::2], t, -100, 9) + op(x[:1, :1].expand(4, 2, 26), t)

    with formula("cross_entropy", forward, backward):
        same(through(ops.cross_entropy), through(eager), [torch.randn(2, 4, 26).double(), TARGETS.t()])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction):
    logits = torch.randn(2, 4, 11, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.cross_entropy(x, TARGETS, vocab=9, reduction=reduction), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_are_computed_in_fp32(dtype):
    logits = torch.randn(8, 50, requires_grad=True)
    low, targets = logits.detach().to(dtype).requires_grad_(), torch.randint(0, 50, (8,), dtype=torch.int32)
    with torch.autocast("cpu", dtype):
        loss = ops.cross_entropy(low, targets)
    assert loss.dtype == torch.float32 and torch.equal(loss, ops.cross_entropy(low.float(), targets))
    assert torch.autograd.grad(loss, low)[0].dtype == dtype


def test_shift_changes_nothing_and_large_logits_stay_finite():
    logits = torch.randn(2, 4, 13).double()
    torch.testing.assert_close(ops.cross_entropy(logits + 1e4, TARGETS), ops.cross_entropy(logits, TARGETS))
    assert ops.cross_entropy(logits * 1e300, TARGETS).isfinite()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile(formula, compiled, same, reduction):
    inputs = [torch.randn(2, 4, 13).double(), TARGETS, -100, 9, reduction]
    same(compiled(lambda *a: ops.cross_entropy(*a)), eager, inputs)
    torch._dynamo.reset()
    with formula("cross_entropy", forward, backward):
        same(compiled(lambda *a: ops.cross_entropy(*a)), eager, inputs)


@pytest.mark.parametrize("op", [ops.cross_entropy, lambda x, *a, **k: ops.cross_entropy_(x.clone(), *a, **k),
                                lambda x, *a, **k: ops.linear_cross_entropy(x, torch.eye(13), *a, **k)])
def test_bad_input(op):
    logits = torch.randn(2, 4, 13)
    for wrong in (9, -1, 13):
        with pytest.raises(Error, match=f"targets holds {wrong}; allowed: 0 to 8"):
            op(logits, torch.where(TARGETS == 5, wrong, TARGETS), vocab=9)
    with pytest.raises(Error, match=r"targets have shape \(2, 3\), needed is \(2, 4\)"):
        op(logits, TARGETS[:, :3])
    with pytest.raises(Error, match="reduction is 'avg'; allowed: mean, sum, none"):
        op(logits, TARGETS, reduction="avg")
    for vocab in (0, 14):
        with pytest.raises(Error, match=f"vocab is {vocab}; allowed: 1 to 13"):
            op(logits, TARGETS, vocab=vocab)
    with pytest.raises(Error, match="targets has dtype float32"):
        op(logits, TARGETS.float())
