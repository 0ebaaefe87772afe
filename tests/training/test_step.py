"""The step function: what accumulation, clipping, bf16 and non-finite gradients do to the parameters."""

from __future__ import annotations

import math

import pytest
import torch

from gptfast.config import GPT2Config, TrainConfig
from gptfast.model import GPT2LMHeadModel
from gptfast.training.loader import Batch
from gptfast.training.optimizer import AdamW, groups
from gptfast.training.schedule import learning_rate
from gptfast.training.step import Step

CONFIG = GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)


def make(dtype: torch.dtype = torch.float32, clip: float = 1.0, lr: float = 1e-2) -> tuple[GPT2LMHeadModel, Step]:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(CONFIG)
    return model, Step(model, AdamW(groups(model.named_parameters(), 0.1), lr), dtype, clip)


def batch(rows: int = 6, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 40, (rows, 12), generator=generator)
    targets = torch.randint(0, 40, (rows, 12), generator=generator)
    for row in range(rows):
        targets[row, : 2 * row] = -100  # rows have different numbers of targets
    return Batch(ids, targets)


def part(whole: Batch, rows: slice) -> Batch:
    return Batch(whole.ids[rows], whole.targets[rows])


@pytest.mark.parametrize("cuts", [(1, 6), (2, 3, 6), (1, 2, 3, 4, 5, 6)])
def test_accumulation_is_weighted_by_tokens(cuts: tuple[int, ...]) -> None:
    whole = batch()
    one, one_step = make(clip=0.01)
    other, other_step = make(clip=0.01)
    starts = (0, *cuts[:-1])
    for step in (one_step, other_step):
        step.optimizer.param_groups[0]["eps"] = 1e-3  # with a small eps AdamW makes whole steps of rounding errors
    for _ in range(3):
        a = one_step([whole], 1e-2)
        b = other_step((part(whole, slice(s, e)) for s, e in zip(starts, cuts, strict=True)), 1e-2)
        torch.testing.assert_close(a.loss, b.loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(a.norm, b.norm, rtol=1e-4, atol=0)
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_with_unequal_targets_have_the_gradients_of_the_whole(dtype: torch.dtype) -> None:
    whole = batch()
    sums, grads = [], []
    for cuts in ([slice(0, 6)], [slice(0, 1), slice(1, 2), slice(2, 6)]):
        model, step = make(dtype)
        sums.append(step.gradients([part(whole, rows) for rows in cuts]))
        grads.append({name: p.grad for name, p in model.named_parameters()})
    counts = [int((whole.targets[rows] != -100).sum()) for rows in cuts]
    assert len(set(counts)) == 3 and int(sums[0].targets) == int(sums[1].targets) == sum(counts)
    torch.testing.assert_close(sums[0].loss, sums[1].loss, rtol=1e-5, atol=0)
    off = 1e-5 if dtype == torch.float32 else 1e-2  # a part's gradient is rounded before it is added
    for name, grad in grads[0].items():
        assert grad is not None and float((grads[1][name] - grad).norm()) <= off * float(grad.norm()), name


def test_loss_and_norm_are_those_of_the_mean() -> None:
    whole = batch()
    model, step = make()
    total, count = model.loss_sum(whole.ids, whole.targets)
    mean = total / count
    expected = torch.nn.functional.cross_entropy(model(whole.ids).logits.flatten(0, 1), whole.targets.flatten())
    torch.testing.assert_close(mean, expected)
    grads = torch.autograd.grad(mean, list(model.parameters()))
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
    result = step([whole], 1e-2)
    torch.testing.assert_close(result.loss, mean.detach())
    assert float(result.norm) == pytest.approx(norm, rel=1e-5) and float(result.finite) == 1


def test_clipping_equals_torchs() -> None:
    whole = batch()
    ours, step = make(clip=0.05)
    theirs, _ = make()
    optimizer = torch.optim.AdamW(groups(theirs.named_parameters(), 0.1), 1e-2, eps=1e-3)
    step.optimizer.param_groups[0]["eps"] = 1e-3  # with a small eps AdamW does not feel the gradient's length
    for _ in range(2):
        step([whole], 1e-2)
        optimizer.zero_grad()
        total, count = theirs.loss_sum(whole.ids, whole.targets)
        (total / count).backward()
        assert float(torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.05)) > 0.05
        optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_bf16_has_fp32_parameters_gradients_and_a_rounded_copy() -> None:
    model, step = make(torch.bfloat16)
    plain, plain_step = make()
    assert step.copies is not None
    seen: list[torch.dtype] = []
    model.transformer.h[0].register_forward_hook(lambda module, inputs, output: seen.append(output[0].dtype))
    loss, _ = step.loss_sum(batch())
    loss.backward()
    other, _ = plain_step.loss_sum(batch())
    other.backward()
    assert set(seen) == {torch.bfloat16} and loss.dtype == torch.float32
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert p.dtype == torch.float32 and p.grad is not None and q.grad is not None and p.grad.dtype == torch.float32
        assert float((p.grad - q.grad).norm()) < 0.03 * float(q.grad.norm()) + 1e-6, name
    step.optimizer.zero_grad()
    before = [p.detach().clone() for p in model.parameters()]
    step([batch()], 1e-2)
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    for copy, p in zip(step.copies, step.params, strict=True):
        assert copy.dtype == torch.bfloat16 and torch.equal(copy, p.detach().bfloat16())


def test_bf16_adds_the_gradients_of_head_and_embedding_in_fp32() -> None:
    model, step = make(torch.bfloat16)
    loss, _ = step.loss_sum(batch())
    loss.backward()
    grad = model.transformer.wte.weight.grad
    assert grad is not None
    assert not torch.equal(grad, grad.bfloat16().float())  # a sum in bf16 would be a bf16 number


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    model, step = make(torch.bfloat16)
    step([batch()], 1e-2)
    with torch.no_grad():
        kept = model.transformer.ln_f.bias[0].clone()
        model.transformer.ln_f.bias[0] = math.inf
        step.refresh()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = [value.clone() for state in step.optimizer.state.values() for value in state.values()]
    assert float(step([batch()], 1e-2).finite) == 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    after = [value for state in step.optimizer.state.values() for value in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = kept
        step.refresh()
    result = step([batch()], 1e-2)
    assert float(result.finite) == 1 and math.isfinite(float(result.loss))


def test_schedule() -> None:
    config = TrainConfig(steps=100, lr=1.0, min_lr=0.1, warmup=10)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[:10] == pytest.approx([(n + 1) / 10 for n in range(10)]) and rates[10] == 1.0
    assert rates[99] == pytest.approx(0.1) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[10 + 89 // 2] == pytest.approx(0.55, abs=0.01)
    assert {learning_rate(n, TrainConfig(lr=1.0, warmup=0, schedule="constant")) for n in range(5)} == {1.0}
