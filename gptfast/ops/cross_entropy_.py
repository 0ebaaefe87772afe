"""Cross entropy that leaves its gradient in the memory of the logits: forward and backward in one pass.

    loss[n] = lse[n] - logits[n, targets[n]],   lse[n] = log(sum over c < vocab of exp(logits[n, c])),  0 for an ignored target
    logits[n, c]  becomes  scale * (exp(logits[n, c] - lse[n]) - (c == targets[n])),  0 for ignored rows and for c >= vocab

logits [N, Vp] fp32|bf16|fp16 (eager also fp64), mutated; targets [N] int64|int32 in [0, vocab), or ignore_index; scale [1] fp32 on
the logits' device, or None for 1; loss [N] fp32 (fp64 for fp64). The front door returns scale * loss, reduced as PyTorch's, so what
is left in the logits is its gradient; backward multiplies it in place by the upstream gradient and hands it on: a second backward
raises. logits must be the result of an op that does not need it any more, as a product is; a leaf that requires grad is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import gptfast.backend as backend
from gptfast.errors import Error
from gptfast.ops._common import REDUCTIONS, check_scale, check_targets, limit_dtypes, multiply_, one_of, requires_grad, total_scale

limit_dtypes("cross_entropy_")


def eager(logits: Tensor, targets: Tensor, ignore_index: int, vocab: int, scale: Tensor) -> Tensor:
    """The definition as a leaf, in PyTorch's in-place ops: logits(a!) [N, Vp] holds the gradient after it -> loss [N]."""
    compute = torch.promote_types(logits.dtype, torch.float32)
    p = logits[:, :vocab].to(compute)  # the logits themselves where they are fp32
    ignored = (targets == ignore_index).unsqueeze(1)
    target = targets.long().unsqueeze(1).masked_fill(ignored, 0)
    lse = p.logsumexp(1, keepdim=True)
    lse = lse + 0 * lse  # a row that holds inf is NaN, as PyTorch's cross_entropy makes it
    loss = (lse - p.gather(1, target)).masked_fill(ignored, 0).squeeze(1)
    p.sub_(lse).exp_().scatter_add_(1, target, torch.full_like(lse, -1))
    p.mul_(scale).masked_fill_(ignored, 0)
    if p.dtype != logits.dtype:
        logits[:, :vocab] = p
    logits[:, vocab:] = 0
    return loss


if backend.has_schema("cross_entropy_"):

    @torch.library.register_fake("gptfast::cross_entropy_")  # type: ignore[untyped-decorator]
    def _(logits: Tensor, targets: Tensor, ignore_index: int, vocab: int, scale: Tensor) -> Tensor:
        return logits.new_empty(logits.shape[0], dtype=torch.float32)


class _Fast(torch.autograd.Function):
    """For every backend, eager too: the gradient exists after forward, and autograd must not look for it."""

    @staticmethod
    def forward(
        ctx: Any, name: str, logits: Tensor, targets: Tensor, ignore_index: int, vocab: int, scale: Tensor, reduce: bool
    ) -> Tensor:
        leaf = eager if name == "eager" else backend.impl("cross_entropy_", name).forward
        loss = leaf(logits, targets, ignore_index, vocab, scale)
        ctx.save_for_backward(logits)
        ctx.spent = False
        return (loss.sum() if reduce else loss) * (scale.reshape(()) if reduce else scale)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dloss: Tensor) -> Any:
        if ctx.spent:
            raise Error("cross_entropy_: a second backward; its gradient was handed out by the first one")
        ctx.spent = True
        return None, multiply_(ctx.saved_tensors[0], dloss), None, None, None, None, None


def cross_entropy_(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    vocab: int | None = None,
    scale: Tensor | None = None,
    reduction: str = "sum",
) -> Tensor:
    """Cross entropy whose gradient overwrites the logits; formula in the module's docstring.

    logits [..., Vp] contiguous, mutated whether or not a gradient is wanted; targets [...]; scale [1] or None multiplies loss and
    gradient. Returns a scalar, or [...] for reduction "none", in fp32 (fp64 for fp64). Raises gptfast.Error where a shape, the
    layout or the reduction does not fit, where logits is a leaf that requires grad and, for tensors on the CPU, where a target is
    neither in the vocabulary nor ignore_index.
    """
    one_of("cross_entropy_", "reduction", reduction, REDUCTIONS)
    size = check_targets("cross_entropy_", logits.shape, targets, logits.shape[-1], vocab, ignore_index)
    check_scale("cross_entropy_", scale)
    needs_grad = requires_grad(logits)
    if needs_grad and logits.is_leaf:
        raise Error("cross_entropy_: logits is a leaf that requires grad; it would be overwritten. Use cross_entropy")
    if not logits.is_contiguous():
        raise Error(f"cross_entropy_: logits have strides {logits.stride()}; it is overwritten in place and must be contiguous")
    name = backend.choose("cross_entropy_", logits, needs_grad=needs_grad)
    wanted = targets.reshape(-1).contiguous()
    factor = total_scale(scale, logits, wanted, ignore_index, reduction)
    flat = logits.view(wanted.shape[0], logits.shape[-1])
    loss = _Fast.apply(name, flat, wanted, ignore_index, size, factor, reduction != "none")
    return loss.view(targets.shape) if reduction == "none" else loss  # type: ignore[no-any-return]
