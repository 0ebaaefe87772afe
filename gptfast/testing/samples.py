"""Values and memory layouts of test inputs.

Kernels get tensors from users: transposed, sliced, expanded, starting in the middle of a storage. LAYOUTS names these forms,
`arrange` brings a tensor into one of them. SIZES are the lengths at which kernels go wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "transposed", "sliced", "expanded", "offset")
SIZES = (0, 1, 7, 65)  # nothing, one, odd, one past a power of two


def random(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Normal numbers of standard deviation `scale` around `shift`, rounded to `dtype`. Seeded by the running test's name."""
    return (torch.randn(shape) * scale + shift).to(dtype).to(device)


def arrange(values: Tensor, layout: str) -> Tensor:
    """`values` in another memory layout, detached; equal values, except that 'expanded' repeats the first row.

    contiguous; transposed (last dimension has the largest stride); sliced (every second column of a wider tensor); expanded
    (first dimension has stride 0); offset (contiguous, one element past the storage's alignment).
    """
    values = values.detach()
    if layout == "contiguous":
        return values.contiguous().clone()
    if layout == "transposed":
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        wide = torch.full((*values.shape[:-1], 2 * values.shape[-1]), float("nan"), dtype=values.dtype, device=values.device)
        wide[..., ::2] = values
        return wide[..., ::2]
    if layout == "expanded":
        return values[:1].clone().expand(values.shape)
    if layout == "offset":
        flat = torch.empty(values.numel() + 1, dtype=values.dtype, device=values.device)
        return flat[1:].view(values.shape).copy_(values)
    raise ValueError(f"layout {layout!r}; there are {', '.join(LAYOUTS)}")


def copy_of(value: Any) -> Any:
    """A copy with its own memory and the same strides, offset and requires_grad; lists item by item, other things as they are."""
    if isinstance(value, (list, tuple)):
        return type(value)(copy_of(item) for item in value)
    if not isinstance(value, Tensor):
        return value
    storage = value.untyped_storage().clone()  # type: ignore[no-untyped-call]
    copy = torch.empty(0, dtype=value.dtype, device=value.device).set_(storage, value.storage_offset(), value.shape, value.stride())
    return copy.requires_grad_(value.requires_grad)
