"""cross_entropy_: loss, the gradient it leaves behind and the gradient it hands on, against cross_entropy."""

import pytest
import torch

from gptfast import Error, backend, ops

pytestmark = pytest.mark.usefixtures("eager")
TARGETS = torch.tensor([3, -100, 0, 5, -100, 8, 8, 1])
SCALE = torch.tensor([0.37])


def formula_of(logits, targets, ignore_index, vocab, scale):
    assert logits.dim() == 2 and logits.is_contiguous() and scale.shape == (1,)
    ignored = targets == ignore_index
    lse = logits[:, :vocab].logsumexp(1)
    loss = torch.where(ignored, 0, lse - logits.gather(1, torch.where(ignored, 0, targets)[:, None])[:, 0])
    columns = torch.arange(logits.shape[1])
    p = (torch.exp(logits - lse[:, None]) - (columns == targets[:, None]).to(logits.dtype)) * scale
    logits.copy_(torch.where(ignored[:, None] | (columns >= vocab), 0, p))
    return loss


def pure(x, weight, targets, scale, reduction):
    loss = ops.cross_entropy(x @ weight, targets, vocab=9, reduction=reduction)
    return loss if scale is None else loss * scale.double() if reduction == "none" else loss * scale.double()[0]


def in_place(x, weight, targets, scale, reduction):
    return ops.cross_entropy_(x @ weight, targets, vocab=9, scale=scale, reduction=reduction)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("scale", [None, SCALE])
@pytest.mark.parametrize("upstream", ["dense", "expanded"])
@pytest.mark.parametrize("which", ["eager", "formula"])
def test_equals_cross_entropy(formula, same, reduction, scale, upstream, which):
    inputs = [torch.randn(8, 5).double(), torch.randn(5, 13).double(), TARGETS, scale, reduction]
    with backend("eager") if which == "eager" else formula("cross_entropy_", formula_of):
        same(in_place, pure, inputs, [True, True, False, False, False], upstream)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_left_in_the_logits(dtype):
    logits = torch.randn(8, 13).to(dtype)
    leaf = logits.clone().requires_grad_()
    wanted = ops.cross_entropy(leaf, TARGETS, vocab=9, reduction="sum") * SCALE[0]
    loss = ops.cross_entropy_(logits, TARGETS, vocab=9, scale=SCALE)
    torch.testing.assert_close(loss, wanted.detach())
    torch.testing.assert_close(logits, torch.autograd.grad(wanted, leaf)[0])
    assert not logits[:, 9:].any() and not logits[TARGETS == -100].any()


def test_gradient_is_the_memory_of_the_logits_and_goes_out_once():
    x = torch.randn(8, 13, requires_grad=True)
    logits = x * 1
    loss = ops.cross_entropy_(logits, TARGETS)
    address = []
    logits_grad = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    address.append(logits_grad.data_ptr() == logits.data_ptr())
    assert address == [True]
    with pytest.raises(Error, match="cross_entropy_: a second backward"):
        loss.backward()


def test_an_op_that_still_needs_the_logits_notices():
    x = torch.randn(8, 13, requires_grad=True)
    logits = x.exp()  # its backward reads its result
    loss = ops.cross_entropy_(logits, TARGETS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("which", ["eager", "formula"])
def test_all_ignored(formula, which):
    x = torch.randn(3, 9, requires_grad=True)
    with backend("eager") if which == "eager" else formula("cross_entropy_", formula_of):
        loss = ops.cross_entropy_(x * 1, torch.full((3,), -100))
        assert loss == 0 and not torch.autograd.grad(loss, x)[0].any()
        assert ops.cross_entropy_(x * 1, torch.full((3,), -100), reduction="mean").isnan()


@pytest.mark.parametrize("shape", [(0, 9), (2, 0, 9), (9,), (1, 1)])
def test_sizes(same, shape):
    inputs = [torch.randn(shape).double(), torch.zeros(shape[:-1], dtype=torch.int64)]
    same(lambda x, t: ops.cross_entropy_(x * 1, t), lambda x, t: ops.cross_entropy(x, t, reduction="sum"), inputs)


@pytest.mark.parametrize("which", ["eager", "formula"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_compile(formula, compiled, same, which, reduction):
    inputs = [torch.randn(8, 5).double(), torch.randn(5, 13).double(), TARGETS, SCALE, reduction]
    with backend("eager") if which == "eager" else formula("cross_entropy_", formula_of):
        same(compiled(in_place), pure, inputs, [True, True, False, False, False])


def test_bad_input():
    x = torch.randn(8, 13, requires_grad=True)
    with pytest.raises(Error, match="logits is a leaf that requires grad"):
        ops.cross_entropy_(x, TARGETS)
    with pytest.raises(Error, match=r"logits have strides \(1, 8\)"):
        ops.cross_entropy_(torch.randn(13, 8).t(), TARGETS)
    for scale in (torch.ones(2), torch.ones(1, dtype=torch.int64), torch.ones(1, requires_grad=True)):
        with pytest.raises(Error, match="cross_entropy_: scale is"):
            ops.cross_entropy_(x * 1, TARGETS, scale=scale)
