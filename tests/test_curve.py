"""Fast = eager along a whole run: loss curves, and every gradient of the model at five points of it. The models of the benchmarks
have theirs in bench/bench_train.py (-k curve)."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gptfast import backend
from gptfast.config import GPT2Config
from gptfast.model import GPT2LMHeadModel
from gptfast.testing import assert_close_to_reference, requires
from gptfast.training.loader import Batch
from gptfast.training.optimizer import AdamW, groups
from gptfast.training.step import Step

STEPS, POINTS, SEEDS = 100, (0, 25, 50, 75, 99), (0, 1, 2)
VOCAB, CONTEXT = 65, 33  # a last block of one row
CONFIG = GPT2Config(
    vocab_size=VOCAB, n_positions=CONTEXT, n_embd=64, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make(seed: int, dtype: torch.dtype) -> Step:
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(CONFIG)
    return Step(model, AdamW(groups(model.named_parameters(), 0.1), 1e-3), dtype)


def batches(seed: int) -> Iterator[Batch]:
    """A text that can be learned: each id follows from the one before it, one in ten is noise."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        ids = torch.randint(0, VOCAB, (4, CONTEXT + 1), generator=generator)
        noise = torch.rand(4, CONTEXT + 1, generator=generator) < 0.1
        for t in range(1, CONTEXT + 1):
            ids[:, t] = torch.where(noise[:, t], ids[:, t], (2 * ids[:, t - 1] + 1) % VOCAB)
        yield Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def losses(seed: int, dtype: torch.dtype, name: str) -> list[float]:
    """The curve on backend `name`, wherever an op has it."""
    step = make(seed, dtype)
    with backend.use(name):
        return [float(step([batch], 3e-3 * min(1, (i + 1) / 10)).loss) for i, batch in enumerate(batches(seed))]


def distance(curve: list[float], exact: list[float]) -> float:
    return statistics.mean((a - b) ** 2 for a, b in zip(curve, exact, strict=True)) ** 0.5


@pytest.fixture(autouse=True)
def _cpp() -> None:
    requires("cpp", backend.supports("linear", "cpp"))


@pytest.mark.parametrize("precision", DTYPES)
def test_curve_is_as_close_to_fp32_eager_as_eager_is(precision: str) -> None:
    dtype = DTYPES[precision]
    fast, own = [], []
    for seed in SEEDS:
        exact = losses(seed, torch.float32, "eager")
        assert exact[-1] < exact[0] - 1, "a run that learns nothing tells nothing"
        fast.append(distance(losses(seed, dtype, "cpp"), exact))
        own.append(distance(losses(seed, dtype, "eager"), exact))
    bound = 2 * statistics.mean(own) + 1e-3
    print(f"{precision}: d(fast) {statistics.mean(fast):.2e}, d(eager) {statistics.mean(own):.2e}, bound {bound:.2e}")
    assert 0 < statistics.mean(fast) <= bound


def gradients(step: Step, batch: Batch, name: str) -> dict[str, Tensor]:
    """The gradient of the summed loss for every parameter, which keeps none."""
    with backend.use(name):
        step.loss_sum(batch)[0].backward()
    found = {key: p.grad for key, p in step.model.named_parameters()}
    step.optimizer.zero_grad(set_to_none=True)
    return found


def in_double(step: Step) -> Step:
    """The same step computed in float64: on its rounded working copies, where it has some."""
    model = copy.deepcopy(step.model)
    if step.copies is None:
        model.double()
        return Step(model, AdamW(groups(model.named_parameters(), 0.1), 1e-3))
    exact = Step(model, AdamW(groups(model.named_parameters(), 0.1), 1e-3), torch.float64)
    for mine, rounded in zip(exact.copies, step.copies, strict=True):
        mine.copy_(rounded)
    return exact


@pytest.mark.parametrize("precision", DTYPES)
def test_every_gradient_at_five_points_of_the_eager_run(precision: str) -> None:
    step = make(0, DTYPES[precision])
    for i, batch in enumerate(batches(0)):
        if i in POINTS:
            exact = gradients(in_double(step), batch, "eager")
            own, fast = gradients(step, batch, "eager"), gradients(step, batch, "cpp")
            for key, value in fast.items():
                name = f"step {i}: {key}"
                assert_close_to_reference(value, own[key], exact[key].double(), name=name, gradient=True, long_sum=True)
        with backend.use("eager"):
            step([batch], 3e-3 * min(1, (i + 1) / 10))
