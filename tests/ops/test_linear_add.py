"""linear_add: the definition against the formula, the door to kernels."""

import pytest
import torch

from gptfast import Error, backend, ops

pytestmark = pytest.mark.usefixtures("eager")


def formula_of(x, weight, bias, residual):
    assert x.dim() == residual.dim() == 2 and x.is_contiguous() and residual.is_contiguous()
    y = residual + x @ weight.t()
    return y if bias is None else y + bias


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("rows", [(2, 3), (1,), (), (0, 3)])
def test_formula(formula, biased, rows):
    weight, bias = torch.randn(7, 4).double().t(), torch.randn(4).double() if biased else None
    x, residual = torch.randn(7, *rows).double().movedim(0, -1), torch.randn(4).double().expand(*rows, 4)
    eager = ops.linear_add(x, weight, bias, residual)
    with formula("linear_add", formula_of):
        torch.testing.assert_close(ops.linear_add(x, weight, bias, residual), eager, rtol=1e-12, atol=1e-12)
    assert eager.shape == residual.shape


def test_gradcheck_and_dtypes():
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 5), (3, 5), (3,), (2, 3))]
    assert torch.autograd.gradcheck(ops.linear_add, inputs)
    x, weight, bias, residual = (t.detach().float() for t in inputs)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.linear_add(x, weight, bias, residual)
    assert y.dtype == torch.float32 and ops.linear_add(x, weight, bias, residual.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(y, residual + torch.nn.functional.linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16()))


def test_compile(compiled):
    inputs = [torch.randn(s).double() for s in ((2, 5), (3, 5), (3,), (2, 3))]
    assert torch.equal(compiled(lambda *a: ops.linear_add(*a))(*inputs), ops.linear_add(*inputs))


@pytest.mark.parametrize(("rows", "grad", "reason"), [(32, False, None), (33, False, "33 rows; kernels take 1 to 32"),
                                                      (0, False, "0 rows; kernels take 1 to 32"), (1, True, "it has no backward")])
def test_limits_of_kernels(monkeypatch, rows, grad, reason):
    for op in ("linear_add", "layer_norm_linear"):
        monkeypatch.setitem(backend._missing, (op, "cpp"), None)
        assert backend.supports(op, "cpp", (torch.randn(rows, 5), torch.randn(3, 5)), grad) == reason


def test_bad_input():
    with pytest.raises(Error, match=r"residual has shape \(2, 4\), x \(2, 5\), weight \(3, 5\)"):
        ops.linear_add(torch.randn(2, 5), torch.randn(3, 5), None, torch.randn(2, 4))
