"""cross_entropy over GPT-2's vocabulary: every backend that runs here beside torch; forward, backward and both.

    pytest bench/ops/bench_cross_entropy.py -k "bfloat16 and both"

Bytes counted: forward reads the logits; backward reads them and writes their gradient. The ceiling is the copy bandwidth of the
same run. torch's bf16 row is its own bf16 path, whose loss is bf16 too.
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
from gptfast.ops.cross_entropy import eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = (65536,) if DEVICE == "cuda" else (1024, 64)
VOCAB = 50304
DTYPES = (torch.float32, torch.bfloat16)
PASSES = {"forward": 1, "backward": 2, "both": 3}  # tensors of the logits' size that are read or written
BACKENDS = ("cpp", "cuda", "triton")
replay = bench.Replay()
rows: list[dict[str, Any]] = []


def forced(name: str, logits: Tensor, targets: Tensor) -> Tensor:
    with bench.force("cross_entropy", name, logits, needs_grad=True):
        return ops.cross_entropy(logits, targets)


def operands(count: int, dtype: torch.dtype, loss: torch.dtype) -> tuple[list[Tensor], Tensor]:
    logits = torch.randn(count, VOCAB, device=DEVICE).to(dtype).requires_grad_()
    return [logits, torch.randint(0, VOCAB, (count,), device=DEVICE)], torch.ones((), device=DEVICE, dtype=loss)


@cache
def candidates() -> tuple[dict[str, Callable[..., Tensor]], dict[str, str]]:
    """What can be timed here, checked against eager; for the others the reason why not."""
    found: dict[str, Callable[..., Tensor]] = {}
    reasons = {}
    for name in BACKENDS:
        try:
            for dtype in DTYPES:
                bench.check(f"cross_entropy on {name}", partial(forced, name), eager, operands(16, dtype, torch.float32)[0])
            found[name] = partial(forced, name)
        except Error as refusal:
            reasons[name] = str(refusal)
    found["torch"] = F.cross_entropy
    return found, reasons


@cache
def limits() -> dict[str, float]:
    return bench.bandwidths(DEVICE)


@cache
def group(count: int, dtype: torch.dtype, direction: str) -> dict[str, bench.Timing]:
    found, _ = candidates()
    sets = bench.inputs(partial(operands, count, dtype, torch.float32), count * VOCAB * dtype.itemsize, DEVICE)
    theirs = [(given, upstream.to(dtype)) for given, upstream in sets]
    draws = {name: itertools.cycle(theirs if name == "torch" else sets).__next__ for name in found}
    return bench.interleave({n: bench.one_pass(f, direction, draws[n]) for n, f in found.items()}, DEVICE, warmup=len(sets))


@pytest.fixture(scope="module", autouse=True)
def results() -> Iterator[None]:
    """Writes what was measured when the module is done."""
    yield
    if rows:
        bench.write("cross_entropy", rows, limits(), bench.machine(DEVICE))


@pytest.mark.parametrize("candidate", (*BACKENDS, "torch"))
@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("count", ROWS)
@pytest.mark.benchmark(timer=replay)
def test_cross_entropy(benchmark: Any, count: int, dtype: torch.dtype, direction: str, candidate: str) -> None:
    reason = candidates()[1].get(candidate)
    if reason is not None:
        pytest.skip(reason)
    timings = group(count, dtype, direction)
    timing, nbytes = timings[candidate], PASSES[direction] * count * VOCAB * dtype.itemsize
    row = bench.row("cross_entropy", (count, VOCAB), dtype, direction, candidate, timing, limits(), nbytes=nbytes)
    rows.append(row)
    benchmark.group = f"cross_entropy [{count}, {VOCAB}] {row['dtype']} {direction}"
    ratio = round(timings["torch"].median / timing.median, 2)
    facts = {"GB/s": round(row["rate"] / 1e9, 1), "of_copy": row["fraction"], "vs_torch": ratio, "spread": row["spread"]}
    replay.show(benchmark, timing, **facts)
