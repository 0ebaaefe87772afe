"""dropout at GPT-2's widths: every backend beside torch's F.dropout, which draws other noise; forward, backward and both.

    pytest bench/ops/bench_dropout.py -k "768 and float32"

The ceiling is the copy bandwidth of the same run; Philox's ten rounds for every four values keep a CPU below it. Bytes counted:
forward reads x and writes y, backward reads dy and writes dx. torch saves a mask and reads it again, which is not counted.
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
from gptfast.ops.dropout import eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = 65536 if DEVICE == "cuda" else 4096
WIDTHS = (768, 1024, 1280, 1600)  # GPT-2 124M, 350M, 774M, 1.5B
P = 0.1
DTYPES = (torch.float32, torch.bfloat16)
PASSES = {"forward": 2, "backward": 2, "both": 4}  # tensors of x's size that are read or written
BACKENDS = ("cpp", "cuda", "triton")
replay = bench.Replay()
rows: list[dict[str, Any]] = []


def peer(x: Tensor, seed: Tensor) -> Tensor:
    return F.dropout(x, P)


def definition(x: Tensor, seed: Tensor) -> Tensor:
    return eager(x, P, seed)


def forced(name: str, x: Tensor, seed: Tensor) -> Tensor:
    with bench.force("dropout", name, x, seed, needs_grad=True):
        return ops.dropout(x, P, seed)


def operands(count: int, width: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """[x, seed], of which x wants a gradient, and an upstream gradient."""
    x, dy = (torch.randn(count, width).to(DEVICE, dtype) for _ in range(2))
    return [x.requires_grad_(), torch.tensor([7], device=DEVICE)], dy


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
        if name in BACKENDS:  # torch's own draws other noise
            bench.check(f"dropout on {name}", function, definition, operands(64, width, dtype)[0])
    sets = bench.inputs(partial(operands, ROWS, width, dtype), 2 * ROWS * width * dtype.itemsize, DEVICE)
    tasks = {name: bench.one_pass(f, direction, itertools.cycle(sets).__next__) for name, f in found.items()}
    return bench.interleave(tasks, DEVICE, warmup=len(sets))


@pytest.fixture(scope="module", autouse=True)
def results() -> Iterator[None]:
    """Writes what was measured when the module is done."""
    yield
    if rows:
        bench.write("dropout", rows, limits(), bench.machine(DEVICE))


@pytest.mark.parametrize("candidate", (*BACKENDS, "torch", "torch.compile"))
@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.benchmark(timer=replay)
def test_dropout(
    benchmark: Any, request: pytest.FixtureRequest, width: int, dtype: torch.dtype, direction: str, candidate: str
) -> None:
    torch_compile = bool(request.config.getoption("--torch-compile"))
    reason = candidates(torch_compile)[1].get(candidate)
    if reason is not None:
        pytest.skip(reason)
    timings = group(width, dtype, direction, torch_compile)
    timing, nbytes = timings[candidate], PASSES[direction] * ROWS * width * dtype.itemsize
    row = bench.row("dropout", (ROWS, width), dtype, direction, candidate, timing, limits(), nbytes=nbytes)
    rows.append(row)
    benchmark.group = f"dropout [{ROWS}, {width}] {row['dtype']} {direction}"
    ratio, rate = round(timings["torch"].median / timing.median, 2), round(row["rate"] / 1e9, 1)
    replay.show(benchmark, timing, **{"GB/s": rate, "of_copy": row["fraction"], "vs_torch": ratio, "spread": row["spread"]})
