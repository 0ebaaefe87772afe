"""The affine map of the last dimension: y = x weight^T + bias.

x [N, K] fp32|bf16|fp16 (eager also fp64); weight [M, K] of any strides (a GPT-2 Conv1D weight [K, M] is passed as weight.t());
bias [M] or None; y [N, M] in x's dtype. Sums in fp32. weight may be a PackedWeight (gptfast/packing.py): inference only. Backward:

    dx = dy weight,   dweight = dy^T x,   dbias = sum over rows of dy
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

import gptfast.backend as backend
from gptfast.ops._common import autocast, check_product, limit_dtypes, packed_arguments, requires_grad, rows
from gptfast.packing import PackedWeight, product

limit_dtypes("linear")


def eager(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None) -> Tensor:
    """The definition: PyTorch's own linear, differentiated by plain autograd. x [..., K] -> [..., M] in x's dtype."""
    if isinstance(weight, PackedWeight):
        return product(rows(x), weight, bias).to(x.dtype).view(*x.shape[:-1], weight.outputs)
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


if backend.has_schema("linear"):

    @torch.library.register_fake("gptfast::linear")  # type: ignore[untyped-decorator]
    def _(x: Tensor, weight: Tensor, bias: Tensor | None, format: str = "", outputs: int = 0) -> Tensor:
        return x.new_empty(x.shape[0], outputs if format else weight.shape[0])

    @torch.library.register_fake("gptfast::linear_backward")  # type: ignore[untyped-decorator]
    def _(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        transposed = weight.stride(0) == 1 and weight.stride(1) != 1
        dweight = x.new_empty(weight.t().shape).t() if transposed else x.new_empty(weight.shape)
        return torch.empty_like(x), dweight, x.new_empty(weight.shape[0])


class _Fast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.name, ctx.bias_dtype = name, None if bias is None else bias.dtype
        return backend.impl("linear", name).forward(x, weight, bias)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        dx, dweight, dbias = backend.impl("linear", ctx.name).backward(dy.contiguous(), x, weight)
        return None, dx, dweight.to(weight.dtype), None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype)


def linear(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias over the last dimension; formula and shapes in the module's docstring.

    x [..., K], weight [M, K], bias [M] or None, all of any strides; returns [..., M] in x's dtype, under autocast in autocast's
    (a PackedWeight: in x's). Raises gptfast.Error where a shape does not fit, or a gradient through a PackedWeight is wanted.
    """
    check_product("linear", x, weight, bias)
    if isinstance(weight, Tensor):
        x, weight, bias = autocast(x, weight, bias)
    needs_grad = requires_grad(x, *(t for t in (weight, bias) if isinstance(t, Tensor)))
    name = backend.choose("linear", x, weight, bias, needs_grad=needs_grad)
    if name == "eager":
        return eager(x, weight, bias)
    flat = rows(x)
    if needs_grad:
        y = _Fast.apply(name, flat, weight, bias)
    else:
        data, packed = packed_arguments(weight, x.dtype)
        y = backend.impl("linear", name).forward(flat, data, bias, *packed)
    return y.view(*x.shape[:-1], weight.shape[0])  # type: ignore[no-any-return]
