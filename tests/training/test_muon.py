"""Muon: against its definition in float64, PyTorch's own Muon, and what the trainer asks of an optimizer."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from gptfast.config import GPT2Config
from gptfast.model import GPT2LMHeadModel
from gptfast.training.muon import of_model, orthogonal

TINY = GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)


def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(TINY)


def make(net: nn.Module, products: torch.dtype = torch.float32, lr: float = 0.02) -> torch.optim.Optimizer:
    return of_model(net.named_parameters(), lr, 0.1, 0.9, (0.9, 0.95), 1e-8, products)


def gradients(net: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def definition(w: Tensor, grads: list[Tensor], lr: float, decay: float, mu: float) -> Tensor:
    """The formulas of the module's docstring in float64, one line each."""
    w, m = w.double(), torch.zeros_like(w, dtype=torch.float64)
    for g in grads:
        m = mu * m + (1 - mu) * g.double()
        n = (1 - mu) * g.double() + mu * m
        x = n / n.norm()
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
        w = w - lr * (0.2 * math.sqrt(max(w.shape)) * x + decay * w)
    return w


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (16, 16), (1, 7)])
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape) * 1e-3))
    assert float(values.min()) > 0.6 and float(values.max()) < 1.3
    assert float(orthogonal(torch.zeros(shape)).abs().max()) == 0


def test_updates_are_the_definition() -> None:
    net = model()
    optimizer = make(net)
    before, seen = copy.deepcopy(dict(net.named_parameters())), [dict[str, Tensor]() for _ in range(3)]
    for number, grads in enumerate(seen):
        gradients(net, number)
        grads.update({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
        optimizer.step()
    hidden = [name for name, p in net.named_parameters() if ".h." in name and p.dim() == 2]
    assert len(hidden) == 4 * TINY.n_layer
    for name in hidden:
        wanted = definition(before[name], [grads[name] for grads in seen], 0.02, 0.1, 0.9)
        torch.testing.assert_close(net.get_parameter(name).double(), wanted, rtol=1e-4, atol=1e-5, msg=name)
    plain = copy.deepcopy(before)
    for decay, names in ((0.1, ["transformer.wte.weight", "transformer.wpe.weight"]), (0.0, ["transformer.ln_f.bias"])):
        adamw = torch.optim.AdamW([plain[name] for name in names], 0.02, (0.9, 0.95), weight_decay=decay)
        for grads in seen:
            for name in names:
                plain[name].grad = grads[name]
            adamw.step()
        for name in names:
            torch.testing.assert_close(net.get_parameter(name), plain[name], rtol=1e-5, atol=1e-6, msg=name)


def test_pytorchs_own_muon_agrees() -> None:
    """It iterates in bf16, so does ours here; both round, so the updates agree as far as bf16 does."""
    torch.manual_seed(2)
    ours = nn.ParameterDict({"h": nn.ParameterDict({"0": nn.Parameter(torch.randn(32, 96) * 0.02)})})
    theirs = nn.Parameter(ours.h["0"].detach().clone())
    mine = make(ours, torch.bfloat16)
    other = torch.optim.Muon([theirs], 0.02, 0.1, 0.9, adjust_lr_fn="match_rms_adamw")
    start = theirs.detach().clone()
    for number in range(3):
        theirs.grad = torch.randn(32, 96, generator=torch.Generator().manual_seed(number))
        ours.h["0"].grad = theirs.grad.clone()
        mine.step()
        other.step()
    off, moved = (ours.h["0"] - theirs).detach().norm(), (theirs - start).detach().norm()
    assert float(off) < 0.02 * float(moved)


def test_scale_and_a_gradient_that_is_not_finite() -> None:
    one, other = model(), model()
    a, b = make(one), make(other)
    lr, half, yes, no = torch.tensor([0.02]), torch.tensor([0.5]), torch.ones(1), torch.zeros(1)
    for number in range(2):
        gradients(one, number)
        gradients(other, number)
        for p in one.parameters():
            assert p.grad is not None
            p.grad *= 2
        a.update(lr, half, yes)  # type: ignore[attr-defined]
        b.update(lr, yes, yes)  # type: ignore[attr-defined]
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    before = copy.deepcopy((list(other.parameters()), b.state_dict()))
    for p in other.parameters():
        p.grad = torch.full_like(p, math.nan)
    b.update(lr, yes, no)  # type: ignore[attr-defined]
    assert all(torch.equal(p, q) for p, q in zip(before[0], other.parameters(), strict=True))
    state = b.state_dict()["state"]
    assert all(torch.equal(value, state[i][key]) for i, values in before[1]["state"].items() for key, value in values.items())
