"""add_layer_norm: the definition against the formula, the glue, outputs that nobody uses."""

import pytest
import torch

from gptfast import Error, backend, ops
from gptfast.ops.add_layer_norm import eager

pytestmark = pytest.mark.usefixtures("eager")


def forward(residual, x, weight, bias, eps):
    assert all(t.dim() == 2 and t.is_contiguous() for t in (residual, x))
    total = residual + x
    mean = total.mean(1)
    rstd = 1 / torch.sqrt((total - mean[:, None]).pow(2).mean(1) + eps)
    y = (total - mean[:, None]) * rstd[:, None]
    y = y if weight is None else y * weight
    return total, y if bias is None else y + bias, mean, rstd


def backward(dtotal, dy, total, weight, mean, rstd):
    assert dy.is_contiguous() and (dtotal is None or dtotal.is_contiguous())
    hat = (total - mean[:, None]) * rstd[:, None]
    g = dy if weight is None else dy * weight
    d = rstd[:, None] * (g - g.mean(1, keepdim=True) - hat * (g * hat).mean(1, keepdim=True))
    return d if dtotal is None else d + dtotal, (dy * hat).sum(0), dy.sum(0)


def case(weight=True, bias=True, shape=(3, 5, 7)):
    parameters = [torch.randn(shape[-1]).double() if there else None for there in (weight, bias)]
    return [torch.randn(shape).double(), torch.randn(shape).double(), *parameters, 1e-3]


@pytest.mark.parametrize("parameters", [(True, True), (True, False), (False, False), (False, True)])
@pytest.mark.parametrize("upstream", ["dense", "transposed", "expanded"])
def test_formula(formula, same, parameters, upstream):
    with formula("add_layer_norm", forward, backward):
        same(ops.add_layer_norm, eager, case(*parameters), upstream=upstream)


@pytest.mark.parametrize("which", [0, 1])
def test_one_output_used(formula, same, which):
    inputs = case()
    wanted = [True, True, which == 1, which == 1, False]  # the parameters have no part in total
    seen = []

    def watch(dtotal, *rest):
        seen.append(dtotal)
        return backward(dtotal, *rest)

    with formula("add_layer_norm", forward, watch):
        same(lambda *a: ops.add_layer_norm(*a)[which], lambda *a: eager(*a)[which], inputs, wanted)
    assert seen == ([None] if which == 1 else [])


@pytest.mark.parametrize("one", range(4))
def test_gradient_of_one_input(formula, same, one):
    with formula("add_layer_norm", forward, backward):
        same(lambda *a: ops.add_layer_norm(*a)[1], lambda *a: eager(*a)[1], case(), [i == one for i in range(5)])


@pytest.mark.parametrize("shape", [(0, 7), (7,), (1, 1), (2, 0, 3)])
def test_sizes(formula, same, shape):
    with formula("add_layer_norm", forward, backward):
        same(ops.add_layer_norm, eager, case(shape=shape))


def test_strided_and_expanded_inputs(formula, same):
    a, b = torch.randn(6, 4, 10).double(), torch.randn(1, 5).double()

    def through(op):
        return lambda a, b: op(a.transpose(0, 1)[..., ::2], b.expand(4, 6, 5))

    with formula("add_layer_norm", forward, backward):
        same(through(ops.add_layer_norm), through(eager), [a, b])


def test_gradcheck():
    inputs = [x.requires_grad_() if isinstance(x, torch.Tensor) else x for x in case(shape=(3, 5))]
    assert torch.autograd.gradcheck(ops.add_layer_norm, inputs)


def test_y_is_of_total_as_rounded_and_dtypes(formula):
    residual, x = torch.randn(4, 64).bfloat16(), torch.randn(4, 64).bfloat16()
    total, y = ops.add_layer_norm(residual, x)
    assert torch.equal(total, residual + x) and torch.equal(y, torch.nn.functional.layer_norm(total, (64,)))
    residual, x, weight = residual.float().requires_grad_(), x.requires_grad_(), torch.randn(64).requires_grad_()
    for context in (backend("eager"), formula("add_layer_norm", forward, backward)):
        with context, torch.autocast("cpu", torch.bfloat16):
            total, y = ops.add_layer_norm(residual, x, weight)
            assert total.dtype == y.dtype == torch.float32
            grads = torch.autograd.grad(y.sum() + total.sum(), (residual, x, weight))
            assert [g.dtype for g in grads] == [torch.float32, torch.bfloat16, torch.float32]


def test_compile(formula, compiled, same):
    same(compiled(lambda *a: ops.add_layer_norm(*a)), eager, case())
    torch._dynamo.reset()
    with formula("add_layer_norm", forward, backward):
        same(compiled(lambda *a: ops.add_layer_norm(*a)), eager, case())


def test_bad_input():
    with pytest.raises(Error, match=r"residual has shape \(3, 4\), x \(3, 5\)"):
        ops.add_layer_norm(torch.randn(3, 4), torch.randn(3, 5))
    with pytest.raises(Error, match=r"bias has shape \(4,\), needed is \(5,\)"):
        ops.add_layer_norm(torch.randn(3, 5), torch.randn(3, 5), None, torch.randn(4))
