"""gptfast.AdamW against torch.optim.AdamW: the same constructor, defaults, state and updates."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch

from gptfast.training.optimizer import AdamW, groups


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7), torch.nn.Linear(7, 3))


def steps(net: torch.nn.Module, optimizer: torch.optim.Optimizer, count: int, skip: bool = False) -> None:
    generator = torch.Generator().manual_seed(1)
    for number in range(count):
        optimizer.zero_grad()
        net(torch.randn(4, 5, generator=generator)).square().sum().backward()
        if skip and number % 2:
            next(net.parameters()).grad = None
        optimizer.step()


def assert_same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_constructor_is_torchs() -> None:
    assert inspect.signature(AdamW.__init__) == inspect.signature(torch.optim.AdamW.__init__)
    assert AdamW(model().parameters()).defaults == torch.optim.AdamW(model().parameters()).defaults


OTHER = {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.3}


@pytest.mark.parametrize("options", [{}, OTHER, {"amsgrad": True}, {"maximize": True}])
@pytest.mark.parametrize("skip", [False, True])
def test_updates_are_torchs(options: dict[str, Any], skip: bool) -> None:
    ours, theirs = model(), model()
    one, other = AdamW(ours.parameters(), **options), torch.optim.AdamW(theirs.parameters(), **options)
    steps(ours, one, 6, skip)
    steps(theirs, other, 6, skip)
    assert_same(ours, theirs)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert float(one.state[p]["step"]) == float(other.state[q]["step"])


def test_groups_have_their_own_settings_and_matrices_alone_decay() -> None:
    ours, theirs = model(), model()
    made = groups(ours.named_parameters(), 0.5)
    assert [{p.dim() for p in group["params"]} for group in made] == [{2}, {1}] and [g["weight_decay"] for g in made] == [0.5, 0.0]
    made[1]["lr"] = 0.1
    same = groups(theirs.named_parameters(), 0.5)
    same[1]["lr"] = 0.1
    steps(ours, AdamW(made), 4)
    steps(theirs, torch.optim.AdamW(same), 4)
    assert_same(ours, theirs)


def test_state_dict_goes_both_ways() -> None:
    ours, theirs = model(), model()
    one, other = AdamW(ours.parameters(), lr=0.01), torch.optim.AdamW(theirs.parameters(), lr=0.01)
    steps(ours, one, 3)
    theirs.load_state_dict(ours.state_dict())
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    again = model()
    again.load_state_dict(ours.state_dict())
    third = AdamW(again.parameters(), lr=0.01)
    third.load_state_dict(copy.deepcopy(other.state_dict()))
    for net, optimizer in ((ours, one), (theirs, other), (again, third)):
        steps(net, optimizer, 3)
    assert_same(ours, theirs)
    assert_same(ours, again)
    assert {float(s["step"]) for s in third.state.values()} == {6.0}


def test_closure_is_evaluated_with_gradients() -> None:
    net = model()
    optimizer = AdamW(net.parameters())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = net(torch.ones(2, 5)).square().sum()
        loss.backward()
        return loss.detach()

    before = float(closure())
    assert float(optimizer.step(closure)) == before
    assert float(closure()) < before


def test_update_takes_device_scalars_and_writes_copies() -> None:
    ours, theirs = model(), model()
    optimizer = AdamW(groups(ours.named_parameters(), 0.1), lr=1.0)
    other = torch.optim.AdamW(groups(theirs.named_parameters(), 0.1), lr=0.01)
    for net in (ours, theirs):
        net(torch.ones(2, 5)).square().sum().backward()
    for p in theirs.parameters():
        assert p.grad is not None
        p.grad *= 0.25
    params = [p for group in optimizer.param_groups for p in group["params"]]
    copies = [p.detach().bfloat16() for p in params]
    before = [p.detach().clone() for p in params]
    optimizer.update(torch.tensor([0.01]), torch.tensor([0.25]), torch.tensor([0.0]), copies)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert {float(s["step"]) for s in optimizer.state.values()} == {0.0}
    optimizer.update(torch.tensor([0.01]), torch.tensor([0.25]), torch.tensor([1.0]), copies)
    other.step()
    assert_same(ours, theirs)
    assert all(torch.equal(c, p.detach().bfloat16()) for c, p in zip(copies, params, strict=True))
    assert {float(s["step"]) for s in optimizer.state.values()} == {1.0}
