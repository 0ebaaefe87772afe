"""Scaled dot-product attention in PyTorch's own layout [B, H, T, D]: the eager half that attention and decode_attention share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast.ops._common import on_host


def confine(k: Tensor, v: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keeps a non-finite token from the rows that do not see it: PyTorch's kernels multiply it by a weight of 0, which gives NaN.

    k, v [B, H, K, D]; visible bool, broadcasts to [B, H, Q, K], or None: the keys up to the query, with Q = K.
    Returns k and v with such tokens zeroed and what to add to the output, [B, H, Q, 1]: NaN for the rows that see one, else 0; None
    where the host can see there is none.
    """
    wide = torch.promote_types(k.dtype, torch.float32)
    # a sum is the cheapest look at all values; where it overflows there is only some work in vain
    if on_host(k) and bool(torch.isfinite(k.detach().sum(dtype=wide) + v.detach().sum(dtype=wide))):
        return k, v, None
    bad = ~(torch.isfinite(k) & torch.isfinite(v)).all(-1, keepdim=True)
    count = bad.cumsum(-2) if visible is None else visible.to(torch.float32) @ bad.to(torch.float32)
    zero = torch.zeros((), dtype=v.dtype, device=v.device)
    return k.masked_fill(bad, 0), v.masked_fill(bad, 0), torch.where(count > 0, torch.nan, zero)


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor | None, causal: bool = False) -> Tensor:
    """F.scaled_dot_product_attention, q [B, H, Q, D] -> o [B, H, Q, D]; visible None is everything, or causal with Q = K."""
    poison = None
    if visible is not None or causal:  # else every query sees every token
        k, v, poison = confine(k, v, visible)
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=causal, scale=scale)
    return o if poison is None else o + poison
