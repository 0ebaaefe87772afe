"""The autograd glue of a whole transformer block: the leaves of its ops in order, as one node of the graph.

Not an op: no kernel and no schema of its own, and the same numbers as the block written op by op, which is its definition
(model.py). One node in place of nine matters where a step is short: on a CPU autograd's bookkeeping for an op takes longer (0.1 ms)
than the kernels of a small model.

Parameters come in the order of PARAMETERS, matrices [in, out] as GPT-2 stores them, all in x's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import gptfast.backend as backend

PARAMETERS = (
    "ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias",
    "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias",
)  # fmt: skip
_OPS = ("layer_norm", "add_layer_norm", "linear", "attention", "gelu")


@dataclass(frozen=True)
class Shape:
    """What a block is besides its weights: heads, the scale of its attention, epsilon of the two layer norms, gelu's form, the
    probabilities of attention's dropout and of the residual ones."""

    heads: int
    scale: float
    eps: float
    approximate: str
    attention_p: float
    residual_p: float


def choose(shape: Shape, residual: Tensor, weights: tuple[Tensor, ...]) -> dict[str, str] | None:
    """The backend of each op; None where the block has to go op by op: one of the ops takes eager here, autocast wants to see each
    product, or dtypes differ."""
    if torch.is_autocast_enabled(residual.device.type) or any(w.dtype != residual.dtype for w in weights):
        return None
    x = residual.flatten(0, 1)
    q = x.view(*residual.shape[:2], shape.heads, -1)
    names = {op: backend.choose(op, q if op == "attention" else x, needs_grad=True) for op in _OPS}
    if shape.residual_p > 0:
        names["dropout"] = backend.choose("dropout", x, needs_grad=True)
    return None if "eager" in names.values() else names


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, names: dict[str, str], shape: Shape, seeds: list[Tensor] | None, document_ids: Tensor | None,
        residual: Tensor, x: Tensor | None, *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        leaf = {op: backend.impl(op, name).forward for op, name in names.items()}
        w1, b1, w_qkv, b_qkv, w_o, b_o, w2, b2, w_fc, b_fc, w_proj, b_proj = weights
        batch, length, width = residual.shape
        total = residual.reshape(-1, width)
        if x is None:
            y, mean, rstd = leaf["layer_norm"](total, w1, b1, shape.eps)
        else:
            total, y, mean, rstd = leaf["add_layer_norm"](total, x.reshape(-1, width), w1, b1, shape.eps)
        qkv = leaf["linear"](y, w_qkv.t(), b_qkv).view(batch, length, 3, shape.heads, -1)
        attention_seed = None if seeds is None or shape.attention_p == 0 else seeds[0]
        o, lse = leaf["attention"](*qkv.unbind(2), shape.scale, document_ids, shape.attention_p, attention_seed)
        rows = leaf["linear"](o.view(-1, width), w_o.t(), b_o)
        if "dropout" in leaf and seeds is not None:
            rows = leaf["dropout"](rows, shape.residual_p, seeds[1])
        total2, y2, mean2, rstd2 = leaf["add_layer_norm"](total, rows, w2, b2, shape.eps)
        hidden = leaf["linear"](y2, w_fc.t(), None)
        active = leaf["gelu"](hidden, b_fc, shape.approximate)
        out = leaf["linear"](active, w_proj.t(), b_proj)
        if "dropout" in leaf and seeds is not None:
            out = leaf["dropout"](out, shape.residual_p, seeds[2])
        ctx.save_for_backward(
            total, mean, rstd, y, qkv, o, lse, total2, mean2, rstd2, y2, hidden, active, document_ids,
            w1, w_qkv, w_o, w2, w_fc, b_fc, w_proj,
        )  # fmt: skip
        ctx.names, ctx.shape, ctx.seeds, ctx.has_x = names, shape, seeds, x is not None
        return total2.view(residual.shape), out.view(residual.shape)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, d_total: Tensor, d_out: Tensor) -> Any:
        leaf = {op: backend.impl(op, name).backward for op, name in ctx.names.items()}
        (total, mean, rstd, y, qkv, o, lse, total2, mean2, rstd2, y2, hidden, active, document_ids,
         w1, w_qkv, w_o, w2, w_fc, b_fc, w_proj) = ctx.saved_tensors  # fmt: skip
        shape, seeds, width = ctx.shape, ctx.seeds, total.shape[1]
        drop = "dropout" in leaf and seeds is not None
        rows = d_out.reshape(-1, width).contiguous()
        if drop:
            rows = leaf["dropout"](rows, shape.residual_p, seeds[2])
        rows, dw_proj, db_proj = leaf["linear"](rows, active, w_proj.t())
        rows, db_fc = leaf["gelu"](rows, hidden, b_fc, shape.approximate)
        rows, dw_fc, _ = leaf["linear"](rows, y2, w_fc.t())
        d, dw2, db2 = leaf["add_layer_norm"](d_total.reshape(-1, width).contiguous(), rows, total2, w2, mean2, rstd2)
        rows = leaf["dropout"](d, shape.residual_p, seeds[1]) if drop else d
        rows, dw_o, db_o = leaf["linear"](rows, o.view(-1, width), w_o.t())
        attention_seed = None if seeds is None or shape.attention_p == 0 else seeds[0]
        deterministic = torch.are_deterministic_algorithms_enabled()
        dqkv = leaf["attention"](
            rows.view(o.shape), *qkv.unbind(2), o, lse, shape.scale, document_ids, shape.attention_p, attention_seed, deterministic
        )
        rows, dw_qkv, db_qkv = leaf["linear"](dqkv.view(rows.shape[0], -1), y, w_qkv.t())
        d, dw1, db1 = leaf["add_layer_norm"](d, rows, total, w1, mean, rstd)
        d = d.view(d_total.shape)
        gradients = dw1, db1, dw_qkv.t(), db_qkv, dw_o.t(), db_o, dw2, db2, dw_fc.t(), db_fc, dw_proj.t(), db_proj
        return None, None, None, None, d, d if ctx.has_x else None, *gradients


def block(
    names: dict[str, str], shape: Shape, seeds: list[Tensor] | None, document_ids: Tensor | None, residual: Tensor,
    x: Tensor | None, weights: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(residual stream, output not yet added to it), each [B, T, C], one block later; `names` from choose(), x None stands for 0.

    seeds: of attention's dropout and of the two residual ones, [1] each; None where nothing is dropped.
    """
    return _Block.apply(names, shape, seeds, document_ids, residual, x, *weights)  # type: ignore[no-any-return]
