"""linear: the definition against the formula, the glue, layouts, edge cases."""

import pytest
import torch

from gptfast import Error, backend, ops
from gptfast.ops.linear import eager

pytestmark = pytest.mark.usefixtures("eager")


def forward(x, weight, bias):
    assert x.dim() == 2 and x.is_contiguous()
    y = torch.einsum("nk,mk->nm", x, weight)
    return y if bias is None else y + bias


def backward(dy, x, weight):
    assert dy.is_contiguous()
    return dy @ weight, dy.t() @ x, dy.sum(0)


@pytest.mark.parametrize("upstream", ["dense", "transposed", "expanded"])
@pytest.mark.parametrize("biased", [True, False])
def test_formula(formula, same, biased, upstream):
    inputs = [torch.randn(3, 5, 7).double(), torch.randn(4, 7).double(), torch.randn(4).double() if biased else None]
    with formula("linear", forward, backward):
        same(ops.linear, eager, inputs, upstream=upstream)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradient_of_one_input(formula, same, wanted):
    inputs = [torch.randn(5, 7).double(), torch.randn(4, 7).double(), torch.randn(4).double()]
    with formula("linear", forward, backward):
        same(ops.linear, eager, inputs, wanted)


def test_conv1d_weight_and_strided_input(formula, same):
    x, weight = torch.randn(7, 10).double(), torch.randn(7, 4).double()
    with formula("linear", forward, backward):
        same(lambda x, w: ops.linear(x.t()[::2], w.t()), lambda x, w: eager(x.t()[::2], w.t()), [x, weight])


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7), (7,), (1, 1, 7), (3, 0)])
def test_sizes(formula, same, shape):
    inputs = [torch.randn(shape).double(), torch.randn(4, shape[-1]).double(), torch.randn(4).double()]
    with formula("linear", forward, backward):
        same(ops.linear, eager, inputs)


def test_gradcheck():
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5), (4, 5), (4,))]
    assert torch.autograd.gradcheck(ops.linear, inputs)


def test_gradients_have_the_dtype_of_their_inputs(formula):
    x = torch.randn(3, 5).bfloat16().requires_grad_()
    weight, bias = torch.randn(4, 5).requires_grad_(), torch.randn(4).requires_grad_()
    for context in (backend("eager"), formula("linear", lambda x, w, b: x @ w.to(x.dtype).t(), lambda dy, x, w: (
        dy @ w.to(dy.dtype), dy.t().float() @ x.float(), dy.float().sum(0)))):
        with context:
            y = ops.linear(x, weight, bias)
            assert y.dtype == torch.bfloat16
            grads = torch.autograd.grad(y.sum(), (x, weight, bias))
            assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]


def test_autocast_casts_the_inputs(formula):
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((3, 5), (4, 5), (4,)))
    seen = []

    def watch(x, weight, bias):
        seen.extend(t.dtype for t in (x, weight, bias))
        return forward(x, weight, bias)

    with torch.autocast("cpu", torch.bfloat16):
        wanted = torch.nn.functional.linear(x, weight, bias)
        assert torch.equal(ops.linear(x, weight, bias), wanted)
        with formula("linear", watch, backward):
            y = ops.linear(x, weight, bias)
    assert seen == [torch.bfloat16] * 3 and y.dtype == torch.bfloat16
    assert [g.dtype for g in torch.autograd.grad(y.sum(), (x, weight, bias))] == [torch.float32] * 3


def test_second_derivative_is_refused_by_kernels(formula):
    x, weight = torch.randn(3, 5).double().requires_grad_(), torch.randn(4, 5).double()
    with formula("linear", forward, backward):
        (dx,) = torch.autograd.grad(ops.linear(x, weight).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_compile(formula, compiled, same):
    inputs = [torch.randn(3, 5).double(), torch.randn(4, 5).double(), torch.randn(4).double()]
    same(compiled(lambda *a: ops.linear(*a)), eager, inputs)
    torch._dynamo.reset()
    with formula("linear", forward, backward):
        same(compiled(lambda *a: ops.linear(*a)), eager, inputs)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [(((3, 5), (4, 6)), r"linear: weight has shape \(4, 6\), x \(3, 5\)"), (((3, 5), (4, 5), (5,)), r"bias has shape \(5,\)"),
     (((3, 5), (5,)), r"needed are \[M, K\]"), (((), (4, 5)), r"x \(\)")],
)
def test_bad_input(shapes, message):
    with pytest.raises(Error, match=message):
        ops.linear(*(torch.randn(s) for s in shapes))
