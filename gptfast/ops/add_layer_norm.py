"""Residual addition and layer normalisation of the sum, in one op.

    total = residual + x,   y = (total - mean) * rstd * weight + bias      mean and rstd as in layer_norm, of total as rounded

residual, x [N, C] in one dtype, fp32|bf16|fp16 (eager also fp64); weight, bias [C] in it or fp32, or None; total, y [N, C] in it;
mean, rstd [N] fp32 (fp64 for fp64). Backward, with xhat = (total - mean) * rstd and g = dy * weight:

    d = dtotal + rstd * (g - mean(g) - xhat * mean(g * xhat))  is the gradient of residual and of x,
    dweight = sum over rows of dy * xhat,   dbias = sum over rows of dy
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import gptfast.backend as backend
from gptfast.errors import Error
from gptfast.ops._common import limit_dtypes, requires_grad, rows
from gptfast.ops.layer_norm import alike
from gptfast.ops.layer_norm import eager as eager_layer_norm

limit_dtypes("add_layer_norm")


def eager(
    residual: Tensor, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """The definition: an addition and layer_norm's eager, differentiated by plain autograd. -> total, y, both [..., C]."""
    total = residual + x
    return total, eager_layer_norm(total, weight, bias, eps)


if backend.has_schema("add_layer_norm"):

    @torch.library.register_fake("gptfast::add_layer_norm")  # type: ignore[untyped-decorator]
    def _(
        residual: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        statistics = x.new_empty(x.shape[0], dtype=torch.float32)
        return torch.empty_like(x), torch.empty_like(x), statistics, torch.empty_like(statistics)

    @torch.library.register_fake("gptfast::add_layer_norm_backward")  # type: ignore[untyped-decorator]
    def _(
        dtotal: Tensor | None, dy: Tensor, total: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        dweight = total.new_empty(total.shape[1], dtype=torch.float32 if weight is None else weight.dtype)
        return torch.empty_like(total), dweight, torch.empty_like(dweight)


class _Fast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, name: str, residual: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        total, y, mean, rstd = backend.impl("add_layer_norm", name).forward(residual, x, weight, bias, eps)
        ctx.set_materialize_grads(False)  # where only y is used, there is no dtotal to read
        ctx.save_for_backward(total, weight, mean, rstd)
        ctx.name, ctx.bias_dtype = name, None if bias is None else bias.dtype
        return total, y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dtotal: Tensor | None, dy: Tensor | None) -> Any:
        if dy is None:
            return None, dtotal, dtotal, None, None, None
        total, weight, mean, rstd = ctx.saved_tensors
        dtotal = None if dtotal is None else dtotal.contiguous()
        leaf = backend.impl("add_layer_norm", ctx.name).backward
        d, dweight, dbias = leaf(dtotal, dy.contiguous(), total, weight, mean, rstd)
        dbias = None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype)
        return None, d, d, None if weight is None else dweight.to(weight.dtype), dbias, None


def add_layer_norm(
    residual: Tensor, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """(residual + x, layer_norm of it); formula in the module's docstring.

    residual, x [..., C] of one shape with any strides; weight, bias [C] or None. Returns total and y [..., C] in the dtype that
    residual and x promote to. Raises gptfast.Error where a shape does not fit.
    """
    if residual.shape != x.shape or x.dim() == 0:
        raise Error(f"add_layer_norm: residual has shape {tuple(residual.shape)}, x {tuple(x.shape)}; needed is one [..., C]")
    for label, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != x.shape[-1:]:
            raise Error(f"add_layer_norm: {label} has shape {tuple(parameter.shape)}, needed is {tuple(x.shape[-1:])}, as x's last")
    dtype = torch.promote_types(residual.dtype, x.dtype)
    residual, x = residual.to(dtype), x.to(dtype)
    needs_grad = requires_grad(residual, x, weight, bias)
    name = backend.choose("add_layer_norm", residual, x, weight, bias, needs_grad=needs_grad)
    if name == "eager":
        return eager(residual, x, weight, bias, eps)
    weight, bias = alike(x, weight, bias)
    if needs_grad:
        total, y = _Fast.apply(name, rows(residual), rows(x), weight, bias, eps)
    else:
        total, y = backend.impl("add_layer_norm", name).forward(rows(residual), rows(x), weight, bias, eps)[:2]
    return total.view(x.shape), y.view(x.shape)
