"""embedding at GPT-2's sizes: every backend beside torch (two F.embedding and their sum); forward, backward and both.

    pytest bench/ops/bench_embedding.py -k "768 and float32"

The ceiling is the copy bandwidth of the same run. Bytes counted: forward reads a row of each table and writes one for every token;
backward reads dy and writes both tables' gradients in fp32 (for torch in the tables' dtype, counted alike).
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
from gptfast.ops.embedding import eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, TIME = (64, 1024) if DEVICE == "cuda" else (4, 1024)
VOCAB, CONTEXT = 50257, 1024
WIDTHS = (768, 1600)  # GPT-2 124M, 1.5B
DTYPES = (torch.float32, torch.bfloat16)
DIRECTIONS = ("forward", "backward", "both")
BACKENDS = ("cpp", "cuda", "triton")
replay = bench.Replay()
rows: list[dict[str, Any]] = []


def peer(ids: Tensor, positions: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
    return F.embedding(ids, wte) + F.embedding(positions, wpe)


def forced(name: str, *given: Any) -> Any:
    with bench.force("embedding", name, *given, needs_grad=True):
        return ops.embedding(*given)


def operands(batch: int, width: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """[ids, positions, wte, wpe], of which the tables want gradients, and an upstream gradient."""
    ids = torch.randint(0, VOCAB, (batch, TIME), device=DEVICE)
    tables = [torch.randn(size, width).to(DEVICE, dtype).requires_grad_() for size in (VOCAB, CONTEXT)]
    return [ids, torch.arange(TIME, device=DEVICE).expand(batch, TIME), *tables], torch.randn(batch, TIME, width).to(DEVICE, dtype)


def moved(direction: str, width: int, dtype: torch.dtype) -> int:
    tokens, tables = BATCH * TIME * width * dtype.itemsize, (VOCAB + CONTEXT) * width * 4
    return {"forward": 3 * tokens, "backward": tokens + tables, "both": 4 * tokens + tables}[direction]


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
        bench.check(f"embedding on {name}", function, eager, operands(1, width, dtype)[0])
    sets = bench.inputs(partial(operands, BATCH, width, dtype), (VOCAB + CONTEXT) * width * dtype.itemsize, DEVICE)
    tasks = {name: bench.one_pass(f, direction, itertools.cycle(sets).__next__) for name, f in found.items()}
    return bench.interleave(tasks, DEVICE, warmup=len(sets))


@pytest.fixture(scope="module", autouse=True)
def results() -> Iterator[None]:
    """Writes what was measured when the module is done."""
    yield
    if rows:
        bench.write("embedding", rows, limits(), bench.machine(DEVICE))


@pytest.mark.parametrize("candidate", (*BACKENDS, "torch", "torch.compile"))
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.benchmark(timer=replay)
def test_embedding(
    benchmark: Any, request: pytest.FixtureRequest, width: int, dtype: torch.dtype, direction: str, candidate: str
) -> None:
    torch_compile = bool(request.config.getoption("--torch-compile"))
    reason = candidates(torch_compile)[1].get(candidate)
    if reason is not None:
        pytest.skip(reason)
    timings = group(width, dtype, direction, torch_compile)
    timing, nbytes = timings[candidate], moved(direction, width, dtype)
    row = bench.row("embedding", (BATCH, TIME, VOCAB, width), dtype, direction, candidate, timing, limits(), nbytes=nbytes)
    rows.append(row)
    benchmark.group = f"embedding [{BATCH}, {TIME}] of [{VOCAB}, {width}] {row['dtype']} {direction}"
    ratio, rate = round(timings["torch"].median / timing.median, 2), round(row["rate"] / 1e9, 1)
    replay.show(benchmark, timing, **{"GB/s": rate, "of_copy": row["fraction"], "vs_torch": ratio, "spread": row["spread"]})
