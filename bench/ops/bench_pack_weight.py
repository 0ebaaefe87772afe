"""pack_weight at two of GPT-2's matrices: the C++ kernel beside its definition.

    pytest bench/ops/bench_pack_weight.py -k int8

Bytes are those read, 4 a weight. Packing is done once a model, so what counts is that a model of 124 M weights takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from gptfast import benchmark as bench
from gptfast import ops
from gptfast.errors import Error
from gptfast.packing import FORMATS

SHAPES = {"c_fc": (3072, 768), "wte": (50257, 768)}  # outputs, inputs; c_fc is stored [inputs, outputs]
replay = bench.Replay()
rows: list[dict[str, Any]] = []


def run(name: str, weight: Tensor, format: str) -> Tensor:
    with bench.force("pack_weight", name, weight):
        return ops.pack_weight(weight, format).data


@cache
def weight(name: str) -> Tensor:
    made = torch.randn(SHAPES[name]) * 0.02
    return made if name == "wte" else made.t().contiguous().t()


@cache
def candidates() -> tuple[list[str], str | None]:
    """What can be timed here, and why the C++ kernel is not among it if it is not: its bytes are the definition's."""
    try:
        for format in FORMATS:
            small = torch.randn(45, 150)
            if not torch.equal(run("cpp", small, format), run("eager", small, format)):
                return ["eager"], f"pack_weight on cpp makes other bytes in {format}"
    except Error as refusal:
        return ["eager"], str(refusal)
    return ["cpp", "eager"], None


@cache
def limits() -> dict[str, float]:
    return bench.ceilings("cpu")


@cache
def group(name: str, format: str) -> dict[str, bench.Timing]:
    return bench.interleave({key: partial(run, key, weight(name), format) for key in candidates()[0]})


@pytest.fixture(scope="module", autouse=True)
def results() -> Iterator[None]:
    """Writes what was measured when the module is done."""
    yield
    if rows:
        bench.write("pack_weight", rows, limits(), bench.machine("cpu"))


@pytest.mark.parametrize("candidate", ("cpp", "eager"))
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.benchmark(timer=replay)
def test_pack_weight(benchmark: Any, name: str, format: str, candidate: str) -> None:
    found, reason = candidates()
    if candidate not in found:
        pytest.skip(str(reason))
    timings = group(name, format)
    timing = timings[candidate]
    shape = (*SHAPES[name], FORMATS.index(format))
    facts = {"nbytes": weight(name).nbytes, "ceiling": "read"}
    row = bench.row("pack_weight", shape, torch.float32, "forward", candidate, timing, limits(), **facts)
    rows.append(row)
    benchmark.group = f"pack_weight {name} {format}"
    shown = {"GB/s": round(row["rate"] / 1e9, 2), "of_read": row["fraction"], "spread": row["spread"]}
    replay.show(benchmark, timing, **shown, vs_eager=round(timings["eager"].median / timing.median, 2))
