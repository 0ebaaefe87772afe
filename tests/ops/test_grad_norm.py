"""grad_norm: the definition against the formula and against PyTorch's clipping, non-finite gradients, the glue."""

import math

import pytest
import torch

from gptfast import backend, ops

pytestmark = pytest.mark.usefixtures("eager")


def formula_of(grads):
    assert isinstance(grads, list) and all(g.is_contiguous() for g in grads)
    norm = sum(g.to(torch.float64).pow(2).sum() for g in grads).sqrt().view(1)
    return norm, norm.isfinite().double()


def case(dtype=torch.float64):
    return [torch.randn(s).to(dtype) for s in ((3, 5), (7,), (), (0, 4), (2, 3, 4))]


def test_formula(formula):
    grads = [*case(), torch.randn(6, 4).double().t()[::2], torch.randn(1).double().expand(9)]
    norm, finite = ops.grad_norm(grads)
    with formula("grad_norm", formula_of):
        wanted = ops.grad_norm(tuple(grads))
    torch.testing.assert_close((norm, finite), wanted, rtol=1e-14, atol=0)
    assert norm.shape == finite.shape == (1,) and finite == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_torch(dtype):
    grads = case(dtype)
    norm, finite = ops.grad_norm(grads)
    assert norm.dtype == finite.dtype == torch.float32
    torch.testing.assert_close(norm[0], torch.nn.utils.get_total_norm([g.float() for g in grads]), rtol=1e-6, atol=0)


def test_16_bit_gradients_do_not_overflow():
    assert ops.grad_norm([torch.full((100,), 6e4, dtype=torch.float16)])[0] == pytest.approx(6e5, rel=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", range(5))
def test_one_non_finite_value(value, place):
    grads = case(torch.float32)
    if grads[place].numel() == 0:
        grads[place] = torch.zeros(3)
    grads[place].view(-1)[-1] = value
    norm, finite = ops.grad_norm(grads)
    assert finite == 0 and not norm.isfinite()


def test_nothing_to_measure(formula):
    for context in (backend("eager"), formula("grad_norm", formula_of)):
        with context:
            norm, finite = ops.grad_norm([])
            assert norm.tolist() == [0] and finite.tolist() == [1]
    assert ops.grad_norm([torch.zeros(0)])[0] == 0


def test_no_graph():
    assert not ops.grad_norm([torch.randn(3, requires_grad=True)])[0].requires_grad


def test_compile(compiled):
    grads = case()
    torch.testing.assert_close(compiled(lambda g: ops.grad_norm(g))(grads), ops.grad_norm(grads), rtol=1e-14, atol=0)


def test_limits_of_kernels(monkeypatch):
    monkeypatch.setitem(backend._missing, ("grad_norm", "cpp"), None)
    assert backend.supports("grad_norm", "cpp", (case(),)) == "float64; kernels take float32, bfloat16, float16"
    assert backend.supports("grad_norm", "cpp", (case(torch.bfloat16),)) is None
