"""gelu: the definition against the formula, the glue, layouts, edge cases."""

import math

import pytest
import torch

from gptfast import Error, backend, ops
from gptfast.ops.gelu import eager

pytestmark = pytest.mark.usefixtures("eager")


def forward(x, bias, approximate):
    assert x.dim() == 2 and x.is_contiguous()
    u = x if bias is None else x + bias
    if approximate == "none":
        return u / 2 * (1 + torch.erf(u / math.sqrt(2)))
    return u / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))


def backward(dy, x, bias, approximate):
    assert dy.is_contiguous() and dy.shape == x.shape
    u = x if bias is None else x + bias
    if approximate == "none":
        slope = (1 + torch.erf(u / math.sqrt(2))) / 2 + u * torch.exp(-u * u / 2) / math.sqrt(2 * math.pi)
    else:
        t = torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))
        slope = (1 + t) / 2 + u / 2 * (1 - t * t) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * u * u)
    return dy * slope, (dy * slope).sum(0)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("upstream", ["dense", "transposed", "expanded"])
def test_formula(formula, same, approximate, biased, upstream):
    inputs = [torch.randn(3, 5, 7).double(), torch.randn(7).double() if biased else None, approximate]
    with formula("gelu", forward, backward):
        same(ops.gelu, eager, inputs, upstream=upstream)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_gradient_of_one_input(formula, same, wanted):
    with formula("gelu", forward, backward):
        same(ops.gelu, eager, [torch.randn(5, 7).double(), torch.randn(7).double()], wanted)


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7), (7,), (1, 1), (3, 0)])
def test_sizes(formula, same, shape):
    with formula("gelu", forward, backward):
        same(ops.gelu, eager, [torch.randn(shape).double(), torch.randn(shape[-1]).double()])


def test_strided_and_expanded_inputs(formula, same):
    x = torch.randn(6, 4, 10).double()
    with formula("gelu", forward, backward):
        same(lambda x: ops.gelu(x.transpose(0, 1)[..., ::2]), lambda x: eager(x.transpose(0, 1)[..., ::2]), [x])
        same(lambda x: ops.gelu(x[:1].expand(6, 4, 10)), lambda x: eager(x[:1].expand(6, 4, 10)), [x])


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gradcheck(approximate):
    inputs = [torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64, requires_grad=True)]
    assert torch.autograd.gradcheck(lambda x, b: ops.gelu(x, b, approximate), inputs)


def test_dtypes(formula):
    x, bias = torch.randn(3, 5).bfloat16().requires_grad_(), torch.randn(5).requires_grad_()
    for context in (backend("eager"), formula("gelu", lambda *a: forward(*a).to(a[0].dtype), lambda *a: (
        backward(*a)[0].to(a[0].dtype), backward(*a)[1].float()))):
        with context, torch.autocast("cpu", torch.float16):
            y = ops.gelu(x, bias)
            assert y.dtype == torch.bfloat16
            assert [g.dtype for g in torch.autograd.grad(y.sum(), (x, bias))] == [torch.bfloat16, torch.float32]


def test_non_finite_values_stay_in_place():
    x = torch.zeros(3, 4)
    x[1, 2], x[2, 0] = math.nan, math.inf
    y = ops.gelu(x)
    assert y[1, 2].isnan() and y[2, 0] == math.inf and int((~y.isfinite()).sum()) == 2


def test_compile(formula, compiled, same):
    inputs = [torch.randn(3, 5).double(), torch.randn(5).double(), "tanh"]
    same(compiled(lambda *a: ops.gelu(*a)), eager, inputs)
    torch._dynamo.reset()
    with formula("gelu", forward, backward):
        same(compiled(lambda *a: ops.gelu(*a)), eager, inputs)


def test_bad_input():
    with pytest.raises(Error, match=r"gelu: bias has shape \(4,\)"):
        ops.gelu(torch.randn(3, 5), torch.randn(4))
    with pytest.raises(Error, match="approximate is 'new'; allowed: tanh, none"):
        ops.gelu(torch.randn(3, 5), approximate="new")
