"""lm_head_sample at GPT-2 124M's head, one row and many: plain and packed heads beside the same three steps in torch.

    pytest bench/ops/bench_lm_head_sample.py -k "sampled and rows1"

At one row the time is that of reading the head: its bytes, against the read bandwidth of the same run. Candidates: `cpp` and
`torch` take the weight in x's dtype, `packed-<format>` is cpp with a packed head. The peer draws by topk, softmax, cumsum and
multinomial, argmax where greedy; it has neither a log-probability nor a seed a request, both of which ours have.
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
from gptfast.packing import FORMATS

WIDTH, VOCAB = 768, 50257
ROWS, DTYPES = (1, 8, 32), (torch.float32, torch.bfloat16)
FILTERS = {
    "greedy": {"temperature": 0.0}, "plain": {"temperature": 1.0}, "sampled": {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
}  # fmt: skip
CANDIDATES = ("cpp", *(f"packed-{format}" for format in FORMATS), "torch")
replay = bench.Replay()
rows: list[dict[str, Any]] = []


def settings(filters: str, count: int) -> dict[str, Any]:
    whole = {"top_k", "seed", "position", "choice"}
    numbers = {**FILTERS[filters], "seed": 7, "position": 100, "choice": 0}
    return {n: torch.full((count,), v, dtype=torch.int64 if n in whole else torch.float32) for n, v in numbers.items()}


def forced(name: str, arguments: dict[str, Any], *tensors: Any) -> Any:
    with bench.force("lm_head_sample", name, *tensors, "gptfast", "raw"):
        return ops.lm_head_sample(*tensors, **arguments)


def peer(filters: str, x: Tensor, ln_weight: Tensor, ln_bias: Tensor, weight: Tensor) -> Tensor:
    logits = F.linear(F.layer_norm(x, (WIDTH,), ln_weight, ln_bias), weight)
    if filters == "greedy":
        return logits.argmax(-1)
    if filters == "plain":
        return torch.multinomial(logits.float().softmax(-1), 1)
    values, ids = (logits.float() / FILTERS[filters]["temperature"]).topk(50)
    p = values.softmax(-1)
    return ids.gather(-1, torch.multinomial(torch.where(p.cumsum(-1) - p < FILTERS[filters]["top_p"], p, 0), 1))


def operands(count: int, candidate: str, dtype: torch.dtype) -> list[Any]:
    weight: Any = (torch.randn(VOCAB, WIDTH) * 0.1).to(dtype)
    if candidate.startswith("packed"):
        weight = ops.pack_weight(weight, candidate.partition("-")[2])
    return [*(torch.randn(size).to(dtype) for size in ((count, WIDTH), (WIDTH,), (WIDTH,))), weight]


def weight_bytes(weight: Any) -> int:
    return int((weight if isinstance(weight, Tensor) else weight.data).nbytes)


@cache
def refusal() -> str | None:
    """Why the C++ kernel cannot be timed here; its tokens are compared with eager's."""
    try:
        for candidate in ("cpp", "packed-fp32"):
            tensors = operands(3, candidate, torch.float32)
            right, found = (forced(name, settings("sampled", 3), *tensors) for name in ("eager", "cpp"))
            if not torch.equal(right.token, found.token):
                return f"benchmark of lm_head_sample refused: it draws {found.token.tolist()}, eager {right.token.tolist()}"
    except Error as reason:
        return str(reason)
    return None


@cache
def limits() -> dict[str, float]:
    return bench.ceilings("cpu")


@cache
def group(filters: str, count: int, dtype: torch.dtype) -> tuple[dict[str, bench.Timing], dict[str, int]]:
    tasks: dict[str, Callable[[], Any]] = {}
    sizes = {}
    for candidate in CANDIDATES if refusal() is None else ("torch",):
        sizes[candidate] = weight_bytes(operands(1, candidate, dtype)[3])
        sets = bench.inputs(partial(operands, count, candidate, dtype), sizes[candidate])
        function = partial(peer, filters) if candidate == "torch" else partial(forced, "cpp", settings(filters, count))
        tasks[candidate] = partial(lambda function, draw: function(*draw()), function, itertools.cycle(sets).__next__)
    return bench.interleave(tasks, warmup=2), sizes


@pytest.fixture(scope="module", autouse=True)
def results() -> Iterator[None]:
    """Writes what was measured when the module is done."""
    yield
    if rows:
        bench.write("lm_head_sample", rows, limits(), bench.machine("cpu"))


@pytest.mark.parametrize("candidate", CANDIDATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("count", ROWS, ids=lambda count: f"rows{count}")
@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.benchmark(timer=replay)
def test_lm_head_sample(benchmark: Any, filters: str, count: int, dtype: torch.dtype, candidate: str) -> None:
    reason = refusal()
    if candidate != "torch" and reason is not None:
        pytest.skip(reason)
    timings, sizes = group(filters, count, dtype)
    timing, shape = timings[candidate], (count, WIDTH, VOCAB)
    row = bench.row("lm_head_sample", shape, dtype, filters, candidate, timing, limits(), nbytes=sizes[candidate], ceiling="read")
    rows.append(row)
    benchmark.group = f"lm_head_sample {filters} {list(shape)} {row['dtype']}"
    facts = {"GB/s": round(row["rate"] / 1e9, 1), "of_read": row["fraction"], "spread": row["spread"]}
    replay.show(benchmark, timing, **facts, vs_torch=round(timings["torch"].median / timing.median, 2))
