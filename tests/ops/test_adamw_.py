"""adamw_: the definition against the formula and against torch.optim.AdamW, skipped steps, copies, the glue."""

import math

import pytest
import torch

from gptfast import Error, backend, ops

pytestmark = pytest.mark.usefixtures("eager")
SHAPES, DECAY = ((4, 3), (3,), (5, 2), ()), [0.1, 0.0, 0.1, 0.0]


def formula_of(params, grads, exp_avg, exp_avg_sq, copies, lr, step, scale, finite, weight_decay, beta1, beta2, eps):
    assert all(g.is_contiguous() for g in grads)
    if finite != 1:
        return
    step += 1
    for i, (p, grad, m, v, decay) in enumerate(zip(params, grads, exp_avg, exp_avg_sq, weight_decay, strict=True)):
        g = grad.to(p.dtype) * scale.to(p.dtype)[0]
        p.mul_(1 - lr[0] * decay)
        m.mul_(beta1).add_((1 - beta1) * g)
        v.mul_(beta2).add_((1 - beta2) * g * g)
        p -= lr[0] * (m / (1 - beta1 ** float(step))) / ((v / (1 - beta2 ** float(step))).sqrt() + eps)
        if copies is not None:
            copies[i].copy_(p)


def state(dtype=torch.float64, copies=True):
    torch.manual_seed(1)
    params = [torch.randn(s).to(dtype) for s in SHAPES]
    scalars = {"lr": torch.tensor([2**-7], dtype=dtype), "step": torch.zeros(1)}
    scalars |= {"scale": torch.ones(1, dtype=dtype), "finite": torch.ones(1)}
    return {
        "params": params, "exp_avg": [torch.zeros_like(p) for p in params], "exp_avg_sq": [torch.zeros_like(p) for p in params],
        "copies": [torch.zeros_like(p, dtype=torch.bfloat16) for p in params] if copies else None, **scalars,
    }


def advance(state, grads, function=ops.adamw_):
    function(grads=grads, **state, weight_decay=DECAY[: len(grads)], beta1=0.9, beta2=0.95, eps=1e-8)


def gradients(dtype=torch.float64):
    return [torch.randn(s).to(dtype) for s in SHAPES]


def flat(state):
    return [t for value in state.values() if value is not None for t in (value if isinstance(value, list) else [value])]


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_formula(formula, copies, scale):
    eager, fast = state(copies=copies), state(copies=copies)
    for s in (eager, fast):
        s["scale"].fill_(scale)
    for n in range(4):
        grads = gradients()
        grads[2] = grads[2].t().contiguous().t()
        kept = [g.clone() for g in grads]
        for s in (eager, fast):
            s["finite"].fill_(n != 2)
            s["lr"].fill_(0.01 * (n + 1))
        advance(eager, grads)
        with formula("adamw_", formula_of):
            advance(fast, grads)
        assert all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True))
        torch.testing.assert_close(flat(eager), flat(fast), rtol=1e-11, atol=1e-13)
    assert eager["step"] == 3 and (not copies or torch.equal(eager["copies"][0], eager["params"][0].bfloat16()))


@pytest.mark.parametrize("fused", [True, False])
def test_equals_torch_optim(fused):
    s = state(torch.float32, copies=False)
    theirs = [p.clone().requires_grad_() for p in s["params"]]
    groups = [{"params": [theirs[i] for i in range(4) if DECAY[i] == decay], "weight_decay": decay} for decay in (0.1, 0.0)]
    optimizer = torch.optim.AdamW(groups, lr=2**-7, betas=(0.9, 0.95), eps=1e-8, fused=fused, foreach=False)
    for _ in range(5):
        grads = gradients(torch.float32)
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        advance(s, grads)
    for p, q in zip(s["params"], theirs, strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=0 if fused else 1e-5, atol=0 if fused else 1e-6)


def test_a_step_that_is_not_finite_changes_nothing():
    s = state()
    advance(s, gradients())
    s["finite"].zero_()
    before = [t.clone() for t in flat(s)]
    advance(s, [torch.full(shape, math.nan, dtype=torch.float64) for shape in SHAPES])
    assert all(torch.equal(a, b) for a, b in zip(flat(s), before, strict=True))


@pytest.mark.parametrize("finite", [1, 0])
def test_compile_reads_the_scalars_at_run_time(compiled, finite):
    step = compiled(lambda s, grads: advance(s, grads))
    # without the 0-dimensional one: AOTAutograd of torch 2.13 loses the mutation of such a float64 tensor on the CPU
    eager, traced = ({k: v[:3] if isinstance(v, list) else v for k, v in state().items()} for _ in range(2))
    for n, flag in enumerate((finite, 1, 1)):
        for s in (eager, traced):
            s["finite"].fill_(flag)
            s["scale"].fill_(1 / (n + 1))
        grads = gradients()[:3]
        advance(eager, grads)
        step(traced, grads)
        torch.testing.assert_close(flat(eager), flat(traced), rtol=1e-12, atol=1e-13)
    assert traced["step"] == 2 + finite


def test_gradients_of_another_dtype_and_parameters_that_require_grad():
    s, wanted = state(torch.float32), state(torch.float32)
    grads = gradients(torch.bfloat16)
    advance(wanted, [g.float() for g in grads])
    for p in s["params"]:
        p.requires_grad_()
    advance(s, grads)
    assert all(torch.equal(a.detach(), b) for a, b in zip(flat(s), flat(wanted), strict=True))


def test_nothing_to_do():
    ops.adamw_([], [], [], [], None, *(torch.ones(1) for _ in range(4)), [], 0.9, 0.95, 1e-8)


def test_limits_of_kernels(monkeypatch):
    monkeypatch.setitem(backend._missing, ("adamw_", "cpp"), None)
    with backend(adamw_="cpp"), pytest.raises(Error, match="adamw_: backend cpp was forced and cannot run: float64"):
        advance(state(), gradients())


def test_bad_input():
    for label, wrong in (("exp_avg", state()["exp_avg"][:3]), ("copies", state()["copies"][::-1])):
        with pytest.raises(Error, match=f"adamw_: {label} do not have the shapes of the 4 params"):
            advance(state() | {label: wrong}, gradients())
    with pytest.raises(Error, match="grads do not have the shapes"):
        advance(state(), gradients()[:2])
    s = state()
    s["params"][0] = s["params"][0].t().contiguous().t()
    with pytest.raises(Error, match="params holds a tensor that is not contiguous"):
        advance(s, gradients())
    with pytest.raises(Error, match=r"lr has shape \(\); needed is a tensor \[1\]"):
        advance(state() | {"lr": torch.tensor(0.1)}, gradients())
    with pytest.raises(Error, match="weight_decay has 3 numbers for 4 params"):
        ops.adamw_(grads=gradients(), **state(), weight_decay=DECAY[:3], beta1=0.9, beta2=0.95, eps=1e-8)
