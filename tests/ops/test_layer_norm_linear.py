"""layer_norm_linear: the definition against the formula, the door to kernels."""

import pytest
import torch
import torch.nn.functional as F

from gptfast import Error, ops

pytestmark = pytest.mark.usefixtures("eager")


def formula_of(x, ln_weight, ln_bias, weight, bias, activation, eps):
    assert x.dim() == 2 and x.is_contiguous()
    hat = (x - x.mean(1, keepdim=True)) / torch.sqrt((x - x.mean(1, keepdim=True)).pow(2).mean(1, keepdim=True) + eps)
    hat = hat if ln_weight is None else hat * ln_weight
    y = (hat if ln_bias is None else hat + ln_bias) @ weight.t()
    y = y if bias is None else y + bias
    return y if activation == "none" else F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")


def case(shape=(2, 3, 5), parameters=True):
    there = [torch.randn(n).double() if parameters else None for n in (5, 5, 4)]
    return [torch.randn(shape).double(), there[0], there[1], torch.randn(5, 4).double().t(), there[2]]


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("parameters", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 5), (5,), (0, 5)])
def test_formula(formula, activation, parameters, shape):
    inputs = [*case(shape, parameters), activation, 1e-3]
    eager = ops.layer_norm_linear(*inputs)
    with formula("layer_norm_linear", formula_of):
        torch.testing.assert_close(ops.layer_norm_linear(*inputs), eager, rtol=1e-12, atol=1e-12)
    assert eager.shape == (*shape[:-1], 4)


def test_gradcheck():
    assert torch.autograd.gradcheck(lambda *a: ops.layer_norm_linear(*a, "gelu"), [t.requires_grad_() for t in case((2, 5))])


def test_compile(compiled):
    inputs = [*case(), "gelu_tanh"]
    assert torch.equal(compiled(lambda *a: ops.layer_norm_linear(*a))(*inputs), ops.layer_norm_linear(*inputs))


def test_bad_input():
    x, *rest = case()
    with pytest.raises(Error, match="activation is 'relu'; allowed: none, gelu, gelu_tanh"):
        ops.layer_norm_linear(x, *rest, "relu")
    with pytest.raises(Error, match=r"weight has shape \(4, 5\), x \(2, 3, 4\)"):
        ops.layer_norm_linear(x[..., :4], *rest)
