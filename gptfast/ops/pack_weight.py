"""A weight packed for products: [M, K] of any strides -> bytes in the layout of gptfast/packing.py.

    fp32, bf16   the values, to nearest even
    int8         s = max|w| / 127 of an output, code clamp(round_half_even(w / s), -127, 127); 0 where s is 0 or not finite
    int4         for each output and group of 64 inputs: of 17 scales that bring the group's largest weight to -7, -7 1/8 ... -9,
                 each moved to where the squared error of its codes is least (sum w q / sum q^2) and rounded to bf16, the one with
                 the least squared error; codes clamp(round_half_even(w * (1 / s)), -8, 7)

All in fp32, each operation rounded by itself, sums in the order of the inputs: the bytes are the same from every backend. An output
(int4: a group) that is not finite has a scale that is NaN or infinite and codes 0, and products with it are NaN.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gptfast.backend as backend
from gptfast.errors import Error
from gptfast.ops._common import one_of, requires_grad
from gptfast.packing import FORMATS, GROUP, PANEL, PackedWeight, packed_bytes


def _words(matrix: Tensor, values: int) -> Tensor:
    """[M, K] -> [panels, words, 32, values a word], both dimensions padded with zeros."""
    outputs, inputs = matrix.shape
    matrix = F.pad(matrix, (0, -inputs % values, 0, -outputs % PANEL))
    return matrix.reshape(matrix.shape[0] // PANEL, PANEL, -1, values).transpose(1, 2)


def _bytes(values: Tensor, panels: int) -> Tensor:
    return values.contiguous().view(-1).view(torch.uint8).reshape(panels, -1)


def _int8(weight: Tensor, panels: int) -> Tensor:
    scale = (weight.abs().amax(1) if weight.shape[1] else weight.new_zeros(len(weight))) / 127
    sound = (scale > 0) & (scale < float("inf"))
    codes = torch.where(sound[:, None], torch.round(weight / scale[:, None]).clamp(-127, 127), 0.0).to(torch.int8)
    sums = codes.sum(1, dtype=torch.int32) * 128
    ends = [F.pad(t, (0, panels * PANEL - len(t))) for t in (scale, sums)]
    return torch.cat([_bytes(part, panels) for part in (_words(codes, 4), *ends)], 1)


def _sound_or_zero(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 0.0)


def _group_scales(w: Tensor) -> Tensor:
    """w [R, 64] -> the scale of each row, bf16 values in fp32."""

    def codes(factor: Tensor, k: int) -> Tensor:
        return torch.round(w[:, k] * factor).clamp(-8, 7)

    zero, size = w.new_zeros(len(w)), w.shape[1]
    largest, best, least = zero, zero, zero + float("inf")
    for k in range(size):
        largest = torch.where(w[:, k].abs() > largest.abs(), w[:, k], largest)
    for candidate in range(17):
        inverse = _sound_or_zero((-7 - 0.125 * candidate) / largest)
        products, squares, error = zero, zero, zero
        for k in range(size):
            code = codes(inverse, k)
            products, squares = products + w[:, k] * code, squares + code * code
        scale = torch.where(squares > 0, (products / squares).bfloat16().float(), 0.0)
        back = _sound_or_zero(1 / scale)
        for k in range(size):
            rest = w[:, k] - scale * codes(back, k)
            error = error + rest * rest
        best, least = torch.where(error < least, scale, best), torch.where(error < least, error, least)
    return torch.where(w.isfinite().all(1), best, float("nan"))


def _int4(weight: Tensor, panels: int) -> Tensor:
    outputs, inputs = weight.shape
    weight = F.pad(weight, (0, -inputs % GROUP, 0, panels * PANEL - outputs))
    groups = weight.shape[1] // GROUP
    rows = weight.reshape(-1, GROUP)
    scale = _group_scales(rows)
    codes = torch.round(torch.where(scale.isnan()[:, None], 0.0, rows) * _sound_or_zero(1 / scale)[:, None]).clamp(-8, 7)
    halves = (codes.to(torch.int8) + 8).to(torch.uint8).view(panels, PANEL, groups, GROUP // 8, 2, 4)
    words = (halves[..., 0, :] | halves[..., 1, :] << 4).permute(0, 2, 3, 1, 4)  # [panels, groups, 8, 32, 4]
    ends = scale.bfloat16().view(panels, PANEL, groups).transpose(1, 2)
    return torch.cat([_bytes(part, panels * groups) for part in (words, ends)], 1)


def eager(weight: Tensor, format: str) -> Tensor:
    """The definition. weight [M, K] of any strides and float dtype -> uint8 [packed_bytes(format, M, K)]."""
    outputs, inputs = weight.shape
    weight, panels = weight.float(), -(-outputs // PANEL)
    if outputs == 0 or packed_bytes(format, outputs, inputs) == 0:
        return torch.zeros(packed_bytes(format, outputs, inputs), dtype=torch.uint8)
    if format in ("int8", "int4"):
        return (_int8 if format == "int8" else _int4)(weight, panels).reshape(-1)
    words = _words(weight, 1) if format == "fp32" else _words(weight.bfloat16(), 2)
    return _bytes(words, panels).reshape(-1)


if backend.has_schema("pack_weight"):

    @torch.library.register_fake("gptfast::pack_weight")  # type: ignore[untyped-decorator]
    def _(weight: Tensor, format: str) -> Tensor:
        return weight.new_empty(packed_bytes(format, *weight.shape), dtype=torch.uint8)


def pack_weight(weight: Tensor, format: str) -> PackedWeight:
    """`weight` [M, K] of any strides and float dtype (a GPT-2 Conv1D weight is passed as weight.t()) as fp32, bf16, int8 or int4.

    Raises gptfast.Error where the shape or the format does not fit.
    """
    one_of("pack_weight", "format", format, FORMATS)
    if weight.dim() != 2 or not weight.is_floating_point():
        kind = f"{str(weight.dtype).removeprefix('torch.')} of shape {tuple(weight.shape)}"
        raise Error(f"pack_weight: weight is {kind}; needed is a float tensor [M, K]")
    if requires_grad(weight):
        weight = weight.detach()
    name = backend.choose("pack_weight", weight)
    data: Any = eager(weight, format) if name == "eager" else backend.impl("pack_weight", name).forward(weight.float(), format)
    return PackedWeight(data, format, *weight.shape)
