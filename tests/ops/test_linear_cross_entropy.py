"""linear_cross_entropy: the definition against linear and cross_entropy, the glue of kernels that know gradients in forward."""

import pytest
import torch

from gptfast import Error, backend, ops
from gptfast.ops.linear_cross_entropy import eager

pytestmark = pytest.mark.usefixtures("eager")
TARGETS = torch.tensor([[3, -100, 0, 5], [-100, 8, 8, 1]])
SCALE = torch.tensor([0.37])


def formula_of(x, weight, targets, ignore_index, vocab, scale, chunks, need_grad):
    assert x.dim() == 2 and x.is_contiguous() and weight.is_contiguous() and scale.shape == (1,) and isinstance(need_grad, bool)
    dx, dweight, losses, lses = torch.zeros_like(x), torch.zeros_like(weight), [], []
    for rows, gradient, wanted in zip(x.tensor_split(chunks), dx.tensor_split(chunks), targets.tensor_split(chunks), strict=True):
        ignored = wanted == ignore_index
        logits = rows @ weight[:vocab].t()
        lses.append(logits.logsumexp(1))
        onehot = torch.arange(vocab) == wanted[:, None]
        losses.append(torch.where(ignored, 0, lses[-1] - (logits * onehot).sum(1)))
        p = torch.where(ignored[:, None], 0, torch.exp(logits - lses[-1][:, None]) - onehot.to(x.dtype)) * scale
        gradient.copy_(p @ weight[:vocab])
        dweight[:vocab] += p.t() @ rows
    return torch.cat(losses), torch.cat(lses), dx if need_grad else None, dweight if need_grad else None


def composed(x, weight, targets, ignore_index=-100, vocab=None, scale=None, reduction="mean", chunks=8):
    loss = ops.cross_entropy(ops.linear(x, weight), targets, ignore_index, vocab, reduction)
    return loss if scale is None else loss * scale if reduction == "none" else loss * scale[0]


def case(reduction="sum", scale=None, vocab=9, chunks=3):
    return [torch.randn(2, 4, 5).double(), torch.randn(13, 5).double(), TARGETS, -100, vocab, scale, reduction, chunks]


WANTED = [True, True, *[False] * 6]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("scale", [None, SCALE.double()])
@pytest.mark.parametrize("vocab", [None, 9])
def test_definition(same, reduction, scale, vocab):
    same(ops.linear_cross_entropy, composed, case(reduction, scale, vocab), WANTED)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("scale", [None, SCALE.double()])
@pytest.mark.parametrize("chunks", [1, 3, 100])
def test_formula(formula, same, reduction, scale, chunks):
    with formula("linear_cross_entropy", formula_of):
        same(ops.linear_cross_entropy, eager, case(reduction, scale, chunks=chunks), WANTED)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_formula_without_gradients(formula, reduction):
    inputs, seen = case(reduction, SCALE), []
    with formula("linear_cross_entropy", lambda *a: (seen.append(a[-1]), formula_of(*a))[1]):
        torch.testing.assert_close(ops.linear_cross_entropy(*inputs), eager(*inputs))
    assert seen == [False]


@pytest.mark.parametrize("one", range(2))
def test_gradient_of_one_input(formula, same, one):
    with formula("linear_cross_entropy", formula_of):
        same(ops.linear_cross_entropy, eager, case(), [i == one for i in range(8)])


def test_strided_inputs(formula, same):
    def through(op):
        return lambda x, w: op(x.transpose(0, 1)[..., ::2], w.t(), TARGETS.t(), reduction="sum")

    with formula("linear_cross_entropy", formula_of):
        same(through(ops.linear_cross_entropy), through(eager), [torch.randn(2, 4, 10).double(), torch.randn(5, 13).double()])


