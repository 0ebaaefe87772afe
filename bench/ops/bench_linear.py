"""linear at the shapes of GPT-2's four products: forward, backward and both beside torch's linear.

    pytest bench/ops/bench_linear.py -k "c_fc and bfloat16"

Operations counted: 2 N K M forward, twice that backward. The ceiling is the GEMM rate of the same run, in the same dtype.
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
from gptfast.ops.linear import eager

SHAPES = {  # rows, inputs, outputs
    "c_attn": (1024, 768, 2304), "c_proj": (1024, 768, 768), "c_fc": (1024, 768, 3072), "mlp c_proj": (1024, 3072, 768),
    "character c_fc": (768, 128, 512), "character c_proj": (768, 128, 128),
}  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16)
PASSES = {"forward": 2, "backward": 4, "both": 6}  # operations for each of N K M
replay = bench.Replay()
rows: list[dict[str, Any]] = []


def forced(name: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As GPT-2's Conv1D calls it: the weight is stored [K, M]."""
    with bench.force("linear", name, x, weight, bias, needs_grad=True):
        return ops.linear(x, weight.t(), bias)


def peer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight.t(), bias)


def operands(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    count, inputs, outputs = shape
    made = [torch.randn(size).to(dtype).requires_grad_() for size in ((count, inputs), (inputs, outputs), (outputs,))]
    return made, torch.randn(count, outputs).to(dtype)


@cache
def candidates() -> tuple[dict[str, Callable[..., Tensor]], str | None]:
    """What can be timed here, checked against eager, and why the C++ one is not among them if it is not."""
    found: dict[str, Callable[..., Tensor]] = {"torch": peer}
    try:
        for dtype in DTYPES:
            small = operands((33, 65, 40), dtype)[0]
            bench.check("linear on cpp", partial(forced, "cpp"), lambda x, w, b: eager(x, w.t(), b), small)
    except Error as refusal:
        return found, str(refusal)
    return {"cpp": partial(forced, "cpp"), **found}, None


@cache
def limits() -> dict[str, float]:
    return bench.ceilings("cpu", DTYPES)


@cache
def group(name: str, dtype: torch.dtype, direction: str) -> dict[str, bench.Timing]:
    count, inputs, outputs = SHAPES[name]
    nbytes = (count * inputs + inputs * outputs + count * outputs) * dtype.itemsize
    sets = bench.inputs(partial(operands, SHAPES[name], dtype), nbytes)
    tasks = {key: bench.one_pass(f, direction, itertools.cycle(sets).__next__) for key, f in candidates()[0].items()}
    return bench.interleave(tasks, warmup=len(sets))


@pytest.fixture(scope="module", autouse=True)
def results() -> Iterator[None]:
    """Writes what was measured when the module is done."""
    yield
    if rows:
        bench.write("linear", rows, limits(), bench.machine("cpu"))


@pytest.mark.parametrize("candidate", ("cpp", "torch"))
@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.benchmark(timer=replay)
def test_linear(benchmark: Any, name: str, dtype: torch.dtype, direction: str, candidate: str) -> None:
    reason = candidates()[1]
    if candidate == "cpp" and reason is not None:
        pytest.skip(reason)
    timings = group(name, dtype, direction)
    timing, (count, inputs, outputs) = timings[candidate], SHAPES[name]
    flops, ceiling = PASSES[direction] * count * inputs * outputs, f"gemm_{str(dtype).removeprefix('torch.')}"
    shape = (count, inputs, outputs)
    row = bench.row("linear", shape, dtype, direction, candidate, timing, limits(), flops=flops, ceiling=ceiling)
    rows.append(row)
    benchmark.group = f"linear {name} {list(shape)} {row['dtype']} {direction}"
    facts = {"GFLOP/s": round(row["rate"] / 1e9), "of_gemm": row["fraction"], "spread": row["spread"]}
    replay.show(benchmark, timing, **facts, vs_torch=round(timings["torch"].median / timing.median, 2))
