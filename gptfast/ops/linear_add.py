"""A product added to the residual stream, one op of a decode step: y = residual + x weight^T + bias.

x [N, K], weight [M, K] of any strides, bias [M] or None, residual [N, M], all fp32|bf16|fp16 (eager also fp64); y [N, M] in
residual's dtype; N 1 to 32 in kernels. A kernel has no backward; the eager definition is differentiable.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

import gptfast.backend as backend
from gptfast.errors import Error
from gptfast.ops._common import limit_decode, requires_grad, rows
from gptfast.ops.linear import linear

limit_decode("linear_add")


def eager(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """The definition: `linear`, then an addition. x [..., K], residual [..., M] -> [..., M] in residual's dtype."""
    return (residual + linear(x, weight, bias)).to(residual.dtype)


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """residual + x weight^T + bias; shapes in the module's docstring, with any leading dimensions.

    Returns [..., M] in residual's dtype. Raises gptfast.Error where a shape does not fit.
    """
    if weight.dim() != 2 or residual.shape != (*x.shape[:-1], weight.shape[0]):
        shapes = f"{tuple(residual.shape)}, x {tuple(x.shape)}, weight {tuple(weight.shape)}"
        raise Error(f"linear_add: residual has shape {shapes}; needed are [..., M], [..., K], [M, K]")
    name = backend.choose("linear_add", x, weight, bias, residual, needs_grad=requires_grad(x, weight, bias, residual))
    if name == "eager":
        return eager(x, weight, bias, residual)
    y: Any = backend.impl("linear_add", name).forward(rows(x), weight, bias, rows(residual))
    return y.view(residual.shape)  # type: ignore[no-any-return]
