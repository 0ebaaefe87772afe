"""Dropout (Srivastava et al. 2014) whose noise is a function and not a state: Philox4x32-10 of the seed and the place.

    y[n, c] = x[n, c] / (1 - p)  where  word(seed, id=c, position=n, choice=0, purpose=1) >= p * 2^32,  else 0

x [N, C] fp32|bf16|fp16 (eager also fp64); p in [0, 1]; seed [1] int64 on x's device; y [N, C] in x's dtype. Every backend drops
the same elements, and so does a resumed run. Backward: dx is the same function of dy.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import gptfast.backend as backend
from gptfast import philox
from gptfast.ops._common import check_noise, limit_dtypes, requires_grad, rows

limit_dtypes("dropout")


def eager(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """The definition, differentiated by plain autograd: gptfast.philox decides, torch.where drops. x [..., C] -> [..., C]."""
    n = torch.arange(x.shape[:-1].numel(), device=x.device).view(*x.shape[:-1], 1)
    words = philox.row_words(seed, x.shape[-1], n, 0, philox.PURPOSE_DROPOUT, x.device)
    return torch.where(words >= math.ceil(p * 2.0**32), x / ((1 - p) or 1), 0)  # p = 1 keeps nothing and divides by nothing


if backend.has_schema("dropout"):

    @torch.library.register_fake("gptfast::dropout")  # type: ignore[untyped-decorator]
    def _(x: Tensor, p: float, seed: Tensor) -> Tensor:
        return torch.empty_like(x)

    @torch.library.register_fake("gptfast::dropout_backward")  # type: ignore[untyped-decorator]
    def _(dy: Tensor, p: float, seed: Tensor) -> Tensor:
        return torch.empty_like(dy)


class _Fast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, x: Tensor, p: float, seed: Tensor) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.name, ctx.p = name, p
        return backend.impl("dropout", name).forward(x, p, seed)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> Any:
        return None, backend.impl("dropout", ctx.name).backward(dy.contiguous(), ctx.p, *ctx.saved_tensors), None, None


def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Dropout of every element of x with probability p; formula in the module's docstring. Row n counts x's leading dimensions.

    x [..., C] with any strides; seed [1] int64; returns [..., C] in x's dtype, x itself where p is 0. Raises gptfast.Error where
    p is no probability or the seed is not an int64 tensor [1].
    """
    check_noise("dropout", p, seed)
    if p == 0:
        return x
    needs_grad = requires_grad(x)
    name = backend.choose("dropout", x, needs_grad=needs_grad)
    if name == "eager":
        return eager(x, p, seed)
    y = _Fast.apply(name, rows(x), p, seed) if needs_grad else backend.impl("dropout", name).forward(rows(x), p, seed)
    return y.view(x.shape)  # type: ignore[no-any-return]
