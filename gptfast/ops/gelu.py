"""Gaussian error linear unit, with an optional bias added first (Hendrycks, Gimpel 2016, arXiv:1606.08415). With u = x + bias:

    y = u / 2 * (1 + erf(u / sqrt(2)))                                    approximate "none"
    y = u / 2 * (1 + tanh(sqrt(2 / pi) * (u + 0.044715 u^3)))             approximate "tanh" (GPT-2's)

x [N, C] fp32|bf16|fp16 (eager also fp64); bias [C] in x's dtype or fp32, or None; y [N, C] in x's dtype.
Backward: dx = dy * y'(u), dbias = sum over rows of dx.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

import gptfast.backend as backend
from gptfast.errors import Error
from gptfast.ops._common import limit_dtypes, one_of, requires_grad, rows

limit_dtypes("gelu")


def eager(x: Tensor, bias: Tensor | None = None, approximate: str = "tanh") -> Tensor:
    """The definition: PyTorch's own gelu, differentiated by plain autograd. x [..., C] -> [..., C] in x's dtype."""
    return F.gelu(x if bias is None else x + bias, approximate=approximate).to(x.dtype)


if backend.has_schema("gelu"):

    @torch.library.register_fake("gptfast::gelu")  # type: ignore[untyped-decorator]
    def _(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
        return torch.empty_like(x)

    @torch.library.register_fake("gptfast::gelu_backward")  # type: ignore[untyped-decorator]
    def _(dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor, Tensor]:
        dbias = x.new_empty(0, dtype=torch.float32) if bias is None else torch.empty_like(bias)
        return torch.empty_like(x), dbias


class _Fast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.name, ctx.approximate = name, approximate
        return backend.impl("gelu", name).forward(x, bias, approximate)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, bias = ctx.saved_tensors
        dx, dbias = backend.impl("gelu", ctx.name).backward(dy.contiguous(), x, bias, ctx.approximate)
        return None, dx, None if bias is None else dbias.to(bias.dtype), None


def gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "tanh") -> Tensor:
    """GELU of x + bias; formula and shapes in the module's docstring.

    x [..., C] with any strides; bias [C] or None; approximate "tanh" or "none"; returns [..., C] in x's dtype. Raises
    gptfast.Error where the bias does not fit or `approximate` is another word.
    """
    one_of("gelu", "approximate", approximate, ("tanh", "none"))
    if bias is not None and bias.shape != x.shape[-1:]:
        raise Error(f"gelu: bias has shape {tuple(bias.shape)}, x's last dimension needs {tuple(x.shape[-1:])}")
    needs_grad = requires_grad(x, bias)
    name = backend.choose("gelu", x, bias, needs_grad=needs_grad)
    if name == "eager":
        return eager(x, bias, approximate)
    if bias is not None:  # kernels take x's dtype or fp32, without gaps
        bias = (bias if bias.dtype in (x.dtype, torch.float32) else bias.float()).contiguous()
    if needs_grad:
        y = _Fast.apply(name, rows(x), bias, approximate)
    else:
        y = backend.impl("gelu", name).forward(rows(x), bias, approximate)
    return y.view(x.shape)  # type: ignore[no-any-return]
