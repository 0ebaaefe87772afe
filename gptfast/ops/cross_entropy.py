"""Cross entropy of integer targets under a softmax over the first `vocab` of Vp columns.

    lse[n] = log(sum over c < vocab of exp(logits[n, c])),   loss[n] = lse[n] - logits[n, targets[n]],  0 for an ignored target

logits [N, Vp] fp32|bf16|fp16 (eager also fp64); targets [N] int64|int32 in [0, vocab), or ignore_index; loss, lse [N] fp32 (fp64
for fp64). Reductions as PyTorch's: "sum", "none", and "mean" over the targets that count (NaN where none does). Backward:

    dlogits[n, c] = dloss[n] * (exp(logits[n, c] - lse[n]) - (c == targets[n])),  0 for ignored rows and, exactly, for c >= vocab

In a kernel a target outside the vocabulary gives a NaN row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

import gptfast.backend as backend
from gptfast.ops._common import REDUCTIONS, check_targets, limit_dtypes, one_of, requires_grad, rows

limit_dtypes("cross_entropy")


def eager(logits: Tensor, targets: Tensor, ignore_index: int = -100, vocab: int | None = None, reduction: str = "mean") -> Tensor:
    """The definition: PyTorch's own cross_entropy, differentiated by plain autograd; 16-bit logits are computed in fp32.

    logits [..., Vp], targets [...] -> a scalar, or [...] for "none"; fp32 (fp64 for fp64).
    """
    x = rows(logits[..., :vocab])
    compute = x.to(torch.promote_types(x.dtype, torch.float32))
    loss = F.cross_entropy(compute, targets.reshape(-1).long(), ignore_index=ignore_index, reduction=reduction)
    return loss.view(targets.shape) if reduction == "none" else loss


if backend.has_schema("cross_entropy"):

    @torch.library.register_fake("gptfast::cross_entropy")  # type: ignore[untyped-decorator]
    def _(logits: Tensor, targets: Tensor, ignore_index: int, vocab: int) -> tuple[Tensor, Tensor]:
        loss = logits.new_empty(logits.shape[0], dtype=torch.float32)
        return loss, torch.empty_like(loss)

    @torch.library.register_fake("gptfast::cross_entropy_backward")  # type: ignore[untyped-decorator]
    def _(dloss: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, ignore_index: int, vocab: int) -> Tensor:
        return torch.empty_like(logits)


class _Fast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, logits: Tensor, targets: Tensor, ignore_index: int, vocab: int) -> Tensor:
        loss, lse = backend.impl("cross_entropy", name).forward(logits, targets, ignore_index, vocab)
        ctx.save_for_backward(logits, targets, lse)
        ctx.name, ctx.ignore_index, ctx.vocab = name, ignore_index, vocab
        return loss  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dloss: Tensor) -> Any:
        leaf = backend.impl("cross_entropy", ctx.name).backward
        dlogits = leaf(dloss.contiguous(), *ctx.saved_tensors, ctx.ignore_index, ctx.vocab)
        return None, dlogits, None, None, None


def cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int = -100, vocab: int | None = None, reduction: str = "mean"
) -> Tensor:
    """Cross entropy; formula in the module's docstring.

    logits [..., Vp] with any strides; targets [...]; vocab: how many columns are real (default all). Returns a scalar, or [...] for
    reduction "none", in fp32 (fp64 for fp64). Raises gptfast.Error where a shape or the reduction does not fit and, for tensors on
    the CPU, where a target is neither in the vocabulary nor ignore_index.
    """
    one_of("cross_entropy", "reduction", reduction, REDUCTIONS)
    size = check_targets("cross_entropy", logits.shape, targets, logits.shape[-1], vocab, ignore_index)
    needs_grad = requires_grad(logits)
    name = backend.choose("cross_entropy", logits, needs_grad=needs_grad)
    if name == "eager":
        return eager(logits, targets, ignore_index, size, reduction)
    flat, wanted = rows(logits), targets.reshape(-1).contiguous()
    if needs_grad:
        loss = _Fast.apply(name, flat, wanted, ignore_index, size)
    else:
        loss = backend.impl("cross_entropy", name).forward(flat, wanted, ignore_index, size)[0]
    if reduction == "none":
        return loss.view(targets.shape)  # type: ignore[no-any-return]
    return loss.sum() if reduction == "sum" else loss.sum() / (wanted != ignore_index).sum()  # type: ignore[no-any-return]
