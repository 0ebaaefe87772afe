"""What kernels that work on rows share: how a row is cut into powers of two, and how a piece of several rows is loaded.

Triton's blocks have power-of-two lengths. One block of 1024 for 768 columns would leave a quarter of the lanes idle, so a row is
cut into up to three blocks (768 = 512 + 256, 1280 = 1024 + 256, 1600 = 1024 + 512 + 64), of which only the last may be masked.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl

MAX_COLUMNS = 16384  # beyond this a row no longer fits the registers of one program


class RowConfig(NamedTuple):
    """The constants of one launch: the blocks' lengths, rows taken at a time, warps."""

    B0: int
    B1: int
    B2: int
    ROWS: int
    num_warps: int

    def options(self) -> dict[str, int | bool]:
        """Keywords of the launch; fusion of a * b + c is asked for by name because its default differs between Triton versions."""
        return {**self._asdict(), "enable_fp_fusion": True}


def row_blocks(columns: int) -> tuple[int, int, int]:
    """Powers of two, 0 for absent ones, whose sum is `columns` or, because of the last one, a little more."""
    first = 1 << (columns.bit_length() - 1)
    if columns <= 64 or first == columns:
        return triton.next_power_of_2(columns), 0, 0
    rest = columns - first
    second = 1 << (rest.bit_length() - 1)
    return (first, second, triton.next_power_of_2(rest - second)) if rest > second else (first, second, 0)


def row_config(columns: int, elements: int, per_thread: int) -> RowConfig:
    """`elements`: how many values of one array a program should hold at a time; `per_thread`: how many of them a thread may."""
    blocks = row_blocks(columns)
    rows = max(1, min(16, 1 << (max(1, elements // sum(blocks)).bit_length() - 1)))
    warps = max(1, min(16, triton.next_power_of_2(rows * sum(blocks)) // (32 * per_thread)))
    return RowConfig(*blocks, rows, warps)


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Launches go to the tensor's device. Nothing to do on the CPU, nor in torch.compile, whose launches know theirs."""
    if tensor.is_cuda and not torch.compiler.is_compiling():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


@triton.jit
def column_mask(inside, COLUMNS: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """Which elements of the block exist: [ROWS, BLOCK]; `inside` [ROWS] says which rows do."""
    if FIRST + BLOCK <= COLUMNS:
        mask = tl.broadcast_to(inside[:, None], [inside.shape[0], BLOCK])
    else:
        mask = inside[:, None] & (FIRST + tl.arange(0, BLOCK) < COLUMNS)[None, :]
    return mask


@triton.jit
def load_rows(pointer, row, inside, COLUMNS: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """pointer [N, COLUMNS] -> fp32 [ROWS, BLOCK] from column FIRST on, 0 where nothing is; row [ROWS] in 64 bits."""
    offset = row[:, None] * COLUMNS + (FIRST + tl.arange(0, BLOCK))[None, :]
    return tl.load(pointer + offset, mask=column_mask(inside, COLUMNS, FIRST, BLOCK), other=0.0).to(tl.float32)


@triton.jit
def store_rows(pointer, value, row, inside, COLUMNS: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """The reverse of load_rows, rounded to the dtype of pointer."""
    offset = row[:, None] * COLUMNS + (FIRST + tl.arange(0, BLOCK))[None, :]
    tl.store(pointer + offset, value.to(pointer.dtype.element_ty), mask=column_mask(inside, COLUMNS, FIRST, BLOCK))


@triton.jit
def load_columns(pointer, COLUMNS: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """pointer [COLUMNS] -> fp32 [1, BLOCK] from column FIRST on, 0 where nothing is."""
    column = FIRST + tl.arange(0, BLOCK)
    return tl.load(pointer + column, mask=column < COLUMNS, other=0.0).to(tl.float32)[None, :]


@triton.jit
def add_partials_kernel(partials, dweight, dbias, COUNT, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """dweight, dbias [COLUMNS] = sums over partials [COUNT, 2, COLUMNS] in fixed groups of GROUP, in order: no atomics."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = (column < COLUMNS)[None, :]
    weight_sum = tl.zeros([GROUP, BLOCK], tl.float32)
    bias_sum = tl.zeros([GROUP, BLOCK], tl.float32)
    for first in range(0, COUNT, GROUP):
        row = first + tl.arange(0, GROUP)
        offset = row[:, None] * (2 * COLUMNS) + column[None, :]
        mask = (row < COUNT)[:, None] & exists
        weight_sum += tl.load(partials + offset, mask=mask, other=0.0)
        bias_sum += tl.load(partials + offset + COLUMNS, mask=mask, other=0.0)
    tl.store(dweight + column, tl.sum(weight_sum, 0).to(dweight.dtype.element_ty), mask=column < COLUMNS)
    tl.store(dbias + column, tl.sum(bias_sum, 0).to(dbias.dtype.element_ty), mask=column < COLUMNS)


def add_partials(partials: torch.Tensor, dweight: torch.Tensor, dbias: torch.Tensor) -> None:
    """partials [COUNT, 2, C] fp32 -> dweight [C], dbias [C], rounded to their dtype."""
    count, _, columns = partials.shape
    grid = (triton.cdiv(columns, 32),)
    add_partials_kernel[grid](partials, dweight, dbias, count, columns, BLOCK=32, GROUP=64, num_warps=4, enable_fp_fusion=True)
