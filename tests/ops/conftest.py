"""Fixtures of the tests of an op's definition and of its glue; the kernels themselves are proven by gptfast.testing's rule.

A fast backend that no machine has yet would leave an op's autograd glue unexecuted. So each test file writes the formula of the
op's docstring down as a leaf, in schema order, and `formula` registers it as the C++ backend: what the front door then returns,
gradients included, is compared with the eager definition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

import gptfast.backend as backend


@pytest.fixture
def eager() -> Iterator[None]:
    """Every op on its eager definition, whatever the environment asks for."""
    with backend.use("eager"):
        yield


@pytest.fixture
def formula(monkeypatch: pytest.MonkeyPatch) -> Callable[..., AbstractContextManager[None]]:
    """formula(op, forward, backward=None): a context in which `op` runs on these functions, in every dtype."""

    def install(op: str, forward: Any, backward: Any = None) -> AbstractContextManager[None]:
        monkeypatch.setitem(backend._missing, (op, "cpp"), None)
        impl, leaf = backend.impl, backend.Leaf(forward, backward)
        monkeypatch.setattr(backend, "impl", lambda o, name: leaf if (o, name) == (op, "cpp") else impl(o, name))
        monkeypatch.delitem(backend._limits, op, raising=False)
        return backend.use(**{op: "cpp"})

    return install


def _run(function: Any, inputs: Sequence[Any], wanted: Sequence[bool], upstream: str) -> list[Tensor | None]:
    leaves = [x.detach().clone().requires_grad_(w) if isinstance(x, Tensor) and x.is_floating_point() else x
              for x, w in zip(inputs, wanted, strict=True)]
    outputs = function(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    generator = torch.Generator().manual_seed(7)
    pulls = []
    for y in outputs:
        pull = torch.randn(y.shape, dtype=y.dtype, generator=generator)
        if upstream == "expanded":
            pull = torch.randn((), dtype=y.dtype, generator=generator).expand(y.shape)
        elif upstream == "transposed" and y.dim() > 1:
            pull = pull.transpose(0, -1).contiguous().transpose(0, -1)
        pulls.append(pull)
    leaf_inputs = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    grads = torch.autograd.grad(outputs, leaf_inputs, pulls) if leaf_inputs else ()
    return [*outputs, *grads]


@pytest.fixture
def same() -> Callable[..., None]:
    """same(a, b, inputs, wanted=None, upstream="dense"): a(*inputs) and b(*inputs) agree in outputs and in the gradients of the
    float inputs that `wanted` marks, to 1e-11 in float64; upstream gradients are random: dense, transposed or expanded (stride 0).
    """

    def check(a: Any, b: Any, inputs: Sequence[Any], wanted: Sequence[bool] | None = None, upstream: str = "dense") -> None:
        marks = [isinstance(x, Tensor) and x.is_floating_point() for x in inputs] if wanted is None else wanted
        results = [_run(f, inputs, marks, upstream) for f in (a, b)]
        for got, needed in zip(*results, strict=True):
            torch.testing.assert_close(got, needed, rtol=1e-11, atol=1e-11)

    return check


@pytest.fixture
def compiled(eager: None) -> Iterator[Callable[[Any], Any]]:
    """compiled(f): f under torch.compile(fullgraph=True), traced through autograd too; code generation is PyTorch's matter."""
    torch._dynamo.reset()
    yield lambda function: torch.compile(function, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
