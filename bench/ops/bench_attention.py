"""Causal attention at GPT-2's head counts: every backend that runs here beside torch; forward and both directions.

    pytest bench/ops/bench_attention.py -k "1024 and float32"      a table for each (shape, dtype, direction)
    pytest bench/ops/bench_attention.py --torch-compile            with torch.compile of the same call as a peer
    pytest bench/ops/bench_attention.py --benchmark-json=FILE      as JSON; rates and fractions are in extra_info

are 2 T^2 D a head forward (the lower halves of two products of 2 T^2 D) and 2.5 times that backward (five products); the ceiling
are 2 T^2 D a head forward (the lower half of two products of 2 T^2 D each) and 2.5 times that backward (five products); the ceiling
is the rate of torch's matrix products in that dtype in the same run.
"""

from __future__ import annotations

import importlib
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
from gptfast.ops.attention import eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 16 if DEVICE == "cuda" else 1  # batch on a GPU
SHAPES = [(4, 256, 12, 64), (1, 1024, 12, 64), (4, 64, 12, 64), (1, 1024, 25, 64)]  # B, T, H, D: GPT-2 124M, and 1.5B
DTYPES = (torch.float32, torch.bfloat16)
PASSES = {"forward": 1.0, "backward": 2.5, "both": 3.5}
BACKENDS = ("cpp", "cuda", "triton")
replay = bench.Replay()
rows: list[dict[str, Any]] = []


def peer(qkv: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def forced(name: str, qkv: Tensor) -> Tensor:
    with bench.force("attention", name, *qkv.unbind(2), needs_grad=True):
        return ops.attention(qkv)


def operands(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """[qkv], which wants a gradient, and an upstream gradient."""
    batch, length, heads, size = shape
    qkv = torch.randn(batch, length, 3, heads, size).to(DEVICE, dtype).requires_grad_()
    return [qkv], torch.randn(shape).to(DEVICE, dtype)


@cache
def candidates(torch_compile: bool) -> tuple[dict[str, Callable[..., Tensor]], dict[str, str]]:
    """What can be timed here, and for the others the reason why not."""
    found: dict[str, Callable[..., Tensor]] = {}
    reasons = {}
    for name in BACKENDS:
        try:
            forced(name, *operands((1, 8, 1, 64), torch.float32)[0])
            found[name] = partial(forced, name)
        except Error as refusal:
            reasons[name] = str(refusal)
    found["torch"] = peer
    if not torch_compile:
        reasons["torch.compile"] = "asked for with --torch-compile"
        return found, reasons
    try:
        # backward alone keeps its graph, which donated buffers forbid
        importlib.import_module("torch._functorch.config").donated_buffer = False
        function = torch.compile(peer)
        function(*operands((1, 8, 1, 64), torch.float32)[0])
        found["torch.compile"] = function
    except Exception as error:  # inductor's errors have no common type
        reasons["torch.compile"] = f"does not work here: {type(error).__name__}"
    return found, reasons


@cache
def limits() -> dict[str, float]:
    return bench.ceilings(DEVICE, DTYPES)


@cache
def group(shape: tuple[int, ...], dtype: torch.dtype, direction: str, torch_compile: bool) -> dict[str, bench.Timing]:
    """All candidates of one table: checked against eager, then timed in turn on operands that no cache holds."""
    found, _ = candidates(torch_compile)
    for name, function in found.items():
        bench.check(f"attention on {name}", function, lambda x: eager(*x.unbind(2)), operands((1, 130, 2, shape[3]), dtype)[0])
    nbytes = 4 * torch.Size(shape).numel() * dtype.itemsize
    sets = bench.inputs(partial(operands, shape, dtype), nbytes, DEVICE)
    tasks = {name: bench.one_pass(f, direction, itertools.cycle(sets).__next__) for name, f in found.items()}
    return bench.interleave(tasks, DEVICE, warmup=len(sets))


@pytest.fixture(scope="module", autouse=True)
def results() -> Iterator[None]:
    """Writes what was measured when the module is done."""
    yield
    if rows:
        bench.write("attention", rows, limits(), bench.machine(DEVICE))


@pytest.mark.parametrize("candidate", (*BACKENDS, "torch", "torch.compile"))
@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.benchmark(timer=replay)
def test_attention(
    benchmark: Any, request: pytest.FixtureRequest, shape: tuple[int, ...], dtype: torch.dtype, direction: str, candidate: str
) -> None:
    torch_compile = bool(request.config.getoption("--torch-compile"))
    reason = candidates(torch_compile)[1].get(candidate)
    if reason is not None:
        pytest.skip(reason)
    batch, length, heads, size = shape[0] * SCALE, *shape[1:]
    timings = group((batch, length, heads, size), dtype, direction, torch_compile)
    flops = PASSES[direction] * 2.0 * batch * heads * length**2 * size
    work: Any = {"flops": flops, "ceiling": f"gemm_{str(dtype).removeprefix('torch.')}"}
    row = bench.row("attention", (batch, length, heads, size), dtype, direction, candidate, timings[candidate], limits(), **work)
    rows.append(row)
    benchmark.group = f"attention {row['shape']} {row['dtype']} {direction}"
    ratio, rate = round(timings["torch"].median / timings[candidate].median, 2), round(row["rate"] / 1e9, 1)
    shown = {"GFLOP/s": rate, "of_gemm": row["fraction"], "vs_torch": ratio, "spread": row["spread"]}
    replay.show(benchmark, timings[candidate], **shown)
