"""Layer normalisation, a product and an activation, one op of a decode step: y = activation(layer_norm(x) weight^T + bias).

x [N, K], ln_weight, ln_bias [K] or None, weight [M, K] of any strides or a PackedWeight, bias [M] or None, all fp32|bf16|fp16
(eager also fp64); activation "none", "gelu" (erf) or "gelu_tanh"; y [N, M] in x's dtype; N 1 to 32 in kernels. A kernel has no
backward; the eager definition is differentiable, but for a PackedWeight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import gptfast.backend as backend
from gptfast.ops._common import check_product, limit_decode, one_of, packed_arguments, requires_grad, rows
from gptfast.ops.gelu import gelu
from gptfast.ops.layer_norm import layer_norm
from gptfast.ops.linear import linear
from gptfast.packing import PackedWeight

_decode_limit = limit_decode("layer_norm_linear")


@backend.limits("layer_norm_linear")
def _limit(name: str, inputs: tuple[Any, ...], needs_grad: bool) -> str | None:
    if torch.is_autocast_enabled(inputs[0].device.type) and not any(isinstance(x, PackedWeight) for x in inputs):
        return "autocast, which casts between the steps"
    return _decode_limit(name, inputs, needs_grad)


ACTIVATIONS = ("none", "gelu", "gelu_tanh")


def eager(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    weight: Tensor | PackedWeight,
    bias: Tensor | None = None,
    activation: str = "none",
    eps: float = 1e-5,
) -> Tensor:
    """The definition: `layer_norm`, `linear`, `gelu`. x [..., K] -> [..., M]."""
    y = linear(layer_norm(x, ln_weight, ln_bias, eps), weight, bias)
    return y if activation == "none" else gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")


if backend.has_schema("layer_norm_linear"):

    @torch.library.register_fake("gptfast::layer_norm_linear")  # type: ignore[untyped-decorator]
    def _(
        x: Tensor, ln_weight: Tensor | None, ln_bias: Tensor | None, weight: Tensor, bias: Tensor | None, activation: str,
        eps: float, format: str = "", outputs: int = 0,
    ) -> Tensor:  # fmt: skip
        return x.new_empty(x.shape[0], outputs if format else weight.shape[0])


def layer_norm_linear(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    weight: Tensor | PackedWeight,
    bias: Tensor | None = None,
    activation: str = "none",
    eps: float = 1e-5,
) -> Tensor:
    """activation(layer_norm(x) weight^T + bias); shapes in the module's docstring, with any leading dimensions.

    Returns [..., M] in x's dtype, under autocast in autocast's (a PackedWeight: in x's). Raises gptfast.Error where a shape does
    not fit, the activation is another word, or a gradient through a PackedWeight is wanted.
    """
    one_of("layer_norm_linear", "activation", activation, ACTIVATIONS)
    check_product("layer_norm_linear", x, weight, bias)
    tensors = (x, ln_weight, ln_bias, weight, bias)
    needs_grad = requires_grad(*(t for t in tensors if isinstance(t, Tensor)))
    name = backend.choose("layer_norm_linear", *tensors, needs_grad=needs_grad)
    if name == "eager":
        return eager(*tensors, activation, eps)
    data, packed = packed_arguments(weight, x.dtype)
    y: Any = backend.impl("layer_norm_linear", name).forward(rows(x), ln_weight, ln_bias, data, bias, activation, eps, *packed)
    return y.view(*x.shape[:-1], weight.shape[0])  # type: ignore[no-any-return]
