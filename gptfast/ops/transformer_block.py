"""A whole GPT-2 block: layer norm, attention, layer norm, MLP (Radford et al. 2019), forward and backward as one op each.

    total = residual + x;                      y = layer_norm(total)
    total = total + dropout(linear(attention(linear(y))));   y = layer_norm(total);   out = dropout(linear(gelu(linear(y))))

residual and x are the pair that blocks pass on: the residual stream, and the last sublayer's output that is not yet added to it
(None stands for 0); total and out are the same pair one block later. All [B, T, C], fp32|bf16|fp16 (eager also fp64); weights in
the order of PARAMETERS, matrices [in, out] as GPT-2 stores them, in the same dtype where a kernel runs.

The kernel is the leaves of the ops above, called in turn without Python or autograd between them: where a model is small,
autograd's bookkeeping for an op takes longer (0.1 ms on a CPU) than what it computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import gptfast.backend as backend
from gptfast.errors import Error
from gptfast.ops._common import limit_dtypes, one_of, requires_grad
from gptfast.ops.add_layer_norm import add_layer_norm
from gptfast.ops.attention import attention
from gptfast.ops.dropout import dropout
from gptfast.ops.gelu import gelu
from gptfast.ops.layer_norm import layer_norm
from gptfast.ops.linear import linear

PARAMETERS = (
    "ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias",
    "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias",
)  # fmt: skip
_PARTS = ("layer_norm", "add_layer_norm", "linear", "attention", "gelu", "dropout")

_dtypes = limit_dtypes("transformer_block")


@backend.limits("transformer_block")
def _limits(name: str, inputs: tuple[Any, ...], needs_grad: bool) -> str | None:
    residual, heads = inputs[0], inputs[-1] if isinstance(inputs[-1], int) else 1
    if torch.is_autocast_enabled(residual.device.type):
        return "autocast, which looks at each product"
    if any(isinstance(t, Tensor) and t.dtype != residual.dtype for t in inputs):
        return "residual, x and weights of several dtypes"
    if needs_grad and not all(weight.requires_grad for weight in inputs[2:-1]):
        return "weights without a gradient, which it would compute"
    x = residual.detach().reshape(-1, residual.shape[-1])
    q = x.view(x.shape[0], 1, heads, x.shape[1] // heads)
    for op in _PARTS:
        other = backend.choose(op, q if op == "attention" else x, needs_grad=needs_grad)
        if other != name:
            return f"{op} runs on {other} here"
    return _dtypes(name, (residual,), needs_grad)


def eager(
    residual: Tensor,
    x: Tensor | None,
    weights: Sequence[Tensor],
    heads: int,
    scale: float,
    eps: float,
    approximate: str,
    document_ids: Tensor | None = None,
    attention_p: float = 0.0,
    residual_p: float = 0.0,
    seeds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition: the ops in turn, each on the backend it takes. -> total, out."""
    w1, b1, w_qkv, b_qkv, w_o, b_o, w2, b2, w_fc, b_fc, w_proj, b_proj = weights
    batch, length, width = residual.shape

    def drop(y: Tensor, site: int) -> Tensor:
        return y if seeds is None or residual_p == 0 else dropout(y, residual_p, seeds[site : site + 1])

    if x is None:
        total, y = residual, layer_norm(residual, w1, b1, eps)
    else:
        total, y = add_layer_norm(residual, x.to(residual.dtype), w1, b1, eps)
    q, k, v = linear(y, w_qkv.t(), b_qkv).view(batch, length, 3, heads, width // heads).unbind(2)
    o = attention(q, k, v, scale, document_ids, *((attention_p, seeds[:1]) if seeds is not None and attention_p > 0 else ()))
    y = drop(linear(o.reshape(batch, length, width), w_o.t(), b_o), 1)
    total, y = add_layer_norm(total, y.to(total.dtype), w2, b2, eps)
    return total, drop(linear(gelu(linear(y, w_fc.t()), b_fc, approximate), w_proj.t(), b_proj), 2)


if backend.has_schema("transformer_block"):

    @torch.library.register_fake("gptfast::transformer_block")  # type: ignore[untyped-decorator]
    def _(
        residual: Tensor, x: Tensor | None, weights: Sequence[Tensor], document_ids: Tensor | None, seeds: Tensor | None,
        heads: int, scale: float, eps: float, approximate: str, attention_p: float, residual_p: float,
    ) -> list[Tensor]:  # fmt: skip
        batch, length, width = residual.shape
        count, inner = batch * length, weights[8].shape[1]

        def rows(columns: int) -> Tensor:
            return residual.new_empty(count, columns)

        def statistics() -> Tensor:
            return residual.new_empty(count, dtype=torch.float32)

        qkv = residual.new_empty(batch, length, 3, heads, width // heads)
        lse = residual.new_empty(batch, heads, length, dtype=torch.float32)
        first = residual.new_empty(0, width) if x is None else rows(width)
        o = residual.new_empty(batch, length, heads, width // heads)
        attended = [first, statistics(), statistics(), rows(width), qkv, o, lse]
        expanded = [statistics(), statistics(), rows(width), rows(inner), rows(inner)]
        return [torch.empty_like(residual), torch.empty_like(residual), *attended, *expanded]

    @torch.library.register_fake("gptfast::transformer_block_backward")  # type: ignore[untyped-decorator]
    def _(
        d_total: Tensor, d_out: Tensor, residual: Tensor, total: Tensor, kept: Sequence[Tensor], weights: Sequence[Tensor],
        document_ids: Tensor | None, seeds: Tensor | None, heads: int, scale: float, approximate: str, attention_p: float,
        residual_p: float, deterministic: bool,
    ) -> list[Tensor]:  # fmt: skip
        return [torch.empty_like(d_total), *(torch.empty_like(weight) for weight in weights)]


class _Fast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, name: str, statics: tuple[Any, ...], document_ids: Tensor | None, seeds: Tensor | None, residual: Tensor,
        x: Tensor | None, *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        leaf = backend.impl("transformer_block", name).forward
        total, out, *kept = leaf(residual, x, weights, document_ids, seeds, *statics)
        ctx.save_for_backward(residual if x is None else None, total, document_ids, seeds, *kept, *weights)
        ctx.name, ctx.statics, ctx.kept, ctx.has_x = name, statics, len(kept), x is not None
        return total, out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, d_total: Tensor, d_out: Tensor) -> Any:
        residual, total, document_ids, seeds, *rest = ctx.saved_tensors
        kept, weights = rest[: ctx.kept], rest[ctx.kept :]
        heads, scale, _, approximate, *probabilities = ctx.statics
        deterministic = torch.are_deterministic_algorithms_enabled()
        d, *gradients = backend.impl("transformer_block", ctx.name).backward(
            d_total.contiguous(), d_out.contiguous(), total if residual is None else residual, total, kept, weights, document_ids,
            seeds, heads, scale, approximate, *probabilities, deterministic,
        )  # fmt: skip
        return None, None, None, None, d, d if ctx.has_x else None, *gradients


def transformer_block(
    residual: Tensor,
    x: Tensor | None,
    weights: Sequence[Tensor],
    heads: int,
    scale: float,
    eps: float = 1e-5,
    approximate: str = "tanh",
    document_ids: Tensor | None = None,
    attention_p: float = 0.0,
    residual_p: float = 0.0,
    seeds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(total, out), each [B, T, C]; formula in the module's docstring.

    residual, x [B, T, C]; weights as PARAMETERS; heads divides C; approximate "tanh" or "none"; document_ids [B, T] or None;
    attention_p, residual_p: probabilities of the dropouts, with seeds [3] int64 of attention's and the two residual ones, without
    seeds nothing is dropped. Raises gptfast.Error where a shape does not fit.
    """
    one_of("transformer_block", "approximate", approximate, ("tanh", "none"))
    if residual.dim() != 3 or (x is not None and x.shape != residual.shape):
        shapes = f"{tuple(residual.shape)}{'' if x is None else f' and {tuple(x.shape)}'}"
        raise Error(f"transformer_block: residual and x have shape {shapes}; needed is one [B, T, C]")
    width = residual.shape[-1]
    if heads < 1 or width % heads:
        raise Error(f"transformer_block: heads is {heads}; allowed: divisors of the width {width}")
    if len(weights) != len(PARAMETERS):
        raise Error(f"transformer_block: {len(weights)} weights; needed are {', '.join(PARAMETERS)}")
    inner = weights[8].shape[-1]
    needed = [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)]
    needed += [(width,), (width,), (width, inner), (inner,), (inner, width), (width,)]
    for label, weight, shape in zip(PARAMETERS, weights, needed, strict=True):
        if weight.shape != shape:
            raise Error(f"transformer_block: {label} has shape {tuple(weight.shape)}, needed is {shape}")
    statics = (heads, scale, eps, approximate, attention_p, residual_p)
    needs_grad = requires_grad(residual, x, *weights)
    name = backend.choose("transformer_block", residual, x, *weights, heads, needs_grad=needs_grad)
    if name == "eager":
        return eager(residual, x, weights, heads, scale, eps, approximate, document_ids, attention_p, residual_p, seeds)
    residual, x = residual.contiguous(), None if x is None else x.contiguous()
    if needs_grad:
        return _Fast.apply(name, statics, document_ids, seeds, residual, x, *weights)  # type: ignore[no-any-return]
    total, out, *_ = backend.impl("transformer_block", name).forward(residual, x, weights, document_ids, seeds, *statics)
    return total, out
