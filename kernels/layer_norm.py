"""layer_norm in Triton: y = (x - mean) * rstd * weight + bias over the last dimension; see gptfast/ops/layer_norm.py.

x [N, C] contiguous, fp32|bf16|fp16; weight, bias [C] of one dtype, x's or fp32, or None; mean, rstd [N] fp32.
A program keeps several whole rows in registers, so x is read once (statistics in two passes over registers) and y written once:
memory bandwidth is the limit. Backward walks over rows with its share of dweight and dbias in registers too; the shares of all
programs are added by a second kernel in a fixed order. The number of programs depends on N alone, so the bits do not change from
device to device for that reason, and never from run to run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl

from ._rows import add_partials, column_mask, load_columns, load_rows, on_device, row_config, store_rows

FORWARD = {"elements": 4096, "per_thread": 32}  # values of x that a program and a thread hold at a time
BACKWARD = {"elements": 2048, "per_thread": 16}
PROGRAMS = 528  # of backward at most: four for each multiprocessor of an H200
SHIPPED_COLUMNS = (768, 1024, 1280, 1600)  # GPT-2's widths: compiled ahead of time and checked for spills


@triton.jit
def _normalised(
    x, weight, bias, mean, rstd,
    COLUMNS: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    y = (x - mean[:, None]) * rstd[:, None]
    if HAS_WEIGHT:
        y = y * load_columns(weight, COLUMNS, FIRST, BLOCK)
    if HAS_BIAS:
        y = y + load_columns(bias, COLUMNS, FIRST, BLOCK)
    return y


@triton.jit
def _squares(x, mean, inside, COLUMNS: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    deviation = tl.where(column_mask(inside, COLUMNS, FIRST, BLOCK), x - mean[:, None], 0.0)
    return tl.sum(deviation * deviation, 1)


@triton.jit
def _layer_norm_forward_kernel(
    x, weight, bias, y, mean_out, rstd_out, N, eps,
    COLUMNS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    x0 = load_rows(x, row, inside, COLUMNS, 0, B0)
    total = tl.sum(x0, 1)
    if B1 > 0:
        x1 = load_rows(x, row, inside, COLUMNS, B0, B1)
        total += tl.sum(x1, 1)
    if B2 > 0:
        x2 = load_rows(x, row, inside, COLUMNS, B0 + B1, B2)
        total += tl.sum(x2, 1)
    mean = total / COLUMNS
    squares = _squares(x0, mean, inside, COLUMNS, 0, B0)
    if B1 > 0:
        squares += _squares(x1, mean, inside, COLUMNS, B0, B1)
    if B2 > 0:
        squares += _squares(x2, mean, inside, COLUMNS, B0 + B1, B2)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(squares / COLUMNS + eps))
    store_rows(y, _normalised(x0, weight, bias, mean, rstd, COLUMNS, 0, B0, HAS_WEIGHT, HAS_BIAS), row, inside, COLUMNS, 0, B0)
    if B1 > 0:
        y1 = _normalised(x1, weight, bias, mean, rstd, COLUMNS, B0, B1, HAS_WEIGHT, HAS_BIAS)
        store_rows(y, y1, row, inside, COLUMNS, B0, B1)
    if B2 > 0:
        y2 = _normalised(x2, weight, bias, mean, rstd, COLUMNS, B0 + B1, B2, HAS_WEIGHT, HAS_BIAS)
        store_rows(y, y2, row, inside, COLUMNS, B0 + B1, B2)
    tl.store(mean_out + row, mean, mask=inside)
    tl.store(rstd_out + row, rstd, mask=inside)


@triton.jit
def _upstream(
    dy, x, weight, mean, rstd, row, inside,
    COLUMNS: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """dy, xhat and g = dy * weight of one block; dy and g are 0 where nothing is, so that xhat there never counts."""
    upstream = load_rows(dy, row, inside, COLUMNS, FIRST, BLOCK)
    xhat = (load_rows(x, row, inside, COLUMNS, FIRST, BLOCK) - mean[:, None]) * rstd[:, None]
    g = upstream
    if HAS_WEIGHT:
        g = g * load_columns(weight, COLUMNS, FIRST, BLOCK)
    return upstream, xhat, g


@triton.jit
def _layer_norm_backward_kernel(
    dy, x, weight, mean_in, rstd_in, dx, partials, N,
    COLUMNS: tl.constexpr, HAS_WEIGHT: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    dweight0 = tl.zeros([ROWS, B0], tl.float32)
    dbias0 = tl.zeros([ROWS, B0], tl.float32)
    if B1 > 0:
        dweight1 = tl.zeros([ROWS, B1], tl.float32)
        dbias1 = tl.zeros([ROWS, B1], tl.float32)
    if B2 > 0:
        dweight2 = tl.zeros([ROWS, B2], tl.float32)
        dbias2 = tl.zeros([ROWS, B2], tl.float32)
    for group in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        row = tl.full([1], group, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = row < N
        mean = tl.load(mean_in + row, mask=inside, other=0.0)
        rstd = tl.load(rstd_in + row, mask=inside, other=0.0)
        u0, xhat0, g0 = _upstream(dy, x, weight, mean, rstd, row, inside, COLUMNS, 0, B0, HAS_WEIGHT)
        sum_g, sum_g_xhat = tl.sum(g0, 1), tl.sum(g0 * xhat0, 1)
        dweight0 += u0 * xhat0
        dbias0 += u0
        if B1 > 0:
            u1, xhat1, g1 = _upstream(dy, x, weight, mean, rstd, row, inside, COLUMNS, B0, B1, HAS_WEIGHT)
            sum_g, sum_g_xhat = sum_g + tl.sum(g1, 1), sum_g_xhat + tl.sum(g1 * xhat1, 1)
            dweight1 += u1 * xhat1
            dbias1 += u1
        if B2 > 0:
            u2, xhat2, g2 = _upstream(dy, x, weight, mean, rstd, row, inside, COLUMNS, B0 + B1, B2, HAS_WEIGHT)
            sum_g, sum_g_xhat = sum_g + tl.sum(g2, 1), sum_g_xhat + tl.sum(g2 * xhat2, 1)
            dweight2 += u2 * xhat2
            dbias2 += u2
        mean_g, mean_g_xhat = (sum_g / COLUMNS)[:, None], (sum_g_xhat / COLUMNS)[:, None]
        store_rows(dx, (g0 - mean_g - xhat0 * mean_g_xhat) * rstd[:, None], row, inside, COLUMNS, 0, B0)
        if B1 > 0:
            store_rows(dx, (g1 - mean_g - xhat1 * mean_g_xhat) * rstd[:, None], row, inside, COLUMNS, B0, B1)
        if B2 > 0:
            store_rows(dx, (g2 - mean_g - xhat2 * mean_g_xhat) * rstd[:, None], row, inside, COLUMNS, B0 + B1, B2)
    _store_partial(partials, dweight0, dbias0, COLUMNS, 0, B0)
    if B1 > 0:
        _store_partial(partials, dweight1, dbias1, COLUMNS, B0, B1)
    if B2 > 0:
        _store_partial(partials, dweight2, dbias2, COLUMNS, B0 + B1, B2)


@triton.jit
def _store_partial(partials, dweight, dbias, COLUMNS: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    column = FIRST + tl.arange(0, BLOCK)
    target = partials + tl.program_id(0) * (2 * COLUMNS) + column
    tl.store(target, tl.sum(dweight, 0), mask=column < COLUMNS)
    tl.store(target + COLUMNS, tl.sum(dbias, 0), mask=column < COLUMNS)


# ------------------------------------------------------------------------------------------------------------------- launchers


def forward(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [N, C] -> y [N, C] in x's dtype, mean [N], rstd [N] in fp32."""
    rows, columns = x.shape
    y = torch.empty_like(x)
    mean = torch.empty(rows, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if x.numel() > 0:
        blocks = row_config(columns, **FORWARD)
        with on_device(x):
            _layer_norm_forward_kernel[(triton.cdiv(rows, blocks.ROWS),)](
                x, weight, bias, y, mean, rstd, rows, eps, columns, weight is not None, bias is not None, **blocks.options()
            )
    return y, mean, rstd


def backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, mean: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dy, x [N, C] -> dx [N, C] in x's dtype, dweight [C], dbias [C] in weight's dtype (fp32 without a weight)."""
    rows, columns = x.shape
    dx = torch.empty_like(x)
    dweight = torch.empty(columns, dtype=torch.float32 if weight is None else weight.dtype, device=x.device)
    dbias = torch.empty_like(dweight)
    if columns > 0:
        blocks = row_config(columns, **BACKWARD)
        programs = max(1, min(PROGRAMS, triton.cdiv(rows, blocks.ROWS)))
        partials = torch.empty((programs, 2, columns), dtype=torch.float32, device=x.device)
        with on_device(x):
            _layer_norm_backward_kernel[(programs,)](
                dy, x, weight, mean, rstd, dx, partials, rows, columns, weight is not None, **blocks.options()
            )
            add_partials(partials, dweight, dbias)
    return dx, dweight, dbias


def launches(dtype: torch.dtype) -> Iterator[tuple[str, Callable[..., object], tuple[object, ...]]]:
    """What is compiled ahead of time: (label, launcher, arguments) for every shipped width."""
    for columns in SHIPPED_COLUMNS:
        x = torch.empty(65536, columns, dtype=dtype, device="meta")
        weight, statistic = x[0], torch.empty(65536, device="meta")
        yield f"forward {columns}", forward, (x, weight, weight, 1e-5)
        yield f"backward {columns}", backward, (x, x, weight, statistic, statistic)
