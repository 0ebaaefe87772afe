"""The Euclidean norm of all gradients together, and whether it is finite, both left on the device.

    norm = sqrt(sum over tensors and elements of g^2),   finite = 1 if norm is neither inf nor NaN, else 0

grads: a list of fp32|bf16|fp16 tensors (eager also fp64) of any shapes on one device, an empty list too; norm, finite [1] fp32
(fp64 where a gradient is). Sums in fp32. No backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import gptfast.backend as backend
from gptfast.ops._common import limit_dtypes

_dtypes = limit_dtypes("grad_norm")


@backend.limits("grad_norm")
def _limits(name: str, inputs: tuple[object, ...], needs_grad: bool) -> str | None:
    grads = inputs[0]
    return _dtypes(name, tuple(grads), needs_grad) if isinstance(grads, list) else None


def eager(grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The definition: PyTorch's vector_norm of each gradient, then of these norms. -> norm [1], finite [1]."""
    wide = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
    norms = [torch.linalg.vector_norm(g, dtype=wide) for g in grads]
    norm = torch.linalg.vector_norm(torch.stack(norms)).view(1) if norms else torch.zeros(1)
    return norm, torch.isfinite(norm).to(wide)


if backend.has_schema("grad_norm"):

    @torch.library.register_fake("gptfast::grad_norm")  # type: ignore[untyped-decorator]
    def _(grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        norm = grads[0].new_empty(1, dtype=torch.float32)
        return norm, torch.empty_like(norm)


def grad_norm(grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(norm [1], finite [1]) of all gradients together; formula in the module's docstring. Nothing waits for the device."""
    with torch.no_grad():
        listed = list(grads)
        name = backend.choose("grad_norm", listed)
        if name == "eager" or not listed:
            return eager(listed)
        norm, finite = backend.impl("grad_norm", name).forward([g.contiguous() for g in listed])
        return norm, finite
