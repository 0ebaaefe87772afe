"""cache_append_ at GPT-2's shapes: one token a row, and a prefill chunk, beside torch's indexed assignment (which is eager).

    pytest bench/ops/bench_cache_append_.py -k "prefill"
    pytest bench/ops/bench_cache_append_.py --benchmark-json=FILE         as JSON; rates and fractions are in extra_info

Keys and values are read once and written once: those bytes are counted, against the copy bandwidth of the same run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from gptfast import benchmark as bench
from gptfast import ops
from gptfast.errors import Error
from gptfast.ops.cache_append_ import eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, SIZE, PAGE = 12, 64, 64
CASES = {"decode": (1, 1), "decode-batch": (16, 1), "prefill": (4, 512)}  # rows, new tokens
DTYPES = (torch.float32, torch.bfloat16)
BACKENDS = ("cpp", "cuda", "triton", "eager")
replay = bench.Replay()
rows: list[dict[str, Any]] = []


def operands(case: str, dtype: torch.dtype) -> list[Tensor]:
    """Caches of 1,024 tokens a row with pages in random order, written in the middle."""
    count, new = CASES[case]
    pages = count * (1024 // PAGE)
    caches = [torch.zeros(pages, HEADS, PAGE, SIZE, dtype=dtype, device=DEVICE) for _ in range(2)]
    table = torch.randperm(pages, device=DEVICE).view(count, -1).int()
    tokens = [torch.randn(count, new, HEADS, SIZE, device=DEVICE).to(dtype) for _ in range(2)]
    return [*caches, *tokens, table, torch.full((count,), 300, dtype=torch.int32, device=DEVICE)]


def forced(name: str, *inputs: Any) -> None:
    with bench.force("cache_append_", name, *inputs[:4]):
        ops.cache_append_(*inputs)


@cache
def candidates() -> tuple[list[str], dict[str, str]]:
    """The backends that run here, and for the others the reason why not."""
    found, reasons = [], {}
    for name in BACKENDS:
        try:
            forced(name, *operands("decode", torch.float32))
            found.append(name)
        except Error as refusal:
            reasons[name] = str(refusal)
    return found, reasons


@cache
def limits() -> dict[str, float]:
    return bench.bandwidths(DEVICE)


def check(name: str, case: str, dtype: torch.dtype) -> None:
    found = operands(case, dtype)
    right = [found[0].clone(), found[1].clone(), *found[2:]]
    forced(name, *found)
    eager(*right)
    if not all(torch.equal(a, b) for a, b in zip(found, right, strict=True)):
        raise Error(f"benchmark of cache_append_ on {name} refused, {case} {dtype}: the caches differ from eager's")


@cache
def group(case: str, dtype: torch.dtype) -> dict[str, bench.Timing]:
    """All candidates of one table: checked against eager, then timed in turn on operands that no cache holds."""
    sets = bench.inputs(partial(operands, case, dtype), sum(t.nbytes for t in operands(case, dtype)), DEVICE)
    tasks: dict[str, Callable[[], Any]] = {}
    for name in candidates()[0]:
        check(name, case, dtype)
        tasks[name] = partial(lambda name, draw: forced(name, *draw()), name, itertools.cycle(sets).__next__)
    return bench.interleave(tasks, DEVICE, warmup=2)


@pytest.fixture(scope="module", autouse=True)
def results() -> Iterator[None]:
    """Writes what was measured when the module is done."""
    yield
    if rows:
        bench.write("cache_append_", rows, limits(), bench.machine(DEVICE))


@pytest.mark.parametrize("candidate", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES)
@pytest.mark.benchmark(timer=replay)
def test_cache_append(benchmark: Any, case: str, dtype: torch.dtype, candidate: str) -> None:
    reason = candidates()[1].get(candidate)
    if reason is not None:
        pytest.skip(reason)
    timings = group(case, dtype)
    timing, (count, new) = timings[candidate], CASES[case]
    nbytes = 2 * 2 * count * new * HEADS * SIZE * dtype.itemsize
    row = bench.row("cache_append_", (count, new, HEADS, SIZE), dtype, case, candidate, timing, limits(), nbytes=nbytes)
    rows.append(row)
    benchmark.group = f"cache_append_ {case} {row['dtype']}"
    ratio, rate = round(timings["eager"].median / timing.median, 2), round(row["rate"] / 1e9, 1)
    replay.show(benchmark, timing, **{"GB/s": rate, "of_copy": row["fraction"], "vs_eager": ratio, "spread": row["spread"]})
