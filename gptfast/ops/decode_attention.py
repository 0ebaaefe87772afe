"""Attention of Q new tokens a row over a paged cache of keys and values.

    o[b, j] = sum over keys n < lengths[b] - Q + j + 1 of softmax(scale * q[b, j] . k[n]) v[n]

q [B, Q, H, D] fp32|bf16|fp16 (eager also fp64); k_cache, v_cache [pages, H, 64, D] fp32|bf16 (eager: any float), key n of row b in
page block_table[b, n div 64], slot n mod 64; block_table [B, pages a row], lengths [B] int32|int64, counted after the append of
the Q tokens. o [B, Q, H, D] in q's dtype; 0 for a query that sees no key. What lies in the cache beyond a row's length is never
read into the result, and a non-finite token reaches only the queries that see it. Any Q: 1 to 8 decode and verify, more is chunked
prefill. No backward.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import gptfast.backend as backend
from gptfast.errors import Error
from gptfast.ops import _attend
from gptfast.ops._common import autocast, check_cache, dense_pages, limit_dtypes, on_host, requires_grad

PAGE = 64

_dtypes = limit_dtypes("decode_attention")


@backend.limits("decode_attention")
def _limits(name: str, inputs: tuple[Any, ...], needs_grad: bool) -> str | None:
    if needs_grad:
        return "it has no backward"
    if any(cache.dtype == torch.float16 for cache in inputs[1:3]):
        return "a float16 cache; kernels take float32, bfloat16"
    if not all(dense_pages(cache) for cache in inputs[1:3]):
        return "pages that are not contiguous; kernels take [H, 64, D] in one piece"
    return _dtypes(name, inputs, needs_grad)


if backend.has_schema("decode_attention"):

    @torch.library.register_fake("gptfast::decode_attention")  # type: ignore[untyped-decorator]
    def _(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, lengths: Tensor, scale: float) -> Tensor:
        return torch.empty_like(q)


def _gather(cache: Tensor, table: Tensor) -> Tensor:
    """The rows' pages side by side: [pages, H, 64, D] and [B, P] -> [B, H, 64 P, D]."""
    pages = cache.transpose(0, 1)[:, table]  # heads in front: one copy, and the rest are views
    return pages.reshape(cache.shape[1], table.shape[0], -1, cache.shape[3]).transpose(0, 1)


def eager(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, lengths: Tensor, scale: float | None = None) -> Tensor:
    """The definition: gathers the pages and calls PyTorch's scaled_dot_product_attention. [B, Q, H, D] -> [B, Q, H, D]."""
    scale = 1 / math.sqrt(max(1, q.shape[-1])) if scale is None else scale
    new, table, keys = q.shape[1], block_table.long(), PAGE * block_table.shape[1]
    shortest = -1
    if on_host(lengths):  # then only the pages in use are gathered, and single queries of one length need no mask
        shortest, keys = (int(n) for n in torch.aminmax(lengths))
        table = table[:, : (keys + PAGE - 1) // PAGE]
    k, v = (_gather(cache, table)[:, :, :keys].to(q.dtype) for cache in (k_cache, v_cache))
    qh = q.transpose(1, 2)
    if new == 1 and shortest == keys:
        return _attend.sdpa(qh, k, v, scale, None).transpose(1, 2)
    ends = (lengths.view(-1, 1) - new + 1 + torch.arange(new, device=q.device))[:, None, :, None]
    place = torch.arange(keys, device=q.device)
    # a query without keys is given key 0, whatever it holds, so that no softmax is empty; then its row is cleared
    o = _attend.sdpa(qh, k, v, scale, place < ends.clamp(min=1))
    return o.masked_fill(ends < 1, 0).transpose(1, 2)


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, lengths: Tensor, scale: float | None = None
) -> Tensor:
    """Attention over a paged cache; formula and shapes in the module's docstring.

    scale None is 1 / sqrt(D). Returns o [B, Q, H, D] in q's dtype, under autocast in autocast's; the caches keep their dtype.
    Raises gptfast.Error where a shape does not fit and, for tensors on the CPU, where a length is beyond the row's pages or a page
    is not in the cache.
    """
    check_cache("decode_attention", q, k_cache, v_cache, block_table, lengths=lengths)
    if q.numel() == 0:
        return torch.empty_like(q)
    if on_host(lengths):
        low, high = (int(x) for x in torch.aminmax(lengths))
        room = PAGE * block_table.shape[1]
        if low < 0 or high > room:
            raise Error(f"decode_attention: lengths hold {high if high > room else low}; allowed: 0 to {room}, the row's pages")
    (q,) = autocast(q)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    name = backend.choose("decode_attention", q, k_cache, v_cache, needs_grad=requires_grad(q, k_cache, v_cache))
    if name == "eager":
        return eager(q, k_cache, v_cache, block_table, lengths, scale)
    arguments = (block_table.contiguous(), lengths.contiguous(), scale)
    return backend.impl("decode_attention", name).forward(q.contiguous(), k_cache, v_cache, *arguments)  # type: ignore[no-any-return]
