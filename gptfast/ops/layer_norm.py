"""Layer normalisation over the last dimension (Ba, Kiros, Hinton 2016, arXiv:1607.06450).

    y = (x - mean) * rstd * weight + bias,   mean = sum(x) / C,   rstd = 1 / sqrt(sum((x - mean)^2) / C + eps)

x [N, C] fp32|bf16|fp16 (eager also fp64); weight, bias [C] in x's dtype or fp32, or None; mean, rstd [N] fp32 (fp64 for fp64).
Backward, with xhat = (x - mean) * rstd and g = dy * weight:

    dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),   dweight = sum over rows of dy * xhat,   dbias = sum over rows of dy
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

import gptfast.backend as backend
from gptfast.errors import Error
from gptfast.ops._common import limit_dtypes, requires_grad, rows

_dtypes = limit_dtypes("layer_norm")


@backend.limits("layer_norm")
def _limit(name: str, inputs: tuple[Any, ...], needs_grad: bool) -> str | None:
    columns = inputs[0].shape[-1]
    if name == "triton" and columns > 16384:
        return f"{columns} columns; this kernel holds a row in registers, up to 16384"
    return _dtypes(name, inputs, needs_grad)


def eager(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """The definition: PyTorch's own layer_norm, differentiated by plain autograd. x [..., C] -> [..., C] in x's dtype."""
    same = all(p is None or p.dtype == x.dtype for p in (weight, bias))
    compute = x if same else x.float()
    scale, shift = (None if p is None else p.to(compute.dtype) for p in (weight, bias))
    with torch.autocast(x.device.type, enabled=False):  # autocast would turn a bf16 x into an fp32 result
        return F.layer_norm(compute, x.shape[-1:], scale, shift, eps).to(x.dtype)


if backend.has_schema("layer_norm"):

    @torch.library.register_fake("gptfast::layer_norm")  # type: ignore[untyped-decorator]
    def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        statistics = x.new_empty(x.shape[0], dtype=torch.float32)
        return torch.empty_like(x), statistics, torch.empty_like(statistics)

    @torch.library.register_fake("gptfast::layer_norm_backward")  # type: ignore[untyped-decorator]
    def _(dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dweight = x.new_empty(x.shape[1], dtype=torch.float32 if weight is None else weight.dtype)
        return torch.empty_like(x), dweight, torch.empty_like(dweight)


class _Fast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        y, mean, rstd = backend.impl("layer_norm", name).forward(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.name, ctx.bias_dtype = name, None if bias is None else bias.dtype
        return y  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, mean, rstd = ctx.saved_tensors
        dx, dweight, dbias = backend.impl("layer_norm", ctx.name).backward(dy.contiguous(), x, weight, mean, rstd)
        return None, dx, None if weight is None else dweight, None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype), None


def alike(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """weight and bias contiguous and in one dtype, x's or fp32, which is what kernels take."""
    weight, bias = (None if p is None else p.contiguous() for p in (weight, bias))
    dtypes = {p.dtype for p in (weight, bias) if p is not None}
    if len(dtypes) < 2 and dtypes <= {x.dtype, torch.float32}:
        return weight, bias
    return None if weight is None else weight.float(), None if bias is None else bias.float()


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Layer normalisation over the last dimension; formula and shapes in the module's docstring.

    x [..., C] with any strides; weight, bias [C] or None; returns y [..., C] in x's dtype. Raises gptfast.Error where a shape
    does not fit.
    """
    if x.dim() == 0:
        raise Error("layer_norm: x has no dimensions; needed is [..., C]")
    for label, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != x.shape[-1:]:
            raise Error(f"layer_norm: {label} has shape {tuple(parameter.shape)}, x's last dimension needs {tuple(x.shape[-1:])}")
    needs_grad = requires_grad(x, weight, bias)
    name = backend.choose("layer_norm", x, weight, bias, needs_grad=needs_grad)
    if name == "eager":
        return eager(x, weight, bias, eps)
    weight, bias = alike(x, weight, bias)
    if needs_grad:
        y = _Fast.apply(name, rows(x), weight, bias, eps)
    else:
        y = backend.impl("layer_norm", name).forward(rows(x), weight, bias, eps)[0]
    return y.view(x.shape)  # type: ignore[no-any-return]
