"""Layer normalisation, a product and an activation, one op of a decode step: y = activation(layer_norm(x) weight^T + bias).

x [N, K], ln_weight, ln_bias [K] or None, weight [M, K] of any strides, bias [M] or None, all fp32|bf16|fp16 (eager also fp64);
activation "none", "gelu" (erf) or "gelu_tanh"; y [N, M] in x's dtype; N 1 to 32 in kernels. A kernel has no backward; the eager
definition is differentiable.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

import gptfast.backend as backend
from gptfast.errors import Error
from gptfast.ops._common import limit_decode, one_of, requires_grad, rows
from gptfast.ops.gelu import gelu
from gptfast.ops.layer_norm import layer_norm
from gptfast.ops.linear import linear

limit_decode("layer_norm_linear")

ACTIVATIONS = ("none", "gelu", "gelu_tanh")


def eager(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    eps: float = 1e-5,
) -> Tensor:
    """The definition: `layer_norm`, `linear`, `gelu`. x [..., K] -> [..., M]."""
    y = linear(layer_norm(x, ln_weight, ln_bias, eps), weight, bias)
    return y if activation == "none" else gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")


def layer_norm_linear(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    eps: float = 1e-5,
) -> Tensor:
    """activation(layer_norm(x) weight^T + bias); shapes in the module's docstring, with any leading dimensions.

    Returns [..., M] in x's dtype. Raises gptfast.Error where a shape does not fit or the activation is another word.
    """
    one_of("layer_norm_linear", "activation", activation, ACTIVATIONS)
    if weight.dim() != 2 or x.dim() == 0 or weight.shape[1] != x.shape[-1]:
        shapes = f"{tuple(weight.shape)}, x {tuple(x.shape)}"
        raise Error(f"layer_norm_linear: weight has shape {shapes}; needed are [M, K] and [..., K]")
    tensors = (x, ln_weight, ln_bias, weight, bias)
    name = backend.choose("layer_norm_linear", *tensors, needs_grad=requires_grad(*tensors))
    if name == "eager":
        return eager(*tensors, activation, eps)
    y: Any = backend.impl("layer_norm_linear", name).forward(rows(x), ln_weight, ln_bias, weight, bias, activation, eps)
    return y.view(*x.shape[:-1], weight.shape[0])  # type: ignore[no-any-return]
