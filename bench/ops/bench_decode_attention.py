"""decode_attention at GPT-2's shapes: one token a row at several lengths, and chunked prefill, beside torch's attention.

    pytest bench/ops/bench_decode_attention.py -k "decode-896 and float32"
    pytest bench/ops/bench_decode_attention.py --benchmark-json=FILE         as JSON; rates and fractions are in extra_info

Decode is bound by reading the cache: bytes of the keys and values in use, against the read bandwidth of the same run. Prefill
counts 4 D FLOPs for each pair of a query and a key that it sees, against the GEMM rate. Peers: `sdpa` is torch's attention on keys
and values that already lie in one piece, which a paged cache does not give it; `eager` gathers the pages first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast import benchmark as bench
from gptfast import ops
from gptfast.errors import Error
from gptfast.ops.decode_attention import eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, SIZE, PAGE = 12, 64, 64
CASES = {  # rows, new tokens, keys a row
    "decode-64": (1, 1, 64), "decode-896": (1, 1, 896), "decode-batch": (16, 1, 896), "verify": (1, 8, 896),
    "prefill": (1, 512, 512), "prefill-chunk": (1, 128, 1024),
}  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16)
BACKENDS = ("cpp", "cuda", "triton", "eager")
replay = bench.Replay()
rows: list[dict[str, Any]] = []


class Operands(NamedTuple):
    """What the op takes, in its order."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    lengths: Tensor


def operands(case: str, dtype: torch.dtype) -> Operands:
    """Pages in random order, all in use."""
    count, new, keys = CASES[case]
    pages = count * (keys // PAGE)
    caches = [torch.randn(pages, HEADS, PAGE, SIZE, device=DEVICE).to(dtype) for _ in range(2)]
    table = torch.randperm(pages, device=DEVICE).view(count, -1).int()
    q = torch.randn(count, new, HEADS, SIZE, device=DEVICE).to(dtype)
    return Operands(q, caches[0], caches[1], table, torch.full((count,), keys, dtype=torch.int32, device=DEVICE))


def forced(name: str, *inputs: Any) -> Tensor:
    with bench.force("decode_attention", name, *inputs):
        return ops.decode_attention(*inputs)


def contiguous(inputs: Operands) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, v [B, H, T, D] in one piece and the mask, for torch's attention."""
    new, keys = inputs.q.shape[1], int(inputs.lengths[0])
    k, v = (c[inputs.block_table.long()].transpose(1, 2).flatten(2, 3).contiguous() for c in (inputs.k_cache, inputs.v_cache))
    mask = torch.ones(new, keys, dtype=torch.bool, device=DEVICE).tril(keys - new) if new > 1 else None
    return inputs.q.transpose(1, 2).contiguous(), k, v, mask


@cache
def candidates() -> tuple[list[str], dict[str, str]]:
    """The backends that run here, and for the others the reason why not."""
    found, reasons = [], {}
    for name in BACKENDS:
        try:
            forced(name, *operands("decode-64", torch.float32))
            found.append(name)
        except Error as refusal:
            reasons[name] = str(refusal)
    return found, reasons


@cache
def limits() -> dict[str, float]:
    return bench.ceilings(DEVICE, DTYPES)


def work(case: str, dtype: torch.dtype) -> dict[str, Any]:
    """Bytes or FLOPs of a call, and the ceiling they are held against."""
    count, new, keys = CASES[case]
    if new <= 8:
        return {"nbytes": 2 * count * keys * HEADS * SIZE * dtype.itemsize, "ceiling": "read"}
    pairs = new * keys - new * (new - 1) // 2
    return {"flops": 4.0 * count * HEADS * SIZE * pairs, "ceiling": f"gemm_{str(dtype).removeprefix('torch.')}"}


@cache
def group(case: str, dtype: torch.dtype) -> dict[str, bench.Timing]:
    """All candidates of one table: checked against eager, then timed in turn on caches that no cache holds."""
    sample = operands(case, dtype)
    for name in candidates()[0]:
        bench.check(f"decode_attention on {name}", partial(forced, name), eager, sample)
    sets = bench.inputs(partial(operands, case, dtype), 2 * sample.k_cache.nbytes, DEVICE)[:64]
    tasks: dict[str, Callable[[], Any]] = {}
    for name in candidates()[0]:
        tasks[name] = partial(lambda name, draw: forced(name, *draw()), name, itertools.cycle(sets).__next__)

    def sdpa(draw: Callable[[], Any]) -> Tensor:
        q, k, v, mask = draw()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    tasks["sdpa"] = partial(sdpa, itertools.cycle([contiguous(inputs) for inputs in sets]).__next__)
    return bench.interleave(tasks, DEVICE, warmup=2)


@pytest.fixture(scope="module", autouse=True)
def results() -> Iterator[None]:
    """Writes what was measured when the module is done."""
    yield
    if rows:
        bench.write("decode_attention", rows, limits(), bench.machine(DEVICE))


@pytest.mark.parametrize("candidate", (*BACKENDS, "sdpa"))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES)
@pytest.mark.benchmark(timer=replay)
def test_decode_attention(benchmark: Any, case: str, dtype: torch.dtype, candidate: str) -> None:
    reason = candidates()[1].get(candidate)
    if reason is not None:
        pytest.skip(reason)
    timings = group(case, dtype)
    timing = timings[candidate]
    row = bench.row("decode_attention", (*CASES[case], HEADS, SIZE), dtype, case, candidate, timing, limits(), **work(case, dtype))
    rows.append(row)
    benchmark.group = f"decode_attention {case} {row['dtype']}"
    ratio, rate = round(timings["sdpa"].median / timing.median, 2), round(row["rate"] / 1e9, 1)
    facts = {f"G{row['unit']}": rate, f"of_{row['ceiling']}": row["fraction"], "vs_sdpa": ratio, "spread": row["spread"]}
    replay.show(benchmark, timing, **facts)
