"""add_layer_norm at GPT-2's widths: every backend beside torch (an addition and F.layer_norm); forward, backward, both.

    pytest bench/ops/bench_add_layer_norm.py -k "768 and float32"

The ceiling is the copy bandwidth of the same run. Bytes counted: forward reads residual and x and writes total and y; backward
reads dtotal, dy and total and writes the gradient that residual and x share. Parameters and statistics, below 1 %, are not counted.
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
from gptfast.ops.add_layer_norm import eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = 65536 if DEVICE == "cuda" else 4096
WIDTHS = (768, 1024, 1280, 1600)  # GPT-2 124M, 350M, 774M, 1.5B
DTYPES = (torch.float32, torch.bfloat16)
PASSES = {"forward": 4, "backward": 4, "both": 8}  # tensors of x's size that are read or written
BACKENDS = ("cpp", "cuda", "triton")
replay = bench.Replay()
rows: list[dict[str, Any]] = []


def peer(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + x
    return total, F.layer_norm(total, weight.shape, weight, bias)


def forced(name: str, *given: Any) -> Any:
    with bench.force("add_layer_norm", name, *given, needs_grad=True):
        return ops.add_layer_norm(*given)


def operands(count: int, width: int, dtype: torch.dtype) -> tuple[list[Tensor], Any]:
    """[residual, x, weight, bias], which want gradients, and the upstream gradients of total and y."""
    given = [torch.randn(count, width).to(DEVICE, dtype).requires_grad_() for _ in range(2)]
    given += [torch.randn(width).to(DEVICE, dtype).requires_grad_() for _ in range(2)]
    return given, [torch.randn(count, width).to(DEVICE, dtype) for _ in range(2)]


@cache
def candidates(torch_compile: bool) -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
    """What can be timed here, and for the others the reason why not."""
    found: dict[str, Callable[..., Any]] = {}
    reasons = {}
    for name in BACKENDS:
        try:
            forced(name, *operands(2, 8, torch.float32)[0])
            found[name] = partial(forced, name)
        except Error as refusal:
            reasons[name] = str(refusal)
    found["torch"] = peer
    if torch_compile:
        found["torch.compile"] = torch.compile(peer)
    else:
        reasons["torch.compile"] = "asked for with --torch-compile"
    return found, reasons


@cache
def limits() -> dict[str, float]:
    return bench.bandwidths(DEVICE)


@cache
def group(width: int, dtype: torch.dtype, direction: str, torch_compile: bool) -> dict[str, bench.Timing]:
    """All candidates of one table: checked against eager, then timed in turn on operands that no cache holds."""
    found, _ = candidates(torch_compile)
    for name, function in found.items():
        bench.check(f"add_layer_norm on {name}", function, eager, operands(64, width, dtype)[0])
    sets = bench.inputs(partial(operands, ROWS, width, dtype), 4 * ROWS * width * dtype.itemsize, DEVICE)
    tasks = {name: bench.one_pass(f, direction, itertools.cycle(sets).__next__) for name, f in found.items()}
    return bench.interleave(tasks, DEVICE, warmup=len(sets))


@pytest.fixture(scope="module", autouse=True)
def results() -> Iterator[None]:
    """Writes what was measured when the module is done."""
    yield
    if rows:
        bench.write("add_layer_norm", rows, limits(), bench.machine(DEVICE))


@pytest.mark.parametrize("candidate", (*BACKENDS, "torch", "torch.compile"))
@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.benchmark(timer=replay)
def test_add_layer_norm(
    benchmark: Any, request: pytest.FixtureRequest, width: int, dtype: torch.dtype, direction: str, candidate: str
) -> None:
    torch_compile = bool(request.config.getoption("--torch-compile"))
    reason = candidates(torch_compile)[1].get(candidate)
    if reason is not None:
        pytest.skip(reason)
    timings = group(width, dtype, direction, torch_compile)
    timing, nbytes = timings[candidate], PASSES[direction] * ROWS * width * dtype.itemsize
    row = bench.row("add_layer_norm", (ROWS, width), dtype, direction, candidate, timing, limits(), nbytes=nbytes)
    rows.append(row)
    benchmark.group = f"add_layer_norm [{ROWS}, {width}] {row['dtype']} {direction}"
    ratio, rate = round(timings["torch"].median / timing.median, 2), round(row["rate"] / 1e9, 1)
    replay.show(benchmark, timing, **{"GB/s": rate, "of_copy": row["fraction"], "vs_torch": ratio, "spread": row["spread"]})
