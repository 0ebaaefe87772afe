"""A product added to the residual stream, one op of a decode step: y = residual + x weight^T + bias.

x [N, K], weight [M, K] of any strides or a PackedWeight, bias [M] or None, residual [N, M], fp32|bf16|fp16 (eager also fp64);
y [N, M] in residual's dtype; N 1 to 32 in kernels. A kernel has no backward; the eager definition is differentiable.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import gptfast.backend as backend
from gptfast.errors import Error
from gptfast.ops._common import autocast, check_product, limit_decode, packed_arguments, requires_grad, rows
from gptfast.ops.linear import linear
from gptfast.packing import PackedWeight

limit_decode("linear_add")


def eager(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None, residual: Tensor) -> Tensor:
    """The definition: `linear`, then an addition. x [..., K], residual [..., M] -> [..., M] in residual's dtype."""
    return (residual + linear(x, weight, bias)).to(residual.dtype)


if backend.has_schema("linear_add"):

    @torch.library.register_fake("gptfast::linear_add")  # type: ignore[untyped-decorator]
    def _(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, format: str = "", outputs: int = 0) -> Tensor:
        return torch.empty_like(residual)


def linear_add(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None, residual: Tensor) -> Tensor:
    """residual + x weight^T + bias; shapes in the module's docstring, with any leading dimensions.

    Returns [..., M] in residual's dtype. Raises gptfast.Error where a shape does not fit, or a gradient through a PackedWeight is
    wanted.
    """
    if len(weight.shape) != 2 or residual.shape != (*x.shape[:-1], weight.shape[0]):
        shapes = f"{tuple(residual.shape)}, x {tuple(x.shape)}, weight {tuple(weight.shape)}"
        raise Error(f"linear_add: residual has shape {shapes}; needed are [..., M], [..., K], [M, K]")
    check_product("linear_add", x, weight, bias)
    if isinstance(weight, Tensor):
        x, weight, bias = autocast(x, weight, bias)
    tensors = (x, weight, bias, residual)
    needs_grad = requires_grad(*(t for t in tensors if isinstance(t, Tensor)))
    name = backend.choose("linear_add", *tensors, needs_grad=needs_grad)
    if name == "eager":
        return eager(*tensors)
    data, packed = packed_arguments(weight, x.dtype)
    y: Any = backend.impl("linear_add", name).forward(rows(x), data, bias, rows(residual), *packed)
    return y.view(residual.shape)  # type: ignore[no-any-return]
