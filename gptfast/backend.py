"""Which implementation of an op runs, and why: the only place that asks about devices, builds and optional packages.

Four backends: `eager` (PyTorch, always there), `cpp` (C++ on the CPU), `cuda` (CUDA C++), `triton`. The order of preference is
the table ORDER; an exception to it goes into PREFER with the benchmark line that earned it. What a user asks for (GPTFAST_BACKEND,
`with gptfast.backend(...)`) lives in one threading.local: torch.compile guards on its attributes, and traces neither a ContextVar
nor a change of os.environ. A new thread starts with what the environment asked for.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gptfast import _environment, kernels
from gptfast._environment import BACKENDS, OPS, check_backend, check_op
from gptfast.errors import Error

ORDER: dict[str, tuple[str, ...]] = {"cpu": ("cpp", "eager"), "cuda": ("cuda", "triton", "eager")}
PREFER: dict[tuple[str, str], tuple[str, ...]] = {}  # (op, device type) -> order, beside it the bench/results row that earned it
DEVICE = {"cpp": "cpu", "cuda": "cuda", "triton": "cuda"}

Limits = Callable[[str, tuple[Any, ...], bool], str | None]
_limits: dict[str, Limits] = {}


_ENVIRONMENT = _environment.check()


class _Request(threading.local):
    """What this thread asks for: one backend for every op that has it, and backends forced for single ops."""

    asked: str | None
    forced: dict[str, str]

    def __init__(self) -> None:
        self.asked, self.forced = _ENVIRONMENT


_request = _Request()


@contextlib.contextmanager
def use(asked: str | None = None, **forced: str) -> Iterator[None]:
    """`with gptfast.backend("triton")` asks for a backend wherever an op has it; `gptfast.backend(attention="cuda")` forces one op.

    Nests, is undone on exceptions, and holds for the calling thread. A forced backend that cannot run raises gptfast.Error with
    the reason when the op is called; an unknown name raises here.
    """
    if asked is not None:
        check_backend(asked)
    for op, name in forced.items():
        check_op(op)
        check_backend(name)
    before = _request.asked, _request.forced
    _request.asked = asked if asked is not None else before[0]
    _request.forced = {**before[1], **forced}
    try:
        yield
    finally:
        _request.asked, _request.forced = before


def limits(op: str) -> Callable[[Limits], Limits]:
    """Decorator in ops/<op>.py: `f(backend, inputs, needs_grad) -> None | reason`, for what a kernel cannot take (dtype, size)."""

    def register(function: Limits) -> Limits:
        _limits[check_op(op)] = function
        return function

    return register


# ---------------------------------------------------------------------------------------------------------------- what is there


def build_record() -> dict[str, Any]:
    """What setup.py wrote beside the extension: torch version, instruction sets, architectures, compiler. Empty if it never ran."""
    path = Path(__file__).parent / "_build.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _load_extension(name: str) -> str | None:
    """Imports gptfast.<name>; returns None, or why it is not there. The version is compared before the file is opened, so that
    another torch is a reason and not an undefined symbol."""
    record = build_record()
    if name not in record.get("extensions", {}):
        return "not built" + (f": {record['skipped'][name]}" if name in record.get("skipped", {}) else "")
    if record["torch"] != torch.__version__:
        return f"built for torch {record['torch']}, running {torch.__version__}"
    try:
        extension = importlib.import_module(f"gptfast.{name}")
    except ImportError as error:
        return f"cannot be loaded: {error}".replace("\n", " ")
    isa = os.environ.get("GPTFAST_CPU_ISA")
    if name == "_C" and isa:
        try:
            extension.set_isa(isa)
        except ValueError as error:
            raise Error(f"GPTFAST_CPU_ISA: {error}") from None
    return None


EXTENSIONS: dict[str, str | None] = {"_C": _load_extension("_C")}
# the CUDA registrations attach to the schemas that _C defines
EXTENSIONS["_C_cuda"] = _load_extension("_C_cuda") if EXTENSIONS["_C"] is None else f"needs _C, which is {EXTENSIONS['_C']}"


def has_schema(op: str) -> bool:
    """Whether the extension that is loaded defines the op: then ops/<op>.py registers its fake kernels."""
    return bool(torch._C._dispatch_has_kernel(f"gptfast::{op}"))


def _missing_reason(op: str, name: str) -> str | None:
    if name == "eager":
        return None
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        return None if importlib.util.find_spec(f"gptfast.kernels.{op}") else "no kernel yet"
    extension = {"cpp": "_C", "cuda": "_C_cuda"}[name]
    if EXTENSIONS[extension] is not None:
        return EXTENSIONS[extension]
    key = {"cpp": "CPU", "cuda": "CUDA"}[name]
    # without a schema the second question would raise
    there = has_schema(op) and torch._C._dispatch_has_kernel_for_dispatch_key(f"gptfast::{op}", key)
    return None if there else "no kernel yet"


_missing = {(op, name): _missing_reason(op, name) for op in OPS for name in BACKENDS}


class Leaf(NamedTuple):
    """The resolved dispatcher entries of one op; `backward` is None for ops that have none."""

    forward: Any
    backward: Any


_impls: dict[tuple[str, str], Leaf] = {}


def _import_kernels(op: str) -> bool:
    importlib.import_module(f"gptfast.kernels.{op}")
    return True


# What torch.compiler.assume_constant_result does, without its import of torch._dynamo: torch.compile cannot trace an import, so it
# calls this function while it traces
_import_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]


def impl(op: str, name: str) -> Any:
    """The implementation itself: an object with `forward` and, where the op has one, `backward`, arguments in schema order."""
    if name == "triton":
        if not hasattr(kernels, op):
            _import_kernels(op)
        return getattr(kernels, op)
    key = op, name
    if key not in _impls:
        space = torch.ops.gptfast
        backward = getattr(space, f"{op}_backward").default if hasattr(space, f"{op}_backward") else None
        _impls[key] = Leaf(getattr(space, op).default, backward)
    return _impls[key]


def step_memory(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """What a training step enters so that its large tensors come from memory that is kept for the next step: on a CPU with the C++
    extension. CUDA's allocator keeps memory anyway."""
    if device.type != "cpu" or EXTENSIONS["_C"] is not None:
        return contextlib.nullcontext()
    extension: Any = importlib.import_module("gptfast._C")
    memory: contextlib.AbstractContextManager[Any] = extension.StepMemory()
    return memory


