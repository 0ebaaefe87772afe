"""transformer_block, forward and backward, at the sizes of GPT-2 124M and of a character model, beside the ops called one by one
and plain PyTorch.

    pytest bench/ops/bench_transformer_block.py -k "character and bfloat16"

Operations counted: the four products, 6 N (12 C^2), and attention's, 6 N T C. The ceiling is the GEMM rate of the same run.
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

import gptfast.backend as backend
from gptfast import benchmark as bench
from gptfast import ops
from gptfast.errors import Error
from gptfast.ops.transformer_block import eager

SHAPES = {"gpt2": (4, 256, 12, 768), "character": (12, 64, 4, 128)}  # B, T, H, C
DTYPES = (torch.float32, torch.bfloat16)
CANDIDATES = ("cpp", "op by op", "torch")
replay = bench.Replay()
rows: list[dict[str, Any]] = []


def fused(heads: int, residual: Tensor, x: Tensor, *weights: Tensor) -> Tensor:
    with bench.force("transformer_block", "cpp", residual, x, *weights, heads, needs_grad=True):
        total, out = ops.transformer_block(residual, x, weights, heads, (residual.shape[-1] // heads) ** -0.5)
    return torch.stack((total, out))


def op_by_op(heads: int, residual: Tensor, x: Tensor, *weights: Tensor) -> Tensor:
    return torch.stack(eager(residual, x, weights, heads, (residual.shape[-1] // heads) ** -0.5, 1e-5, "tanh"))


def peer(heads: int, residual: Tensor, x: Tensor, *weights: Tensor) -> Tensor:
    w1, b1, w_qkv, b_qkv, w_o, b_o, w2, b2, w_fc, b_fc, w_proj, b_proj = weights
    total = residual + x
    qkv = torch.addmm(b_qkv, F.layer_norm(total, w1.shape, w1, b1).flatten(0, 1), w_qkv)
    q, k, v = qkv.view(*total.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(-1, total.shape[-1])
    total = total + torch.addmm(b_o, o, w_o).view_as(total)
    hidden = F.gelu(torch.addmm(b_fc, F.layer_norm(total, w2.shape, w2, b2).flatten(0, 1), w_fc), approximate="tanh")
    return torch.stack((total, torch.addmm(b_proj, hidden, w_proj).view_as(total)))


def operands(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    batch, length, _, width = shape
    sizes = [(batch, length, width)] * 2 + [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)]
    sizes += [(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    made = [(torch.randn(size) * (width**-0.5 if len(size) == 2 else 1)).to(dtype).requires_grad_() for size in sizes]
    return made, torch.randn(2, batch, length, width).to(dtype)


@cache
def candidates(heads: int) -> tuple[dict[str, Callable[..., Tensor]], str | None]:
    """What can be timed here, checked against eager, and why the C++ one is not among them if it is not."""

    def definition(*inputs: Tensor) -> Tensor:
        with backend.use("eager"):
            return op_by_op(heads, *inputs)

    found: dict[str, Callable[..., Tensor]] = {"op by op": partial(op_by_op, heads), "torch": partial(peer, heads)}
    try:
        for dtype in DTYPES:
            small = operands((2, 9, heads, 32 * heads), dtype)[0]
            bench.check("transformer_block on cpp", partial(fused, heads), definition, small)
    except Error as refusal:
        return found, str(refusal)
    return {"cpp": partial(fused, heads), **found}, None


@cache
def limits() -> dict[str, float]:
    return bench.ceilings("cpu", DTYPES)


@cache
def group(name: str, dtype: torch.dtype) -> dict[str, bench.Timing]:
    width = SHAPES[name][-1]
    sets = bench.inputs(partial(operands, SHAPES[name], dtype), 24 * width * width * dtype.itemsize)
    found = candidates(SHAPES[name][2])[0]
    tasks = {key: bench.one_pass(f, "both", itertools.cycle(sets).__next__) for key, f in found.items()}
    return bench.interleave(tasks, warmup=2)


@pytest.fixture(scope="module", autouse=True)
def results() -> Iterator[None]:
    """Writes what was measured when the module is done."""
    yield
    if rows:
        bench.write("transformer_block", rows, limits(), bench.machine("cpu"))


@pytest.mark.parametrize("candidate", CANDIDATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.benchmark(timer=replay)
def test_transformer_block(benchmark: Any, name: str, dtype: torch.dtype, candidate: str) -> None:
    batch, length, heads, width = SHAPES[name]
    reason = candidates(heads)[1]
    if candidate == "cpp" and reason is not None:
        pytest.skip(reason)
    timings = group(name, dtype)
    timing, tokens = timings[candidate], batch * length
    flops, ceiling = 6 * tokens * width * (12 * width + length), f"gemm_{str(dtype).removeprefix('torch.')}"
    row = bench.row("transformer_block", SHAPES[name], dtype, "both", candidate, timing, limits(), flops=flops, ceiling=ceiling)
    rows.append(row)
    benchmark.group = f"transformer_block {name} {list(SHAPES[name])} {row['dtype']}"
    facts = {"GFLOP/s": round(row["rate"] / 1e9), "of_gemm": row["fraction"], "spread": row["spread"]}
    replay.show(benchmark, timing, **facts, vs_torch=round(timings["torch"].median / timing.median, 2))
