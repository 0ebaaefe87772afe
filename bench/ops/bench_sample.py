"""sample at GPT-2's vocabulary: microseconds a row on every backend that runs here, beside sampling as it is written in torch.

    pytest bench/ops/bench_sample.py -k "top_k-top_p and 1-"       a table for each (rows, filters)
    pytest bench/ops/bench_sample.py --benchmark-json=FILE         as JSON; microseconds a row are in extra_info

A draw has to read the logits once: that is what is counted, and the ceiling is the read bandwidth of the same run. The peer `torch`
draws by topk or sort, softmax, cumsum and multinomial, argmax where greedy; it has no presence penalty, typical_p, seed a request
or log-probability, all of which ours has. Ours is compared with eager, token for token, before it is timed; eager itself, the
definition, is not timed.
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
from gptfast.ops.sample import Sampled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB = 50257
ROWS = (1, 4, 16)
BACKENDS = ("cpp", "cuda", "triton")
FILTERS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "plain": {"temperature": 1.0},
    "top_k-top_p": {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
    "top_p": {"temperature": 0.8, "top_p": 0.95},
    "all": {
        "temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.02, "typical_p": 0.9, "repetition": 1.1, "frequency": 0.1,
        "presence": 0.1,
    },
}  # fmt: skip
replay = bench.Replay()
rows: list[dict[str, Any]] = []


def settings(filters: str, count: int) -> dict[str, Any]:
    """Arguments of `sample` for `count` rows."""
    whole = {"top_k", "seed", "position", "choice"}
    numbers = {**FILTERS[filters], "seed": 7, "position": 100, "choice": 0}
    each = {
        name: torch.full((count,), value, dtype=torch.int64 if name in whole else torch.float32, device=DEVICE)
        for name, value in numbers.items()
    }
    return each | ({"counts": torch.zeros(count, VOCAB, dtype=torch.int32, device=DEVICE)} if filters == "all" else {})


def peer(filters: str, logits: Tensor, arguments: dict[str, Any]) -> Tensor:
    """What a generation loop in PyTorch does."""
    if filters == "greedy":
        return logits.argmax(-1)
    if "counts" in arguments:
        counts = arguments["counts"]
        penalised = torch.where(logits > 0, logits / arguments["repetition"][:, None], logits * arguments["repetition"][:, None])
        logits = torch.where(counts > 0, penalised, logits) - arguments["frequency"][:, None] * counts
    x = logits / arguments["temperature"][:, None]
    if filters == "plain":
        return torch.multinomial(x.softmax(-1), 1)
    values, ids = x.topk(50) if "top_k" in arguments else x.sort(descending=True)
    p = values.softmax(-1)
    p = torch.where(p.cumsum(-1) - p < arguments["top_p"][:, None], p, 0)
    if "min_p" in arguments:
        p = torch.where(p >= arguments["min_p"][:, None] * p[:, :1], p, 0)
    return ids.gather(-1, torch.multinomial(p, 1))


def forced(name: str, logits: Tensor, arguments: dict[str, Any]) -> Sampled:
    with bench.force("sample", name, logits, "gptfast", "raw"):
        return ops.sample(logits, **arguments)


@cache
def candidates() -> tuple[list[str], dict[str, str]]:
    """The backends that run here, and for the others the reason why not."""
    found, reasons = [], {}
    for name in BACKENDS:
        try:
            forced(name, torch.zeros(1, VOCAB, device=DEVICE), settings("greedy", 1))
            found.append(name)
        except Error as refusal:
            reasons[name] = str(refusal)
    return found, reasons


@cache
def limits() -> dict[str, float]:
    return bench.bandwidths(DEVICE)


def check(name: str, filters: str) -> None:
    logits = torch.randn(3, VOCAB, device=DEVICE) * 3
    right, found = (forced(backend, logits, settings(filters, 3)) for backend in ("eager", name))
    if not torch.equal(right.token, found.token):
        raise Error(f"benchmark of sample on {name} refused: {filters} draws {found.token.tolist()}, eager {right.token.tolist()}")


@cache
def group(count: int, filters: str) -> dict[str, bench.Timing]:
    sets = bench.inputs(lambda: torch.randn(count, VOCAB, device=DEVICE) * 3, 4 * count * VOCAB, DEVICE)
    tasks: dict[str, Callable[[], Any]] = {}
    for name in candidates()[0]:
        check(name, filters)
        draw, arguments = itertools.cycle(sets).__next__, settings(filters, count)
        tasks[name] = lambda name=name, draw=draw, arguments=arguments: forced(name, draw(), arguments)  # type: ignore[misc]
    draw, arguments = itertools.cycle(sets).__next__, settings(filters, count)
    tasks["torch"] = partial(lambda draw, given: peer(filters, draw(), given), draw, arguments)
    return bench.interleave(tasks, DEVICE, warmup=2)


@pytest.fixture(scope="module", autouse=True)
def results() -> Iterator[None]:
    """Writes what was measured when the module is done."""
    yield
    if rows:
        bench.write("sample", rows, limits(), bench.machine(DEVICE))


@pytest.mark.parametrize("candidate", (*BACKENDS, "torch"))
@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("count", ROWS)
@pytest.mark.benchmark(timer=replay)
def test_sample(benchmark: Any, count: int, filters: str, candidate: str) -> None:
    reason = candidates()[1].get(candidate)
    if reason is not None:
        pytest.skip(reason)
    timings = group(count, filters)
    timing, nbytes = timings[candidate], 4 * count * VOCAB
    row = bench.row("sample", (count, VOCAB), torch.float32, filters, candidate, timing, limits(), nbytes=nbytes, ceiling="read")
    rows.append(row)
    benchmark.group = f"sample [{count}, {VOCAB}] {filters}"
    micro, ratio = round(timing.median / count * 1e6, 1), round(timings["torch"].median / timing.median, 2)
    replay.show(benchmark, timing, **{"us_a_row": micro, "of_read": row["fraction"], "vs_torch": ratio, "spread": row["spread"]})
