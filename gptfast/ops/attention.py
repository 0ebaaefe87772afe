"""Causal scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762; the log-sum-exp form of arXiv:2205.14135).

    s[i, j] = scale * q[i] . k[j],   lse[i] = log(sum of exp(s[i, j]) over visible j),  p = exp(s - lse),  o[i] = sum_j p[i, j] v[j]

Query i sees key j <= i of the same document. q, k, v [B, T, H, D] of any strides, fp32|bf16|fp16 (eager also fp64); a packed qkv
[B, T, 3, H, D] is three views of it. document_ids [B, T] integers or None; id -1 is padding: such rows give o = 0, lse = -inf and
gradients 0. With dropout, p[i, j] is divided by 1 - dropout_p where word(seed, id=j, position=i, choice=b*H+h, purpose=1) >=
dropout_p * 2^32, else 0. o [B, T, H, D] in q's dtype, lse [B, H, T] fp32 (fp64 for fp64). A non-finite k or v at token j makes the
rows that see it NaN and no other. Backward, with dp[i, j] = do[i] . v[j] (dropped alike) and delta[i] = do[i] . o[i]:

    dv[j] = sum_i p[i, j] do[i],   ds = p (dp - delta),   dq[i] = scale * sum_j ds[i, j] k[j],   dk[j] = scale * sum_i ds[i, j] q[i]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import gptfast.backend as backend
from gptfast import philox
from gptfast.errors import Error
from gptfast.ops import _attend
from gptfast.ops._common import autocast, check_noise, limit_dtypes, on_host, requires_grad, same_dtype

HEAD_SIZES = (32, 40, 64, 80, 96, 128)
_NOISE_ELEMENTS = 2**22  # words drawn at a time: 32 MB each for about ten temporaries

_dtypes = limit_dtypes("attention")


@backend.limits("attention")
def _limits(name: str, inputs: tuple[Any, ...], needs_grad: bool) -> str | None:
    size = inputs[0].shape[-1]
    if size not in HEAD_SIZES:
        return f"head size {size}; kernels take {', '.join(map(str, HEAD_SIZES))}"
    return _dtypes(name, inputs, needs_grad)


def _visible(document_ids: Tensor) -> Tensor:
    """bool [B, 1, T, T]: which query sees which key. Padding sees padding here, so that no row is empty; its output is cleared."""
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    return same & torch.ones(same.shape[-2:], dtype=torch.bool, device=same.device).tril()


def _keep(shape: torch.Size, dropout_p: float, seed: Tensor) -> Tensor:
    """bool [B, H, T, T]: which weights dropout keeps, some heads at a time to bound the memory."""
    batch, length, heads = shape[:3]
    position = torch.arange(length, device=seed.device).view(1, length, 1)
    choice = torch.arange(batch * heads, device=seed.device).view(-1, 1, 1)
    at_once = max(1, _NOISE_ELEMENTS // max(1, length * length))
    parts = [
        philox.row_words(seed, length, position, c, philox.PURPOSE_DROPOUT, seed.device) >= math.ceil(dropout_p * 2.0**32)
        for c in torch.split(choice, at_once)
    ]
    return torch.cat(parts).view(batch, heads, length, length)


def definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    document_ids: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The formula of the module's docstring, step by step: (o [B, T, H, D], lse [B, H, T]); 16-bit inputs are computed in fp32."""
    compute = torch.promote_types(q.dtype, torch.float32)
    qh, kh, vh = (t.transpose(1, 2).to(compute) for t in (q, k, v))
    ids = torch.zeros(q.shape[:2], dtype=torch.int64, device=q.device) if document_ids is None else document_ids
    visible = _visible(ids)
    kh, vh, poison = _attend.confine(kh, vh, visible)
    scores = (qh * scale @ kh.transpose(-1, -2)).masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    p = torch.exp(scores - lse)
    if dropout_p > 0 and seed is not None:
        p = torch.where(_keep(q.shape, dropout_p, seed), p / ((1 - dropout_p) or 1), 0)
    o = p @ vh if poison is None else p @ vh + poison
    padding = (ids < 0)[:, None, :, None]
    return o.masked_fill(padding, 0).transpose(1, 2).to(q.dtype), lse.masked_fill(padding, -torch.inf).squeeze(-1)


def eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    document_ids: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """PyTorch's own scaled_dot_product_attention, with is_causal where there are no documents; with dropout the formula itself,
    as PyTorch's noise is a state. Differentiated by plain autograd. [B, T, H, D] -> [B, T, H, D] in q's dtype."""
    scale = 1 / math.sqrt(max(1, q.shape[-1])) if scale is None else scale
    padding = None
    if document_ids is not None:
        if on_host(document_ids) and bool(((document_ids == document_ids[:, :1]) & (document_ids >= 0)).all()):
            document_ids = None  # one document a row
        else:  # zeros, so that nothing non-finite in the padding meets a zero gradient
            padding = (document_ids < 0)[:, :, None, None]
            q, k, v = (t.masked_fill(padding, 0) for t in (q, k, v))
    if dropout_p > 0:
        return definition(q, k, v, scale, document_ids, dropout_p, seed)[0]
    visible = None if document_ids is None else _visible(document_ids)
    if visible is None and scale <= 0:  # PyTorch's causal kernel masks before it scales: inf, or NaN
        visible = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).tril()
    qh, kh, vh = (t.transpose(1, 2) for t in (q, k, v))
    o = _attend.sdpa(qh, kh, vh, scale, visible, causal=visible is None).transpose(1, 2)
    return o if padding is None else o.masked_fill(padding, 0)


if backend.has_schema("attention"):

    @torch.library.register_fake("gptfast::attention")  # type: ignore[untyped-decorator]
    def _(
        q: Tensor, k: Tensor, v: Tensor, scale: float, document_ids: Tensor | None, dropout_p: float, seed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        batch, length, heads, _ = q.shape
        return q.new_empty(q.shape), q.new_empty((batch, heads, length), dtype=torch.float32)

    @torch.library.register_fake("gptfast::attention_backward")  # type: ignore[untyped-decorator]
    def _(do: Tensor, q: Tensor, *rest: Any) -> Tensor:
        batch, length, heads, size = q.shape
        return q.new_empty((batch, length, 3, heads, size))


def _three(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = tensors if len(tensors) == 3 else tensors[0].unbind(2)
    return q, k, v


class _Fast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, name: str, scale: float, document_ids: Tensor | None, dropout_p: float, seed: Tensor | None, *tensors: Tensor
    ) -> Tensor:
        o, lse = backend.impl("attention", name).forward(*_three(tensors), scale, document_ids, dropout_p, seed)
        ctx.save_for_backward(o, lse, document_ids, seed, *tensors)
        ctx.name, ctx.scale, ctx.dropout_p = name, scale, dropout_p
        return o  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, do: Tensor) -> Any:
        o, lse, document_ids, seed, *tensors = ctx.saved_tensors
        deterministic = torch.are_deterministic_algorithms_enabled()
        dqkv = backend.impl("attention", ctx.name).backward(
            do.contiguous(), *_three(tensors), o, lse, ctx.scale, document_ids, ctx.dropout_p, seed, deterministic
        )
        return None, None, None, None, None, *((dqkv,) if len(tensors) == 1 else dqkv.unbind(2))


def attention(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    scale: float | None = None,
    document_ids: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Causal attention; formula and shapes in the module's docstring.

    q, k, v [B, T, H, D] of any strides, or q alone: the packed qkv [B, T, 3, H, D], whose gradient then is one tensor that nobody
    has to put together. scale None is 1 / sqrt(D); document_ids [B, T] or None; dropout_p in [0, 1] with seed [1] int64. Returns o
    [B, T, H, D] in q's dtype, under autocast in autocast's. Raises gptfast.Error where a shape, dtype or probability does not fit.
    """
    if k is not None and v is not None:
        if q.dim() != 4 or not q.shape == k.shape == v.shape:
            shapes = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
            raise Error(f"attention: q, k, v have shapes {shapes}; needed is one [B, T, H, D]")
        same_dtype("attention", q=q, k=k, v=v)
        tensors = autocast(q, k, v)
    elif k is None and v is None and q.dim() == 5 and q.shape[2] == 3:
        tensors = autocast(q)
    else:
        raise Error(f"attention: q has shape {tuple(q.shape)} without k and v; needed is qkv [B, T, 3, H, D], or all three")
    batch, length = q.shape[:2]
    if document_ids is not None and document_ids.shape != (batch, length):
        raise Error(f"attention: document_ids have shape {tuple(document_ids.shape)}, needed is {(batch, length)}")
    check_noise("attention", dropout_p, seed)
    seed = seed if dropout_p > 0 else None
    scale = 1 / math.sqrt(max(1, q.shape[-1])) if scale is None else scale
    needs_grad = requires_grad(*tensors)
    name = backend.choose("attention", *tensors, needs_grad=needs_grad)
    if name == "eager":
        return eager(*_three(tensors), scale, document_ids, dropout_p, seed)
    dense = tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)
    if needs_grad:
        return _Fast.apply(name, scale, document_ids, dropout_p, seed, *dense)  # type: ignore[no-any-return]
    return backend.impl("attention", name).forward(*_three(dense), scale, document_ids, dropout_p, seed)[0]  # type: ignore[no-any-return]
