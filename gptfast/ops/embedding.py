"""Token and position embedding: y[b, t] = wte[ids[b, t]] + wpe[positions[b, t]].

ids, positions [B, T] int64|int32; wte [V, C], wpe [P, C] in one dtype, fp32|bf16|fp16 (eager also fp64); y [B, T, C] in it.
Backward: row v of dwte is the sum of dy over the places where ids is v, summed in fp32 in the order of the rows; dwpe alike.
In a kernel an id outside its table gives a NaN row and no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

import gptfast.backend as backend
from gptfast.errors import Error
from gptfast.ops._common import check_ids, limit_dtypes, requires_grad, same_dtype

limit_dtypes("embedding")


def eager(ids: Tensor, positions: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
    """The definition: two of PyTorch's own embeddings and their sum, differentiated by plain autograd. -> [..., C]."""
    return F.embedding(ids, wte) + F.embedding(positions, wpe)


if backend.has_schema("embedding"):

    @torch.library.register_fake("gptfast::embedding")  # type: ignore[untyped-decorator]
    def _(ids: Tensor, positions: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
        return wte.new_empty(*ids.shape, wte.shape[1])

    @torch.library.register_fake("gptfast::embedding_backward")  # type: ignore[untyped-decorator]
    def _(dy: Tensor, ids: Tensor, positions: Tensor, vocab: int, context: int) -> tuple[Tensor, Tensor]:
        columns = dy.shape[2]
        return dy.new_empty(vocab, columns, dtype=torch.float32), dy.new_empty(context, columns, dtype=torch.float32)


class _Fast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, ids: Tensor, positions: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
        ctx.save_for_backward(ids, positions)
        ctx.name, ctx.sizes, ctx.dtype = name, (wte.shape[0], wpe.shape[0]), wte.dtype
        return backend.impl("embedding", name).forward(ids, positions, wte, wpe)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> Any:
        dwte, dwpe = backend.impl("embedding", ctx.name).backward(dy.contiguous(), *ctx.saved_tensors, *ctx.sizes)
        return None, None, None, dwte.to(ctx.dtype), dwpe.to(ctx.dtype)


def embedding(ids: Tensor, positions: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
    """wte[ids] + wpe[positions]; shapes in the module's docstring.

    ids [...]; positions of the same shape or one that expands to it (a row [T] serves every batch row); returns [..., C].
    Raises gptfast.Error where shapes or dtypes do not fit and, for tensors on the CPU, where an id is outside its table.
    """
    if wte.dim() != 2 or wpe.dim() != 2 or wte.shape[1] != wpe.shape[1]:
        raise Error(f"embedding: the tables have shapes {tuple(wte.shape)} and {tuple(wpe.shape)}; needed are [V, C] and [P, C]")
    same_dtype("embedding", wte=wte, wpe=wpe)
    check_ids("embedding", "ids", ids, wte.shape[0])
    check_ids("embedding", "positions", positions, wpe.shape[0])
    if positions.shape != ids.shape:
        try:
            positions = positions.expand(ids.shape)
        except RuntimeError:
            raise Error(f"embedding: positions have shape {tuple(positions.shape)}, ids {tuple(ids.shape)}") from None
    needs_grad = requires_grad(wte, wpe)
    name = backend.choose("embedding", wte, wpe, needs_grad=needs_grad)
    if name == "eager":
        return eager(ids, positions, wte, wpe)
    grid = [t.flatten(0, -2) if t.dim() > 1 else t.reshape(1, -1) for t in (ids, positions)]
    arguments = (grid[0].contiguous(), grid[1].contiguous(), wte.contiguous(), wpe.contiguous())
    y = _Fast.apply(name, *arguments) if needs_grad else backend.impl("embedding", name).forward(*arguments)
    return y.view(*ids.shape, wte.shape[1])  # type: ignore[no-any-return]
