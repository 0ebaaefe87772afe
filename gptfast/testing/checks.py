"""Running a kernel against its definition: a forced backend, poisoned memory, every output and gradient by the tolerance."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import gptfast.backend as backend
from gptfast.testing import session
from gptfast.testing.samples import arrange, copy_of
from gptfast.testing.tolerance import Slices, assert_close_to_reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Target:
    """What a case runs on: a backend, a dtype ('fp32' | 'bf16' | 'fp16'), and the name of the proof that a run of it is."""

    backend: str
    precision: str
    proof: str

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype of the precision."""
        return DTYPES[self.precision]

    @property
    def device(self) -> str:
        """Where the tensors are: the interpreter works on the CPU."""
        return "cpu" if self.proof in ("cpp", "triton-interpret") else "cuda"

    def reason(self, op: str) -> str | None:
        """Why this target cannot run `op` in this process; None if it can."""
        missing = backend.supports(op, self.backend)
        if missing is not None:
            return missing
        if self.device == "cuda":
            return None if torch.cuda.is_available() else "no CUDA device"
        if self.proof == "triton-interpret" and os.environ.get("TRITON_INTERPRET") != "1":
            return "there is a GPU, Triton compiles in this process (TRITON_INTERPRET=1 interprets instead)"
        return None

    def force(self, op: str) -> contextlib.AbstractContextManager[None]:
        """`with target.force("layer_norm")`: the op runs on this backend or raises."""
        return backend.use(**{op: self.backend})

    def __str__(self) -> str:
        return f"{self.proof}-{self.precision}"


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fills what torch.empty returns with NaN (integers: their largest value), so that an element that is never written shows."""
    deterministic: Any = torch.utils.deterministic
    fills = deterministic.fill_uninitialized_memory
    strict, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warns)
        deterministic.fill_uninitialized_memory = fills


@contextlib.contextmanager
def forced_isa(name: str) -> Iterator[None]:
    """The C++ kernels of one instruction set. Skips the test (or fails it, where cpp is required) if this CPU lacks it."""
    session.requires("cpp", backend.EXTENSIONS["_C"])
    from gptfast import _C  # type: ignore[attr-defined]

    info = _C.build_info()
    if name not in info["isas"]:
        import pytest

        pytest.skip(f"this CPU has {', '.join(info['isas'])}, not {name}")
    _C.set_isa(name)
    try:
        yield
    finally:
        _C.set_isa(info["isa"])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit: NaN equals NaN, 0.0 differs from -0.0. Any shapes and dtypes."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    one, other = (t.detach().cpu().contiguous().view(-1) for t in (a, b))
    return a.numel() == 0 or torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def evaluate(
    function: Callable[..., Any],
    inputs: Mapping[str, Any],
    outputs: Sequence[str] = ("y",),
    upstream: Mapping[str, Tensor] | None = None,
    mutates: Collection[str] = (),
) -> dict[str, Tensor]:
    """Runs `function(**inputs)` and, for every input that requires grad, backward from `upstream` (output name -> gradient).

    Returns outputs by name, inputs named in `mutates` as they are afterwards, and gradients as 'd' + the input's name.
    """
    result = function(**inputs)
    values = dict(zip(outputs, result if isinstance(result, tuple) else (result,), strict=True))
    wanted = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.requires_grad}
    found = {name: value.detach() for name, value in values.items()}
    if wanted and upstream is not None:
        roots = {name: value for name, value in values.items() if value.requires_grad}
        grads = torch.autograd.grad(list(roots.values()), list(wanted.values()), [upstream[name] for name in roots])
        found |= {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return found | {name: inputs[name].detach() for name in mutates}


def in_double(value: Any) -> Any:
    """Floating-point tensors in float64 (a copy that requires grad if the original does); everything else as it is."""
    if isinstance(value, (list, tuple)):
        return type(value)(in_double(item) for item in value)
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return copy_of(value)


def check_op(
    op: str,
    front: Callable[..., Any],
    eager: Callable[..., Any],
    inputs: Mapping[str, Any],
    target: Target,
    *,
    outputs: Sequence[str] = ("y",),
    grad_layout: str = "contiguous",
    long_sums: Collection[str] = (),
    slices: Mapping[str, Slices] | None = None,
    mutates: Collection[str] = (),
    poison: bool = True,
) -> dict[str, Tensor]:
    """`front(**inputs)` with `op` forced on `target`, outputs and gradients compared with `eager(**inputs)` by the tolerance.

    inputs: name -> tensor (any layout; gradients are taken for those that require grad), list or other argument; left unchanged.
    outputs: names of what the functions return. grad_layout: layout of the random upstream gradients (samples.LAYOUTS).
    long_sums: names whose values are sums of more than 64 terms. slices: name -> function to named parts, compared apart.
    mutates: inputs that the op writes; their values afterwards are compared too. poison: torch.empty is filled with NaN for the
    kernel. The kernel runs twice and must give the same bits. Returns what the kernel gave, by name ('d' + input for gradients).
    """
    shapes = evaluate(eager, {name: copy_of(value) for name, value in inputs.items()}, outputs)
    floats = [name for name in outputs if shapes[name].is_floating_point()]
    upstream = {name: arrange(torch.randn(shapes[name].shape).to(shapes[name]), grad_layout) for name in floats}
    untouched = {name: copy_of(value) for name, value in inputs.items()}
    runs = []
    for _ in range(2):
        arguments = {name: copy_of(value) if name in mutates else value for name, value in inputs.items()}
        with target.force(op), poisoned() if poison else contextlib.nullcontext():
            runs.append(evaluate(front, arguments, outputs, upstream, mutates))
        _assert_unchanged(op, inputs, untouched)
    fast = runs[0]
    for name, value in fast.items():
        assert same_bits(value, runs[1][name]), f"{op}: {name} differs from run to run"
    own = evaluate(eager, {name: copy_of(value) for name, value in inputs.items()}, outputs, upstream, mutates)
    exact = {name: in_double(value) for name, value in inputs.items()}
    ref = evaluate(eager, exact, outputs, {name: grad.double() for name, grad in upstream.items()}, mutates)
    gradients = {f"d{name}" for name in inputs}
    for name, value in fast.items():
        if value.is_floating_point():
            rule = {"gradient": name in gradients, "long_sum": name in long_sums, "slices": (slices or {}).get(name)}
            assert_close_to_reference(value, own[name], ref[name], name=f"{op} {target} {name}", **rule)  # type: ignore[arg-type]
        else:
            assert torch.equal(value, own[name]), f"{op} {target}: {name} differs from eager"
    session.record(op, target.proof, target.precision, "forward")
    if any(name in gradients for name in fast):
        session.record(op, target.proof, target.precision, "backward")
    return fast


def _assert_unchanged(op: str, inputs: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    for name, value in inputs.items():
        pairs = zip(value, before[name], strict=True) if isinstance(value, (list, tuple)) else [(value, before[name])]
        for now, then in pairs:
            if isinstance(now, Tensor):
                assert same_bits(now, then), f"{op}: the input {name} was changed"
