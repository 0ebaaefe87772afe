"""The language-model head and its loss in one op: cross entropy of x weight^T, without keeping the logits.

    logits = x weight[:vocab]^T,   loss[n] = lse(logits[n]) - logits[n, targets[n]],  0 where the target is ignored

x [N, C], weight [Vp, C] in one dtype, fp32|bf16|fp16 (eager also fp64); targets [N] int64|int32 in [0, vocab), or ignore_index;
scale [1] fp32 on x's device, or None for 1; loss fp32 (fp64 for fp64). The front door returns scale * loss, reduced as PyTorch's
("sum", "mean" over the targets that count, "none"). A kernel computes the gradients during forward, `chunks` pieces of the rows,

    dx[n] = scale * (softmax(logits[n]) - onehot(targets[n])) weight,   dweight = scale * sum_n (softmax - onehot)[n]^T x[n]

with rows of dweight beyond vocab exactly 0 (for "mean" scale is divided by their number first), and backward multiplies them by the
upstream gradient, in place: a second backward raises. Hence no kernel serves "none" with gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

import gptfast.backend as backend
from gptfast.errors import Error
from gptfast.ops._common import (
    REDUCTIONS,
    autocast,
    check_scale,
    check_targets,
    limit_dtypes,
    multiply_,
    one_of,
    requires_grad,
    rows,
    total_scale,
)

_LOGIT_BYTES = 128 << 20

_dtypes = limit_dtypes("linear_cross_entropy")


@backend.limits("linear_cross_entropy")
def _limits(name: str, inputs: tuple[Any, ...], needs_grad: bool) -> str | None:
    if needs_grad and "none" in inputs[2:]:
        return 'gradients of reduction "none"; kernels know them only of a sum'
    return _dtypes(name, inputs, needs_grad)


def eager(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    vocab: int | None = None,
    scale: Tensor | None = None,
    reduction: str = "mean",
    chunks: int | None = None,
) -> Tensor:
    """The definition: PyTorch's linear and cross_entropy, differentiated by plain autograd, which keeps all the logits.

    x [..., C], targets [...] -> a scalar, or [...] for "none"; fp32 (fp64 for fp64). `chunks` says nothing here.
    """
    logits = F.linear(rows(x), weight[:vocab].to(x.dtype))
    compute = logits.to(torch.promote_types(x.dtype, torch.float32))
    loss = F.cross_entropy(compute, targets.reshape(-1).long(), ignore_index=ignore_index, reduction=reduction)
    loss = loss if scale is None else loss * scale.reshape(()).to(loss.dtype)
    return loss.view(targets.shape) if reduction == "none" else loss


if backend.has_schema("linear_cross_entropy"):

    @torch.library.register_fake("gptfast::linear_cross_entropy")  # type: ignore[untyped-decorator]
    def _(
        x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, vocab: int, scale: Tensor, chunks: int, need_grad: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        loss = x.new_empty(x.shape[0], dtype=torch.float32)
        if not need_grad:
            return loss, torch.empty_like(loss), x.new_empty(0), x.new_empty(0)
        dweight = torch.empty_like(weight, dtype=x.dtype if chunks == 1 else torch.float32)
        return loss, torch.empty_like(loss), torch.empty_like(x), dweight


def pieces(x: Tensor, weight: Tensor) -> int:
    """Into how many pieces the rows of x [N, C] are cut where nobody says: 8 on a GPU, on a CPU pieces of at most 128 MiB of logits
    (fewer rows make the product for dweight, which writes all of it for each piece, slower)."""
    if x.device.type != "cpu":
        return 8
    return max(1, -(-x.shape[0] * weight.shape[0] * x.element_size() // _LOGIT_BYTES))


class _Fast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, name: str, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, vocab: int, scale: Tensor, chunks: int
    ) -> Tensor:
        leaf = backend.impl("linear_cross_entropy", name).forward
        loss, _, dx, dweight = leaf(x, weight, targets, ignore_index, vocab, scale, chunks, True)
        ctx.save_for_backward(dx, dweight)
        ctx.dtypes, ctx.spent = (x.dtype, weight.dtype), False
        return loss.sum() * scale.reshape(())  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dloss: Tensor) -> Any:
        if ctx.spent:
            raise Error("linear_cross_entropy: a second backward; its gradients were handed out by the first one")
        ctx.spent = True
        dx, dweight = (multiply_(g, dloss).to(dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return None, dx, dweight, None, None, None, None, None


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    vocab: int | None = None,
    scale: Tensor | None = None,
    reduction: str = "mean",
    chunks: int | None = None,
) -> Tensor:
    """Cross entropy of the logits x weight^T; formula in the module's docstring.

    x [..., C], weight [Vp, C], targets [...]; vocab: how many rows of weight are real (default all); scale [1] or None multiplies
    the loss; chunks >= 1: into how many pieces the rows are cut (None: see `pieces`). Returns a scalar, or [...] for reduction
    "none", in fp32 (fp64 for fp64). Raises gptfast.Error where a shape, the reduction or chunks does not fit and, for tensors on
    the CPU, where a target is neither in the vocabulary nor ignore_index.
    """
    one_of("linear_cross_entropy", "reduction", reduction, REDUCTIONS)
    if weight.dim() != 2 or x.dim() == 0 or weight.shape[1] != x.shape[-1]:
        shapes = f"{tuple(weight.shape)}, x {tuple(x.shape)}"
        raise Error(f"linear_cross_entropy: weight has shape {shapes}; needed are [Vp, C] and [..., C]")
    if chunks is not None and chunks < 1:
        raise Error(f"linear_cross_entropy: chunks is {chunks}; allowed: 1 and more")
    size = check_targets("linear_cross_entropy", x.shape, targets, weight.shape[0], vocab, ignore_index)
    check_scale("linear_cross_entropy", scale)
    x, weight = autocast(x, weight)
    needs_grad = requires_grad(x, weight)
    name = backend.choose("linear_cross_entropy", x, weight, reduction, needs_grad=needs_grad)
    if name == "eager":
        return eager(x, weight, targets, ignore_index, size, scale, reduction, chunks)
    flat, weight, wanted = rows(x), weight.contiguous(), targets.reshape(-1).contiguous()
    count = pieces(flat, weight) if chunks is None else chunks
    factor = total_scale(scale, x, wanted, ignore_index, reduction)
    if needs_grad:
        return _Fast.apply(name, flat, weight, wanted, ignore_index, size, factor, count)  # type: ignore[no-any-return]
    leaf = backend.impl("linear_cross_entropy", name).forward
    loss = leaf(flat, weight, wanted, ignore_index, size, factor, count, False)[0] * factor
    return loss.view(targets.shape) if reduction == "none" else loss.sum()  # type: ignore[no-any-return]
