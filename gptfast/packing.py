"""Packed weights: a matrix [M, K] in the byte layout that the C++ products read, and what a product with it means.

Layout (csrc/cpu/engine/product.h says the same): panels of 32 outputs in order, the last padded with zeros. In a panel words of 32
bits lie [word][32 outputs]: one fp32 input, two bf16, or four int8 codes. int8 panels end with 32 fp32 scales and 32 int32 sums of
codes x 128. An int4 panel has for each group of 64 inputs 8 words - byte b of word w holds, plus 8, the code of input 8w + b in its
low half and of 8w + 4 + b in its high half - and 32 bf16 scales.

Products, x [N, K] in fp32: `fp32` and `bf16` (both operands rounded to bf16) sum in fp32. int8 and int4 quantise x too, a row
(int4: a row's group of 64) at a time:

    s_x = max|x| / 127,  q_x = clamp(round_half_even(x / s_x), -127, 127)  (0 where s_x is 0 or not finite)
    y = float(sum q_x q_w) * (s_x * s_w) + bias                             (int4: these terms added in the order of the groups)

each operation rounded to fp32 by itself, the sums exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast.errors import Error

FORMATS = ("fp32", "bf16", "int8", "int4")
PANEL, GROUP = 32, 64  # outputs side by side; inputs that share an int4 scale
_INPUTS = {"fp32": 1, "bf16": 2, "int8": 4}  # inputs in a word


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)


def panel_bytes(format: str, inputs: int) -> int:
    """Bytes of 32 outputs with `inputs` inputs each. Raises gptfast.Error for a format that is none."""
    if format not in FORMATS:
        raise Error(f"weight format is {format!r}; allowed: {', '.join(FORMATS)}")
    if format == "int4":
        return _divide_up(inputs, GROUP) * PANEL * (GROUP // 2 + 2)
    return 4 * PANEL * (_divide_up(inputs, _INPUTS[format]) + (2 if format == "int8" else 0))


def packed_bytes(format: str, outputs: int, inputs: int) -> int:
    """Bytes of a weight [outputs, inputs] in `format`. Raises gptfast.Error for a format that is none."""
    return _divide_up(outputs, PANEL) * panel_bytes(format, inputs)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight [outputs, inputs] as `ops.pack_weight` makes it, or a view of a packed file.

    data: uint8 [packed_bytes(format, outputs, inputs)] on the CPU, for kernels at a multiple of 64 bytes. `ops.linear`,
    `layer_norm_linear` and `linear_add` take it in place of a weight, without gradients. Raises gptfast.Error where data does not
    fit.
    """

    data: Tensor
    format: str
    outputs: int
    inputs: int

    def __post_init__(self) -> None:
        needed = packed_bytes(self.format, self.outputs, self.inputs)
        if self.data.dtype != torch.uint8 or self.data.shape != (needed,):
            got = f"{str(self.data.dtype).removeprefix('torch.')} of shape {tuple(self.data.shape)}"
            raise Error(f"packed {self.format} weight [{self.outputs}, {self.inputs}] is {got}; needed is uint8 [{needed}]")

    @property
    def shape(self) -> torch.Size:
        """[outputs, inputs], as of the weight that was packed."""
        return torch.Size((self.outputs, self.inputs))

    def _panels(self) -> Tensor:
        return self.data.view(_divide_up(self.outputs, PANEL), panel_bytes(self.format, self.inputs))

    def _groups(self) -> Tensor:
        """The groups of an int4 weight: [panels, groups, bytes of one]."""
        panels, bytes_ = _divide_up(self.outputs, PANEL), PANEL * (GROUP // 2 + 2)
        return self.data.view(panels, _divide_up(self.inputs, GROUP), bytes_)

    def _matrix(self, lanes: Tensor) -> Tensor:
        """[panels, words, 32, values a word] -> [outputs, inputs]"""
        return lanes.transpose(1, 2).flatten(2).flatten(0, 1)[: self.outputs, : self.inputs]

    def codes(self) -> Tensor:
        """The whole numbers of an int8 or int4 weight: int8 [outputs, inputs]."""
        if self.format == "int8":
            panels, words = self._panels().view(torch.int8), _divide_up(self.inputs, 4)
            return self._matrix(panels[:, : 4 * PANEL * words].reshape(len(panels), words, PANEL, 4))
        groups = self._groups()
        halves = groups[:, :, : PANEL * GROUP // 2].reshape(len(groups), groups.shape[1] * GROUP // 8, PANEL, 4)
        return self._matrix(torch.cat((halves & 15, halves >> 4), -1).to(torch.int8) - 8)

    def scales(self) -> Tensor:
        """Of int8 fp32 [outputs, 1], of int4 fp32 [outputs, groups] (bf16 values)."""
        if self.format == "int8":
            start = 4 * PANEL * _divide_up(self.inputs, 4)
            return self._panels()[:, start : start + 4 * PANEL].contiguous().view(torch.float32).flatten()[: self.outputs, None]
        scales = self._groups()[:, :, PANEL * GROUP // 2 :].contiguous().view(torch.bfloat16)
        return scales.float().transpose(1, 2).flatten(0, 1)[: self.outputs]

    def dequantise(self) -> Tensor:
        """The weight that is multiplied by: fp32 [outputs, inputs]."""
        if self.format == "int4":
            return self.codes().float() * self.scales().repeat_interleave(GROUP, 1)[:, : self.inputs]
        if self.format == "int8":
            return self.codes().float() * self.scales()
        dtype, values = (torch.float32, 1) if self.format == "fp32" else (torch.bfloat16, 2)
        words = _divide_up(self.inputs, values)
        return self._matrix(self.data.view(dtype).view(_divide_up(self.outputs, PANEL), words, PANEL, values)).float()


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x fp32 [..., K] -> codes (whole numbers in fp32) [..., K] and scales fp32 [..., 1], as in the module's docstring."""
    scale = (x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)) / 127
    sound = (scale > 0) & (scale < float("inf"))
    codes = torch.where(sound, torch.round(x / scale).clamp(-127, 127), 0.0)
    return codes, scale


def product(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """The definition of a product with a packed weight: x [N, K] -> [N, M] fp32 (fp64 x with fp32 and bf16 weights: fp64)."""
    if weight.format in ("fp32", "bf16"):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        rounded = x.bfloat16().to(x.dtype) if weight.format == "bf16" else x
        return F.linear(rounded, weight.dequantise().to(x.dtype), None if bias is None else bias.to(x.dtype))
    width = weight.inputs if weight.format == "int8" else GROUP
    groups = 1 if weight.format == "int8" else _divide_up(weight.inputs, GROUP)
    padding = width * groups - weight.inputs
    codes, scales = quantise_rows(F.pad(x.float(), (0, padding)).view(len(x), groups, width))
    own, own_scales = F.pad(weight.codes(), (0, padding)).view(weight.outputs, groups, width), weight.scales()
    y = x.new_zeros(len(x), weight.outputs, dtype=torch.float32)
    for group in range(groups):
        # sums of whole numbers below 2^53 are exact in fp64, in any order
        total = (codes[:, group].double() @ own[:, group].double().t()).float()
        y = y + total * (scales[:, group] * own_scales[:, group])
    return y if bias is None else y + bias.float()
