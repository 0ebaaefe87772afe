"""linear_add at GPT-2 124M's shapes, one row and many: plain weights and packed ones beside torch's two calls.

    pytest bench/ops/bench_linear_add.py -k "mlp and rows1"

At one row the time is that of reading the weight: bytes of the weight, against the read bandwidth of the same run. Candidates:
`cpp` and `torch` take the weight in x's dtype (torch as F.linear and an addition), `packed-<format>` is cpp with a packed weight.
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
from gptfast.ops.linear_add import eager
from gptfast.packing import FORMATS

SHAPES = {"c_proj": (768, 768), "mlp c_proj": (3072, 768)}  # inputs, outputs
ROWS, DTYPES = (1, 8, 32), (torch.float32, torch.bfloat16)
CANDIDATES = ("cpp", *(f"packed-{format}" for format in FORMATS), "torch")
replay = bench.Replay()
rows: list[dict[str, Any]] = []


def forced(*inputs: Any) -> Tensor:
    with bench.force("linear_add", "cpp", *inputs):
        return ops.linear_add(*inputs)


def peer(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return residual + F.linear(x, weight, bias)


def operands(name: str, count: int, candidate: str, dtype: torch.dtype) -> list[Any]:
    inputs, outputs = SHAPES[name]
    weight: Any = (torch.randn(outputs, inputs) * 0.02).to(dtype)
    if candidate.startswith("packed"):
        weight = ops.pack_weight(weight, candidate.partition("-")[2])
    x, bias, residual = (torch.randn(size).to(dtype) for size in ((count, inputs), (outputs,), (count, outputs)))
    return [x, weight, bias, residual]


def weight_bytes(weight: Any) -> int:
    return int((weight if isinstance(weight, Tensor) else weight.data).nbytes)


@cache
def refusal() -> str | None:
    """Why the C++ kernel cannot be timed here; it is checked against eager."""
    try:
        for dtype in DTYPES:
            bench.check("linear_add on cpp", forced, eager, operands("c_proj", 3, "cpp", dtype))
    except Error as reason:
        return str(reason)
    return None


@cache
def limits() -> dict[str, float]:
    return bench.ceilings("cpu")


@cache
def group(name: str, count: int, dtype: torch.dtype) -> tuple[dict[str, bench.Timing], dict[str, int]]:
    tasks: dict[str, Callable[[], Any]] = {}
    sizes = {}
    for candidate in CANDIDATES if refusal() is None else ("torch",):
        sizes[candidate] = weight_bytes(operands(name, 1, candidate, dtype)[1])
        sets = bench.inputs(partial(operands, name, count, candidate, dtype), sizes[candidate])
        function = peer if candidate == "torch" else forced
        tasks[candidate] = partial(lambda function, draw: function(*draw()), function, itertools.cycle(sets).__next__)
    return bench.interleave(tasks, warmup=4), sizes


@pytest.fixture(scope="module", autouse=True)
def results() -> Iterator[None]:
    """Writes what was measured when the module is done."""
    yield
    if rows:
        bench.write("linear_add", rows, limits(), bench.machine("cpu"))


@pytest.mark.parametrize("candidate", CANDIDATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("count", ROWS, ids=lambda count: f"rows{count}")
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.benchmark(timer=replay)
def test_linear_add(benchmark: Any, name: str, count: int, dtype: torch.dtype, candidate: str) -> None:
    reason = refusal()
    if candidate != "torch" and reason is not None:
        pytest.skip(reason)
    timings, sizes = group(name, count, dtype)
    timing, shape = timings[candidate], (count, *SHAPES[name])
    row = bench.row("linear_add", shape, dtype, "forward", candidate, timing, limits(), nbytes=sizes[candidate], ceiling="read")
    rows.append(row)
    benchmark.group = f"linear_add {name} {list(shape)} {row['dtype']}"
    facts = {"GB/s": round(row["rate"] / 1e9, 1), "of_read": row["fraction"], "spread": row["spread"]}
    replay.show(benchmark, timing, **facts, vs_torch=round(timings["torch"].median / timing.median, 2))
