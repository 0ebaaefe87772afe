"""grad_norm over the gradients of GPT-2 124M and of a four-layer model, beside torch.nn.utils.get_total_norm.

    pytest bench/ops/bench_grad_norm.py -k small

Bytes counted: every gradient is read once. The ceiling is the read bandwidth of the same run. The small model shows what a
call costs.
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
from gptfast.ops.grad_norm import eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODELS = {"gpt2": (12, 768, 50304, 1024), "small": (4, 128, 65, 64)}  # layers, width, vocabulary, context
DTYPES = (torch.float32, torch.bfloat16)
BACKENDS = ("cpp", "cuda", "triton")
replay = bench.Replay()
rows: list[dict[str, Any]] = []


def forced(name: str, *grads: Tensor) -> tuple[Tensor, Tensor]:
    with bench.force("grad_norm", name, list(grads)):
        return ops.grad_norm(grads)


@cache
def candidates() -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
    """What can be timed here, checked against eager; for the others the reason why not."""
    found: dict[str, Callable[..., Any]] = {}
    reasons = {}
    for name in BACKENDS:
        try:
            operands = [torch.randn(1000, device=DEVICE), torch.randn(7, 9, device=DEVICE)]
            bench.check(f"grad_norm on {name}", partial(forced, name), lambda *grads: eager(grads), operands)
            found[name] = partial(forced, name)
        except Error as refusal:
            reasons[name] = str(refusal)
    found["torch"] = lambda *grads: torch.nn.utils.get_total_norm(grads)
    return found, reasons


@cache
def limits() -> dict[str, float]:
    return bench.bandwidths(DEVICE)


@cache
def group(model: str, dtype: torch.dtype) -> tuple[dict[str, bench.Timing], int]:
    grads = [torch.randn(shape, device=DEVICE).to(dtype) for shape in bench.parameter_shapes(*MODELS[model])]
    timings = bench.interleave({name: partial(f, *grads) for name, f in candidates()[0].items()}, DEVICE)
    return timings, sum(g.nbytes for g in grads)


@pytest.fixture(scope="module", autouse=True)
def results() -> Iterator[None]:
    """Writes what was measured when the module is done."""
    yield
    if rows:
        bench.write("grad_norm", rows, limits(), bench.machine(DEVICE))


@pytest.mark.parametrize("candidate", (*BACKENDS, "torch"))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.benchmark(timer=replay)
def test_grad_norm(benchmark: Any, model: str, dtype: torch.dtype, candidate: str) -> None:
    reason = candidates()[1].get(candidate)
    if reason is not None:
        pytest.skip(reason)
    timings, nbytes = group(model, dtype)
    timing = timings[candidate]
    shape = (nbytes // dtype.itemsize,)
    row = bench.row("grad_norm", shape, dtype, "forward", candidate, timing, limits(), nbytes=nbytes, ceiling="read")
    rows.append(row)
    benchmark.group = f"grad_norm {model} {row['dtype']}"
    ratio = round(timings["torch"].median / timing.median, 2)
    facts = {"GB/s": round(row["rate"] / 1e9, 1), "of_read": row["fraction"], "vs_torch": ratio, "spread": row["spread"]}
    replay.show(benchmark, timing, **facts)
