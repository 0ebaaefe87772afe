"""Appends the keys and values of Q new tokens a row to a paged cache, in place.

    k_cache[block_table[b, n div 64], h, n mod 64] = k[b, j, h]   with n = start[b] + j; v alike

k_cache, v_cache [pages, H, 64, D] fp32|bf16 (eager: any float), both mutated; k, v [B, Q, H, D], cast to the cache's dtype;
block_table [B, pages a row] and start [B] int32|int64. Rows have their own starts; no two rows may share a page that is written.
No backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import gptfast.backend as backend
from gptfast.errors import Error
from gptfast.ops._common import check_cache, dense_pages, limit_dtypes, on_host

PAGE = 64

_dtypes = limit_dtypes("cache_append_")


@backend.limits("cache_append_")
def _limits(name: str, inputs: tuple[Any, ...], needs_grad: bool) -> str | None:
    if inputs[0].dtype == torch.float16:
        return "a float16 cache; kernels take float32, bfloat16"
    if not all(dense_pages(cache) for cache in inputs[:2]):
        return "pages that are not contiguous; kernels take [H, 64, D] in one piece"
    return _dtypes(name, inputs, needs_grad)


if backend.has_schema("cache_append_"):

    @torch.library.register_fake("gptfast::cache_append_")  # type: ignore[untyped-decorator]
    def _(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, block_table: Tensor, start: Tensor) -> None:
        return None


def eager(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, block_table: Tensor, start: Tensor) -> None:
    """The definition: one indexed assignment for keys and one for values."""
    place = start.long().unsqueeze(1) + torch.arange(k.shape[1], device=start.device)
    page = block_table.long().gather(1, place // PAGE)
    k_cache[page, :, place % PAGE] = k.to(k_cache.dtype)
    v_cache[page, :, place % PAGE] = v.to(v_cache.dtype)


def cache_append_(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, block_table: Tensor, start: Tensor) -> None:
    """Writes k and v [B, Q, H, D] into the caches at positions start[b] .. start[b] + Q - 1; shapes in the module's docstring.

    Raises gptfast.Error where a shape does not fit and, for tensors on the CPU, where a position is beyond the row's pages or a
    page is not in the cache.
    """
    check_cache("cache_append_", k, k_cache, v_cache, block_table, start=start)
    if v.shape != k.shape:
        raise Error(f"cache_append_: k has shape {tuple(k.shape)}, v {tuple(v.shape)}; needed is one")
    if k.numel() == 0:
        return
    if on_host(start):
        first, last = (int(x) for x in torch.aminmax(start))
        room = PAGE * block_table.shape[1]
        if first < 0 or last + k.shape[1] > room:
            raise Error(f"cache_append_: writes tokens {first} to {last + k.shape[1] - 1}; the pages of a row hold 0 to {room - 1}")
    with torch.no_grad():
        name = backend.choose("cache_append_", k_cache, v_cache, k, v)
        if name == "eager":
            eager(k_cache, v_cache, k, v, block_table, start)
        else:
            arguments = (k.contiguous(), v.contiguous(), block_table.contiguous(), start.contiguous())
            backend.impl("cache_append_", name).forward(k_cache, v_cache, *arguments)
