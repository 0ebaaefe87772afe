"""cross_entropy_ over GPT-2's vocabulary, loss and gradient in one go, beside torch's cross_entropy forward and backward.

    pytest bench/ops/bench_cross_entropy_.py -k float32

Bytes counted: the logits are read once and overwritten once. The ceiling is the copy bandwidth of the same run.
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
from gptfast.ops.cross_entropy_ import eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = (65536,) if DEVICE == "cuda" else (1024, 64)
VOCAB = 50304
DTYPES = (torch.float32, torch.bfloat16)
BACKENDS = ("cpp", "cuda", "triton")
replay = bench.Replay()
rows: list[dict[str, Any]] = []


def forced(name: str, logits: Tensor, targets: Tensor) -> Tensor:
    with bench.force("cross_entropy_", name, logits):
        return ops.cross_entropy_(logits, targets, reduction="none")


def peer(logits: Tensor, targets: Tensor) -> Tensor:
    leaf = logits.detach().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(leaf, targets, reduction="sum"), leaf)[0]


def operands(count: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(count, VOCAB, device=DEVICE).to(dtype), torch.randint(0, VOCAB, (count,), device=DEVICE)]


def left_behind(function: Callable[..., Tensor], logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.clone()
    return function(logits, targets), logits


@cache
def candidates() -> tuple[dict[str, Callable[..., Tensor]], dict[str, str]]:
    """What can be timed here, checked against eager; for the others the reason why not."""
    found: dict[str, Callable[..., Tensor]] = {}
    reasons = {}
    definition = partial(left_behind, lambda x, t: eager(x, t, -100, VOCAB, torch.ones(1, device=DEVICE)))
    for name in BACKENDS:
        try:
            for dtype in DTYPES:
                mine = partial(left_behind, partial(forced, name))
                bench.check(f"cross_entropy_ on {name}", mine, definition, operands(16, dtype))
            found[name] = partial(forced, name)
        except Error as refusal:
            reasons[name] = str(refusal)
    found["torch"] = peer
    return found, reasons


@cache
def limits() -> dict[str, float]:
    return bench.bandwidths(DEVICE)


@cache
def group(count: int, dtype: torch.dtype) -> dict[str, bench.Timing]:
    """Timed in turn; what an earlier call left in the logits costs the next one as much as fresh logits do."""
    sets = itertools.cycle(bench.inputs(partial(operands, count, dtype), count * VOCAB * dtype.itemsize, DEVICE))
    tasks = {name: lambda f=f: f(*next(sets)) for name, f in candidates()[0].items()}  # type: ignore[misc]
    return bench.interleave(tasks, DEVICE, warmup=2)


@pytest.fixture(scope="module", autouse=True)
def results() -> Iterator[None]:
    """Writes what was measured when the module is done."""
    yield
    if rows:
        bench.write("cross_entropy_", rows, limits(), bench.machine(DEVICE))


@pytest.mark.parametrize("candidate", (*BACKENDS, "torch"))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("count", ROWS)
@pytest.mark.benchmark(timer=replay)
def test_cross_entropy_in_place(benchmark: Any, count: int, dtype: torch.dtype, candidate: str) -> None:
    reason = candidates()[1].get(candidate)
    if reason is not None:
        pytest.skip(reason)
    timings = group(count, dtype)
    timing, nbytes = timings[candidate], 2 * count * VOCAB * dtype.itemsize
    row = bench.row("cross_entropy_", (count, VOCAB), dtype, "both", candidate, timing, limits(), nbytes=nbytes)
    rows.append(row)
    benchmark.group = f"cross_entropy_ [{count}, {VOCAB}] {row['dtype']}"
    ratio = round(timings["torch"].median / timing.median, 2)
    facts = {"GB/s": round(row["rate"] / 1e9, 1), "of_copy": row["fraction"], "vs_torch": ratio, "spread": row["spread"]}
    replay.show(benchmark, timing, **facts)
