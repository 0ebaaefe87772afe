"""What the front doors share: rows, autocast, the checks of ids and targets, the dtypes that kernels take. No op lives here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import gptfast.backend as backend
from gptfast.errors import Error
from gptfast.packing import PackedWeight

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Limit = Callable[[str, tuple[Any, ...], bool], str | None]
REDUCTIONS = ("mean", "sum", "none")


def rows(x: Tensor) -> Tensor:
    """x [..., C] of any strides as contiguous [N, C]; a view where it can be one. Size 0 is fine."""
    return (x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)).contiguous()


def requires_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for a gradient of one of them."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The inputs of a product as autocast wants them: fp32 and 16-bit tensors in the autocast dtype, all others as they are."""
    device = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype not in KERNEL_DTYPES else t.to(dtype) for t in tensors)


def check_product(op: str, x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None) -> None:
    """Raises gptfast.Error where x [..., K], weight [M, K] and bias [M] do not fit, or a gradient of a packed weight's product is
    wanted."""
    if len(weight.shape) != 2 or x.dim() == 0 or weight.shape[1] != x.shape[-1]:
        raise Error(f"{op}: weight has shape {tuple(weight.shape)}, x {tuple(x.shape)}; needed are [M, K] and [..., K]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise Error(f"{op}: bias has shape {tuple(bias.shape)}, weight's rows need ({weight.shape[0]},)")
    if isinstance(weight, PackedWeight) and requires_grad(x, bias):
        raise Error(f"{op}: a packed weight has no backward; call it under torch.no_grad() or torch.inference_mode()")


def packed_arguments(weight: Tensor | PackedWeight, dtype: torch.dtype) -> tuple[Tensor, tuple[Any, ...]]:
    """What a leaf gets for a weight: its tensor (a plain one in `dtype`), and what goes behind its arguments for a packed one."""
    if isinstance(weight, PackedWeight):
        return weight.data, (weight.format, weight.outputs)
    return weight.to(dtype), ()


def same_dtype(op: str, **tensors: Tensor | None) -> None:
    """Raises gptfast.Error where two of the named tensors differ in dtype."""
    named = {label: t.dtype for label, t in tensors.items() if t is not None}
    if len(set(named.values())) > 1:
        kinds = ", ".join(f"{label} {str(dtype).removeprefix('torch.')}" for label, dtype in named.items())
        raise Error(f"{op}: the dtypes differ ({kinds}); give all of them in one")


def one_of(op: str, what: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises gptfast.Error where `value` is not one of the allowed words."""
    if value not in allowed:
        raise Error(f"{op}: {what} is {value!r}; allowed: {', '.join(allowed)}")


def on_host(x: Tensor) -> bool:
    """Whether the values of x may be looked at: on a GPU that would wait for the device, and a compiled graph has no values."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def check_ids(op: str, what: str, ids: Tensor, size: int, ignore: int | None = None) -> None:
    """Raises gptfast.Error with the first id outside [0, size), `ignore` excepted. Only on the host; a kernel gives a NaN row."""
    if ids.dtype not in (torch.int64, torch.int32):
        raise Error(f"{op}: {what} has dtype {str(ids.dtype).removeprefix('torch.')}; allowed: int64, int32")
    if not on_host(ids) or ids.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(ids))
    if low >= 0 and high < size:
        return
    wrong = (ids < 0) | (ids >= size)
    if ignore is not None:
        wrong &= ids != ignore
    if bool(wrong.any()):
        raise Error(f"{op}: {what} holds {int(ids[wrong][0])}; allowed: 0 to {size - 1}")


def check_targets(op: str, logits_shape: torch.Size, targets: Tensor, width: int, vocab: int | None, ignore_index: int) -> int:
    """Checks targets [...] against the shape [..., C] they belong to, and vocab against `width` columns; returns the vocabulary."""
    if targets.shape != logits_shape[:-1]:
        raise Error(f"{op}: targets have shape {tuple(targets.shape)}, needed is {tuple(logits_shape[:-1])}")
    size = width if vocab is None else vocab
    if not 0 < size <= width:
        raise Error(f"{op}: vocab is {vocab}; allowed: 1 to {width}, the number of columns")
    check_ids(op, "targets", targets, size, ignore_index)
    return size


def check_scale(op: str, scale: Tensor | None) -> None:
    """Raises gptfast.Error where scale is not a float tensor [1] without gradient."""
    if scale is not None and (scale.numel() != 1 or not scale.is_floating_point() or scale.requires_grad):
        kind = f"{str(scale.dtype).removeprefix('torch.')} of shape {tuple(scale.shape)}, requires_grad {scale.requires_grad}"
        raise Error(f"{op}: scale is {kind}; needed is a float tensor [1] without gradient")


def total_scale(scale: Tensor | None, x: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """The factor [1] of a sum over the rows: scale (None is 1), for the mean divided by the number of targets that count; fp32,
    fp64 for an x of fp64."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    factor = torch.ones(1, dtype=dtype, device=x.device) if scale is None else scale.reshape(1).to(dtype)
    return factor / (targets != ignore_index).sum() if reduction == "mean" else factor


def check_cache(op: str, x: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, **counts: Tensor) -> None:
    """Checks x [B, Q, H, D] against caches [pages, H, 64, D], block_table [B, P] and the named counts [B]; raises gptfast.Error."""
    if x.dim() != 4 or k_cache.shape != v_cache.shape or k_cache.shape[1:] != (x.shape[2], 64, x.shape[3]):
        shapes = f"{tuple(x.shape)}, the caches {tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
        raise Error(f"{op}: the tokens have shape {shapes}; needed are [B, Q, H, D] and twice [pages, H, 64, D]")
    same_dtype(op, k_cache=k_cache, v_cache=v_cache)
    if block_table.dim() != 2 or block_table.shape[0] != x.shape[0]:
        raise Error(f"{op}: block_table has shape {tuple(block_table.shape)}; needed is [{x.shape[0]}, pages a row]")
    check_ids(op, "block_table", block_table, k_cache.shape[0])
    for label, count in counts.items():
        if count.shape != x.shape[:1] or count.dtype not in (torch.int32, torch.int64):
            kind = str(count.dtype).removeprefix("torch.")
            raise Error(f"{op}: {label} is {kind} of shape {tuple(count.shape)}; needed is int32 [{x.shape[0]}]")


def dense_pages(cache: Tensor) -> bool:
    """Whether each page [H, 64, D] of a cache is contiguous, which is what kernels take; pages may be any distance apart."""
    return cache.shape[0] == 0 or cache[0].is_contiguous()


def check_noise(op: str, p: float, seed: Tensor | None) -> None:
    """Raises gptfast.Error where p is no probability, or where it is above 0 and there is no int64 seed [1]."""
    if not 0 <= p <= 1:
        raise Error(f"{op}: the dropout probability is {p}; allowed: 0 to 1")
    if p > 0 and (seed is None or seed.dtype != torch.int64 or seed.numel() != 1):
        got = "None" if seed is None else f"{str(seed.dtype).removeprefix('torch.')} of shape {tuple(seed.shape)}"
        raise Error(f"{op}: the dropout seed is {got}; needed is an int64 tensor [1]")


def multiply_(gradient: Tensor, upstream: Tensor) -> Tensor:
    """gradient(a!) *= upstream, for gradients computed before the upstream gradient was known; nothing to do where it is 1."""
    if upstream.dim() == 0 and on_host(upstream) and upstream.item() == 1:
        return gradient
    return gradient.mul_(upstream if upstream.dim() == 0 else upstream.unsqueeze(-1))


def limit_dtypes(op: str) -> Limit:
    """Registers the limit every kernel of `op` has, the dtypes fp32, bf16 and fp16, and returns it, to be built on."""

    def limit(name: str, inputs: tuple[Any, ...], needs_grad: bool) -> str | None:
        for x in inputs:
            if isinstance(x, PackedWeight) and name != "cpp":
                return "packed weights; only cpp and eager take them"
            if isinstance(x, Tensor) and x.is_floating_point() and x.dtype not in KERNEL_DTYPES:
                return f"{str(x.dtype).removeprefix('torch.')}; kernels take float32, bfloat16, float16"
        return None

    return backend.limits(op)(limit)


def limit_decode(op: str) -> Limit:
    """Registers the limits of a fused decode step: the kernels' dtypes, no gradients, 1 to 32 rows."""
    dtypes = limit_dtypes(op)

    def limit(name: str, inputs: tuple[Any, ...], needs_grad: bool) -> str | None:
        count = inputs[0].shape[:-1].numel()
        if needs_grad:
            return "it has no backward"
        return f"{count} rows; kernels take 1 to 32" if not 1 <= count <= 32 else dtypes(name, inputs, needs_grad)

    return backend.limits(op)(limit)