# ------------------------------------------------------------------------------------------------------------------- the choice


def _device_type(inputs: tuple[Any, ...]) -> str:
    for value in inputs:
        if isinstance(value, torch.Tensor):
            return value.device.type
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
            return value[0].device.type
    return "cpu"


def supports(op: str, name: str, inputs: tuple[Any, ...] = (), needs_grad: bool = False) -> str | None:
    """None if backend `name` can run `op` on these inputs, else the reason. Pure and cheap. Without inputs: whether it is there."""
    missing = _missing[op, name]
    if missing is not None or name == "eager" or not inputs:
        return missing
    device = _device_type(inputs)
    interpreted = name == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if device != DEVICE[name] and not interpreted:
        hint = "; TRITON_INTERPRET=1 interprets it there" if name == "triton" and device == "cpu" else ""
        return f"the tensors are on {device}, {name} runs on {DEVICE[name]}{hint}"
    return _limits[op](name, inputs, needs_grad) if op in _limits else None


def forced() -> dict[str, str]:
    """The backend that is forced here for single ops, {op: backend}."""
    return dict(_request.forced)


def order(op: str, device: str) -> tuple[str, ...]:
    """Backends in the order they are tried for `op` on a device type, with what this thread asked for in front."""
    table = PREFER.get((op, device), ORDER.get(device, ("eager",)))
    asked = _request.asked
    return (asked, *table) if asked is not None and DEVICE.get(asked, device) == device else table


def choose(op: str, *inputs: Any, needs_grad: bool = False) -> str:
    """The backend that runs `op` on these inputs. A forced one that cannot run raises gptfast.Error with the reason."""
    forced = _request.forced.get(op)
    if forced is not None:
        reason = supports(op, forced, inputs, needs_grad)
        if reason is not None:
            raise Error(f"{op}: backend {forced} was forced and cannot run: {reason}")
        return forced
    for name in order(op, _device_type(inputs)):
        if supports(op, name, inputs, needs_grad) is None:
            return name
    return "eager"


# ------------------------------------------------------------------------------------------------------------------ what to show


def table(device: str | None = None) -> list[dict[str, Any]]:
    """One row an op: {"op", "choice", backend: None | reason ...} for a device type (default: cuda if there is one, else cpu)."""
    has_cuda = torch.cuda.is_available()
    device = device or ("cuda" if has_cuda else "cpu")
    rows = []
    for op in OPS:
        reasons: dict[str, str | None] = {}
        for name in BACKENDS:
            reason = _missing[op, name]
            if reason is None and DEVICE.get(name) == "cuda" and not has_cuda:
                reason = "no CUDA device"
            reasons[name] = reason
        forced = _request.forced.get(op)
        usable = [n for n in order(op, device) if reasons[n] is None and DEVICE.get(n, device) == device]
        rows.append({"op": op, "choice": forced or (usable or ["eager"])[0], **reasons})
    return rows


def summary(device: str | None = None) -> str:
    """One line for the start of a run: which backend each op takes, e.g. 'cpp: layer_norm; eager: the other 17 ops'."""
    by_name: dict[str, list[str]] = {}
    for row in table(device):
        by_name.setdefault(row["choice"], []).append(row["op"])
    largest = max(by_name, key=lambda name: len(by_name[name]))
    parts = [f"{name}: {' '.join(ops)}" for name, ops in by_name.items() if name != largest]
    rest = f"{largest}: {'the other' if parts else 'all'} {len(by_name[largest])} ops"
    return "; ".join([*parts, rest])


def explain(device: str | None = None) -> str:
    """The table of ops x backends as text: `->` marks the choice, other cells hold `yes` or the reason why not."""
    rows = table(device)
    cells = [["op", *BACKENDS]]
    for row in rows:
        marks = [("-> " if row["choice"] == name else "") + (row[name] or "yes") for name in BACKENDS]
        cells.append([row["op"], *marks])
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells)


class _CallableModule(types.ModuleType):
    """Makes `gptfast.backend(...)` the context manager while `gptfast.backend.choose` stays a function of this module."""

    def __call__(self, asked: str | None = None, **forced: str) -> contextlib.AbstractContextManager[None]:
        return use(asked, **forced)


sys.modules[__name__].__class__ = _CallableModule
