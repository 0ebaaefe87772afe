"""linear_cross_entropy, GPT-2's head and loss with their gradients, beside torch's linear, cross_entropy and autograd.

    pytest bench/ops/bench_linear_cross_entropy.py -k bfloat16

Operations counted: the three products, 6 N C V. The ceiling is the GEMM rate of the same run, in the same dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast import benchmark as bench
from gptfast import ops
from gptfast.errors import Error
from gptfast.ops.linear_cross_entropy import eager

SHAPE = (1024, 768, 50304)  # rows, width, vocabulary: GPT-2 124M at B=4 T=256
DTYPES = (torch.float32, torch.bfloat16)
replay = bench.Replay()
rows: list[dict[str, Any]] = []


def forced(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    with bench.force("linear_cross_entropy", "cpp", x, weight, needs_grad=True):
        return ops.linear_cross_entropy(x, weight, targets, reduction="sum")


def peer(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), targets, reduction="sum")


def operands(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    count, width, vocab = shape
    x, weight = (torch.randn(size, width).to(dtype).requires_grad_() for size in (count, vocab))
    return [x, weight, torch.randint(0, vocab, (count,))], torch.ones(())


@cache
def candidates() -> tuple[dict[str, Callable[..., Tensor]], str | None]:
    """What can be timed here, checked against eager, and why the C++ one is not among them if it is not."""
    found: dict[str, Callable[..., Tensor]] = {"torch": peer}
    try:
        for dtype in DTYPES:
            definition = partial(eager, reduction="sum")
            bench.check("linear_cross_entropy on cpp", forced, definition, operands((33, 40, 130), dtype)[0])
    except Error as refusal:
        return found, str(refusal)
    return {"cpp": forced, **found}, None


@cache
def limits() -> dict[str, float]:
    return bench.ceilings("cpu", DTYPES)


@cache
def group(dtype: torch.dtype) -> dict[str, bench.Timing]:
    """Two sets of operands: the weight alone is larger than the caches."""
    sets = itertools.cycle([operands(SHAPE, dtype) for _ in range(2)])
    tasks = {name: bench.one_pass(f, "both", sets.__next__) for name, f in candidates()[0].items()}
    return bench.interleave(tasks, rounds=5, warmup=1)


@pytest.fixture(scope="module", autouse=True)
def results() -> Iterator[None]:
    """Writes what was measured when the module is done."""
    yield
    if rows:
        bench.write("linear_cross_entropy", rows, limits(), bench.machine("cpu"))


@pytest.mark.parametrize("candidate", ("cpp", "torch"))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.benchmark(timer=replay)
def test_linear_cross_entropy(benchmark: Any, dtype: torch.dtype, candidate: str) -> None:
    reason = candidates()[1]
    if candidate == "cpp" and reason is not None:
        pytest.skip(reason)
    timings = group(dtype)
    timing, (count, width, vocab) = timings[candidate], SHAPE
    flops, ceiling = 6 * count * width * vocab, f"gemm_{str(dtype).removeprefix('torch.')}"
    row = bench.row("linear_cross_entropy", SHAPE, dtype, "both", candidate, timing, limits(), flops=flops, ceiling=ceiling)
    rows.append(row)
    benchmark.group = f"linear_cross_entropy {list(SHAPE)} {row['dtype']}"
    facts = {"GFLOP/s": round(row["rate"] / 1e9), "of_gemm": row["fraction"], "spread": row["spread"]}
    replay.show(benchmark, timing, **facts, vs_torch=round(timings["torch"].median / timing.median, 2))