def test_second_backward_is_refused(formula):
    x, weight, *rest = case()
    x.requires_grad_()
    with formula("linear_cross_entropy", formula_of):
        loss = ops.linear_cross_entropy(x, weight, *rest)
    loss.backward(retain_graph=True)
    with pytest.raises(Error, match="linear_cross_entropy: a second backward"):
        loss.backward()


@pytest.mark.parametrize("which", ["eager", "formula"])
def test_all_ignored(formula, which):
    x, weight = torch.randn(3, 5, requires_grad=True), torch.randn(9, 5, requires_grad=True)
    with backend("eager") if which == "eager" else formula("linear_cross_entropy", formula_of):
        loss = ops.linear_cross_entropy(x, weight, torch.full((3,), -100), reduction="sum")
        assert loss == 0 and not any(g.any() for g in torch.autograd.grad(loss, (x, weight)))
        assert ops.linear_cross_entropy(x, weight, torch.full((3,), -100)).isnan()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (5,), (1, 1)])
def test_sizes(formula, same, shape):
    targets = torch.zeros(shape[:-1], dtype=torch.int64)
    inputs = [torch.randn(shape).double(), torch.randn(9, shape[-1]).double(), targets, -100, None, None, "sum", 2]
    with formula("linear_cross_entropy", formula_of):
        same(ops.linear_cross_entropy, eager, inputs, WANTED)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction):
    x, weight, *rest = case(reduction, SCALE)
    assert torch.autograd.gradcheck(lambda *a: ops.linear_cross_entropy(*a, *rest), (x.requires_grad_(), weight.requires_grad_()))


def test_autocast_and_dtypes(formula):
    x, weight = torch.randn(2, 4, 5, requires_grad=True), torch.randn(13, 5, requires_grad=True)
    seen = []
    for context in (backend("eager"), formula("linear_cross_entropy", lambda *a: (
            seen.extend(t.dtype for t in a[:2]), formula_of(a[0].float(), a[1].float(), *a[2:]))[1])):
        with context, torch.autocast("cpu", torch.bfloat16):
            loss = ops.linear_cross_entropy(x, weight, TARGETS)
            logits = torch.nn.functional.linear(x, weight)
        assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
        torch.testing.assert_close(loss, ops.cross_entropy(logits, TARGETS), rtol=1e-2, atol=0)
        assert [g.dtype for g in torch.autograd.grad(loss, (x, weight))] == [torch.float32] * 2
    assert seen == [torch.bfloat16] * 2


@pytest.mark.parametrize("which", ["eager", "formula"])
def test_compile(formula, compiled, same, which):
    with backend("eager") if which == "eager" else formula("linear_cross_entropy", formula_of):
        same(compiled(lambda *a: ops.linear_cross_entropy(*a)), composed, case("mean", SCALE.double()), WANTED)


def test_kernels_have_no_gradients_of_each_loss(monkeypatch):
    monkeypatch.setitem(backend._missing, ("linear_cross_entropy", "cpp"), None)
    x, weight = torch.randn(3, 5, requires_grad=True), torch.randn(9, 5)
    with backend(linear_cross_entropy="cpp"), pytest.raises(Error, match='cannot run: gradients of reduction "none"'):
        ops.linear_cross_entropy(x, weight, torch.zeros(3, dtype=torch.int64), reduction="none")
    with backend("cpp"):
        assert ops.linear_cross_entropy(x, weight, torch.zeros(3, dtype=torch.int64), reduction="none").shape == (3,)


def test_bad_input():
    x, weight, targets, *_ = case()
    with pytest.raises(Error, match=r"weight has shape \(13, 4\), x \(2, 4, 5\)"):
        ops.linear_cross_entropy(x, weight[:, :4], targets)
    with pytest.raises(Error, match="chunks is 0; allowed: 1 and more"):
        ops.linear_cross_entropy(x, weight, targets, chunks=0)
    with pytest.raises(Error, match="linear_cross_entropy: scale is"):
        ops.linear_cross_entropy(x, weight, targets, scale=torch.ones(2))
