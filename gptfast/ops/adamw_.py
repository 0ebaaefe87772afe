"""One AdamW step (Loshchilov, Hutter 2017, arXiv:1711.05101) over all parameters, in place. Where finite is 1, with g = scale grad:

    step += 1
    p *= 1 - lr * weight_decay;   m = beta1 m + (1 - beta1) g;   v = beta2 v + (1 - beta2) g^2
    p -= lr * (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)
    copy = p rounded to the copy's dtype

and nothing at all where finite is 0. params, exp_avg (m), exp_avg_sq (v): lists of tensors of one dtype a place, mutated; grads:
the same shapes, any float dtype; copies: a list of the same shapes in another dtype, or None, mutated; lr, step (mutated), scale
and finite: float tensors [1] on the parameters' device; weight_decay: a number a place. No backward; grads stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import gptfast.backend as backend
from gptfast.errors import Error
from gptfast.ops._common import limit_dtypes, on_host

_dtypes = limit_dtypes("adamw_")


@backend.limits("adamw_")
def _limits(name: str, inputs: tuple[Any, ...], needs_grad: bool) -> str | None:
    return _dtypes(name, tuple(inputs[0]), needs_grad)


def _written_out(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    lr: Tensor,
    count: Tensor,
    apply: Tensor,
    decay: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """The formula for one parameter, for torch.compile, which cannot trace PyTorch's kernel and fuses this."""
    new_m = m * beta1 + g * (1 - beta1)
    new_v = v * beta2 + g * g * (1 - beta2)
    steps = count.double()
    denominator = (new_v / (1 - beta2**steps)).sqrt() + eps
    new_p = p * (1 - lr * decay) - lr * (new_m / (1 - beta1**steps)) / denominator
    for old, new in ((p, new_p), (m, new_m), (v, new_v)):
        old.copy_(torch.where(apply, new, old))


def eager(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    copies: Sequence[Tensor] | None,
    lr: Tensor,
    step: Tensor,
    scale: Tensor,
    finite: Tensor,
    weight_decay: Sequence[float],
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """The definition: the kernel behind torch.optim.AdamW(fused=True), once for each value of weight_decay. (Its Python side keeps
    a count of steps for each parameter; here there is one.)"""
    host = on_host(finite)
    if host and not bool(finite):
        return
    scaled = [g.to(p.dtype).contiguous() for p, g in zip(params, grads, strict=True)]  # the kernel takes no strides
    if not (host and bool(scale == 1)):
        scaled = [g * scale.to(g.dtype).view(()) for g in scaled]
    step.add_(finite)
    rate, count, apply = lr.view(()), step.float().view(()), finite.view(()) > 0
    if torch.compiler.is_compiling():
        for p, g, m, v, decay in zip(params, scaled, exp_avg, exp_avg_sq, weight_decay, strict=True):
            _written_out(p, g, m, v, rate, count, apply, decay, beta1, beta2, eps)
    else:
        skip = None if host else (1 - finite).float().view(())
        for decay in dict.fromkeys(weight_decay):
            members = [i for i, value in enumerate(weight_decay) if value == decay]
            p_, g_, m_, v_ = ([tensors[i] for i in members] for tensors in (params, scaled, exp_avg, exp_avg_sq))
            torch._fused_adamw_(
                p_, g_, m_, v_, [], [count] * len(members), lr=rate, beta1=beta1, beta2=beta2, weight_decay=decay, eps=eps,
                amsgrad=False, maximize=False, found_inf=skip,
            )
    for copy, new in zip(copies or (), params, strict=False):
        copy.copy_(new if host else torch.where(apply, new, copy.to(new.dtype)))


def _check(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    copies: Sequence[Tensor] | None,
    lr: Tensor,
    step: Tensor,
    scale: Tensor,
    finite: Tensor,
    weight_decay: Sequence[float],
) -> None:
    """Raises gptfast.Error for what a user can get wrong."""
    mutated = {"params": params, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq} | ({} if copies is None else {"copies": copies})
    for label, tensors in (mutated | {"grads": grads}).items():
        if [t.shape for t in tensors] != [p.shape for p in params]:
            raise Error(f"adamw_: {label} do not have the shapes of the {len(params)} params")
    for label, tensors in mutated.items():
        if not all(t.is_contiguous() for t in tensors):
            raise Error(f"adamw_: {label} holds a tensor that is not contiguous; it is updated in place")
    if len(weight_decay) != len(params):
        raise Error(f"adamw_: weight_decay has {len(weight_decay)} numbers for {len(params)} params")
    for label, scalar in {"lr": lr, "step": step, "scale": scale, "finite": finite}.items():
        if scalar.shape != (1,):
            raise Error(f"adamw_: {label} has shape {tuple(scalar.shape)}; needed is a tensor [1]")


if backend.has_schema("adamw_"):

    @torch.library.register_fake("gptfast::adamw_")  # type: ignore[untyped-decorator]
    def _(
        params: Sequence[Tensor], grads: Sequence[Tensor], exp_avg: Sequence[Tensor], exp_avg_sq: Sequence[Tensor],
        copies: Sequence[Tensor] | None, lr: Tensor, step: Tensor, scale: Tensor, finite: Tensor, weight_decay: Sequence[float],
        beta1: float, beta2: float, eps: float,
    ) -> None:
        return None


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    copies: Sequence[Tensor] | None,
    lr: Tensor,
    step: Tensor,
    scale: Tensor,
    finite: Tensor,
    weight_decay: Sequence[float],
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """One AdamW step in place; formula and what is mutated in the module's docstring. Nothing waits for the device.

    `scale` multiplies the gradients (the clip coefficient, 1 / the loss scale). Raises gptfast.Error where the lists do not fit
    together, a tensor to be mutated is not contiguous, or a scalar is not a tensor [1].
    """
    arguments = (params, grads, exp_avg, exp_avg_sq, copies, lr, step, scale, finite, weight_decay)
    with torch.no_grad():
        name = backend.choose("adamw_", params, grads)
        if name != "cpp" or not params or torch.compiler.is_compiling():
            _check(*arguments)
        if not params:
            return
        if name == "eager":
            return eager(*arguments, beta1, beta2, eps)
        dense = [g.contiguous() for g in grads]
        try:
            backend.impl("adamw_", name).forward(params, dense, *arguments[2:], beta1, beta2, eps)
        except RuntimeError:  # the C++ leaf makes the same checks, a hundred tensors in microseconds, before it changes anything
            _check(*arguments)
            raise
