"""adamw_ over the parameters of GPT-2 124M and of a four-layer model, beside torch.optim.AdamW as it comes and fused.

    pytest bench/ops/bench_adamw_.py -k "small and plain"

Bytes counted: 28 a parameter (three tensors read and written, the gradient read), and 2 more with a bf16 copy, which torch makes in
a second pass. The ceiling is the copy bandwidth of the same run. The small model shows what a call costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from gptfast import benchmark as bench
from gptfast import ops
from gptfast.errors import Error
from gptfast.ops.adamw_ import eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODELS = {"gpt2": (12, 768, 50304, 1024), "small": (4, 128, 65, 64)}  # layers, width, vocabulary, context
BYTES = {"plain": 28, "copies": 30}
BACKENDS = ("cpp", "cuda", "triton")
PEERS: dict[str, dict[str, Any]] = {"torch": {}, "torch-fused": {"fused": True}}
replay = bench.Replay()
rows: list[dict[str, Any]] = []
Lists = list[list[Tensor]]


def operands(shapes: list[tuple[int, ...]]) -> Lists:
    """params, grads, exp_avg, exp_avg_sq"""
    params, grads = ([torch.randn(shape, device=DEVICE) * 0.02 for shape in shapes] for _ in range(2))
    return [params, grads, *([torch.zeros_like(p) for p in params] for _ in range(2))]


def step(function: Callable[..., None], lists: Lists, copies: list[Tensor] | None) -> Callable[[], None]:
    lr, count, scale, finite = (torch.full((1,), value, device=DEVICE) for value in (1e-4, 0.0, 1.0, 1.0))
    decay = [0.1 if p.dim() > 1 else 0.0 for p in lists[0]]
    return lambda: function(*lists, copies, lr, count, scale, finite, decay, 0.9, 0.95, 1e-8)


def forced(name: str, *arguments: Any) -> None:
    with bench.force("adamw_", name, arguments[0]):
        ops.adamw_(*arguments)


def after_two_steps(function: Callable[..., None], *tensors: Tensor) -> tuple[Tensor, ...]:
    lists = [[t.clone()] for t in tensors]
    call = step(function, lists, None)
    call(), call()
    return lists[0][0], lists[2][0], lists[3][0]


def peer(options: dict[str, Any], lists: Lists, copies: list[Tensor] | None) -> Callable[[], None]:
    """torch's optimizer on the same memory."""
    params = [p.requires_grad_() for p in lists[0]]
    optimizer = torch.optim.AdamW(params, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, **options)
    for p, g, m, v in zip(*lists, strict=True):
        p.grad = g
        optimizer.state[p] = {"step": torch.zeros((), device=DEVICE if options else "cpu"), "exp_avg": m, "exp_avg_sq": v}

    def call() -> None:
        optimizer.step()
        if copies is not None:
            torch._foreach_copy_(copies, [p.detach() for p in params])

    return call


@cache
def reasons() -> dict[str, str]:
    """Which backends cannot be timed here and why; the others are checked against eager."""
    found = {}
    for name in BACKENDS:
        try:
            given = [*torch.randn(2, 1000, device=DEVICE), *torch.rand(2, 1000, device=DEVICE)]
            definition = partial(after_two_steps, eager)
            bench.check(f"adamw_ on {name}", partial(after_two_steps, partial(forced, name)), definition, given)
        except Error as refusal:
            found[name] = str(refusal)
    return found


@cache
def limits() -> dict[str, float]:
    return bench.bandwidths(DEVICE)


@cache
def group(model: str, kind: str) -> tuple[dict[str, bench.Timing], int]:
    lists = operands(bench.parameter_shapes(*MODELS[model]))
    copies = [torch.zeros_like(p, dtype=torch.bfloat16) for p in lists[0]] if kind == "copies" else None
    tasks = {name: step(partial(forced, name), lists, copies) for name in BACKENDS if name not in reasons()}
    tasks |= {name: peer(options, lists, copies) for name, options in PEERS.items()}
    return bench.interleave(tasks, DEVICE), sum(p.numel() for p in lists[0])


@pytest.fixture(scope="module", autouse=True)
def results() -> Iterator[None]:
    """Writes what was measured when the module is done."""
    yield
    if rows:
        bench.write("adamw_", rows, limits(), bench.machine(DEVICE))


@pytest.mark.parametrize("candidate", (*BACKENDS, *PEERS))
@pytest.mark.parametrize("kind", BYTES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.benchmark(timer=replay)
def test_adamw(benchmark: Any, model: str, kind: str, candidate: str) -> None:
    reason = reasons().get(candidate)
    if reason is not None:
        pytest.skip(reason)
    timings, count = group(model, kind)
    timing = timings[candidate]
    row = bench.row("adamw_", (count,), torch.float32, kind, candidate, timing, limits(), nbytes=BYTES[kind] * count)
    rows.append(row)
    benchmark.group = f"adamw_ {model} {kind}"
    ratios = {f"vs_{name}": round(timings[name].median / timing.median, 2) for name in PEERS}
    facts = {"GB/s": round(row["rate"] / 1e9, 1), "of_copy": row["fraction"], "spread": row["spread"]}
    replay.show(benchmark, timing, **facts, **ratios)
