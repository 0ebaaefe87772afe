"""Builds .cu files for the shim and runs their launchers on CPU tensors: `build("layer_norm.cu")` returns the loaded library.

A library is cached under build/shim by the hash of everything that went into it. `replace` plants a mutant: pieces of csrc/cuda
that are exchanged before compiling. `orders()` yields the three thread orders that every case runs under. An `Emulated` target
lets gptfast.testing.check_op prove such a kernel behind the op's front door, autograd included.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import gptfast.backend as backend
from gptfast.testing import Target, same_bits

SHIM = Path(__file__).parent
ROOT = SHIM.parent.parent
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fno-strict-aliasing", "-fno-gnu-unique"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
MACHINE = ("shim.cpp", "memory.cpp")
# every access of a kernel calls shim.cpp, which knows the buffers; so no sanitizer library is linked
CHECKS = ["-fsanitize=kernel-address,alignment,bounds"]
CHECKS += [f"--param={x}=0" for x in ("asan-instrumentation-with-call-threshold", "asan-stack", "asan-globals")]
GUARD = 64  # elements on either side of a buffer that a kernel must leave alone
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
Replacement = tuple[str, str, str]  # file in csrc/cuda, old, new


class Array(ctypes.Structure):
    """gptfast::cuda::Array."""

    _fields_ = [("data", ctypes.c_void_p), ("type", ctypes.c_int32)]


def array(tensor: Tensor | None) -> Array:
    return Array(None, 0) if tensor is None else Array(tensor.data_ptr(), TYPES[tensor.dtype])


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


class Buffers:
    """Global memory of one launch: NaN-filled outputs and copies of inputs, each between NaN guards.

    Kernels may touch nothing else. A buffer asked for with `aligned=False` starts `offset` elements past a multiple of 64 bytes.
    Use it in a `with`.
    """

    def __init__(self, library: ctypes.CDLL, offset: int = 0) -> None:
        self.library, self.offset = library, offset
        self.parts: list[tuple[Tensor, int, int]] = []

    def __enter__(self) -> Buffers:
        return self

    def __exit__(self, *exception: object) -> None:
        self.library.shim_allow(None, ctypes.c_uint64(0), 0)
        for whole, start, end in self.parts:
            assert whole[:start].isnan().all() and whole[end:].isnan().all(), "something was written outside the buffers"

    def output(self, shape: Sequence[int], dtype: torch.dtype, aligned: bool = True, writable: bool = True) -> Tensor:
        size, start = torch.Size(shape).numel(), GUARD + (0 if aligned else self.offset)
        whole = torch.full((start + size + GUARD,), torch.nan, dtype=dtype)
        self.parts.append((whole, start, start + size))
        return self.allow(whole[start : start + size].view(*shape), writable)

    def allow(self, tensor: Tensor, writable: bool) -> Tensor:
        """Lets the kernels touch a contiguous tensor from elsewhere."""
        self.library.shim_allow(pointer(tensor), ctypes.c_uint64(tensor.numel() * tensor.itemsize), int(writable))
        return tensor

    def input(self, tensor: Tensor, aligned: bool = True) -> Tensor:
        return self.output(tensor.shape, tensor.dtype, aligned, writable=False).copy_(tensor.detach())


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


def missing() -> str | None:
    """Why the shim cannot be built or run here; None if it can."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return f"the shim runs on Linux x86-64, this is {sys.platform} {platform.machine()}"
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "probe.cpp"), Path(folder, "probe.so")
        source.write_text('extern "C" int probe(int n) { return n; }\n')
        try:
            for arguments in ([*CHECKS, "-c", "-o", f"{folder}/probe.o"], ["-shared", "-o", str(library)]):
                subprocess.run([*compiler(), *FLAGS, str(source), *arguments], check=True, capture_output=True)
            return None if ctypes.CDLL(str(library)).probe(3) == 3 else f"{compiler()[0]} makes code that does not run"
        except (OSError, subprocess.CalledProcessError):
            return f"no C++ compiler that builds the shim ({compiler()[0]})"


def _sources(source: Path, replace: Sequence[Replacement]) -> dict[str, str]:
    """Everything the library is made of: path relative to the source tree -> text, mutants planted."""
    folders = (ROOT / "csrc", ROOT / "csrc/cuda", SHIM)
    headers = [path for folder in folders for path in folder.iterdir() if path.suffix in (".h", ".cuh")]
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in (*headers, *(SHIM / name for name in MACHINE), source)}
    for name, old, new in replace:
        places = [key for key in texts if Path(key).name == name]
        if len(places) != 1 or texts[places[0]].count(old) != 1:
            raise ValueError(f"a mutant replaces {old!r} in {name}, which is not there exactly once")
        texts[places[0]] = texts[places[0]].replace(old, new)
    return texts


def _run(command: Sequence[str], part: Path, target: Path) -> Path:
    """Runs a compiler that writes `part`, then gives it its final name: a file that is there is complete."""
    done = subprocess.run([*compiler(), *command, "-o", str(part)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(done.args)}\n{done.stderr}")
    return part.replace(target)


def build(name: str, replace: Sequence[Replacement] = (), folder: Path = ROOT / "csrc/cuda") -> ctypes.CDLL:
    """The library of folder/name (.cu) and the shim, from the cache or compiled. Raises RuntimeError with the compiler's words."""
    texts = _sources(folder / name, replace)
    machine = {key: text for key, text in texts.items() if Path(key).name in (*MACHINE, "memory.h", "cuda_runtime.h", "ptx.cuh")}
    cache = ROOT / "build/shim"
    library = cache / f"{Path(name).stem}-{_digest(texts)}.so"
    objects = {source: cache / f"{Path(source).stem}-{_digest(machine)}.o" for source in MACHINE}
    if library.exists():
        return ctypes.CDLL(str(library))
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        tree = Path(temporary)
        for path, text in texts.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_text(text)
        compile_flags = [*FLAGS, f"-I{tree / 'tests/shim'}", f"-I{tree / 'csrc'}", "-c"]
        for source, target in objects.items():
            if not target.exists():
                _run([*compile_flags, "-O2", str(tree / "tests/shim" / source)], tree / target.name, target)
        kernels = str(tree / (folder / name).relative_to(ROOT))
        part = _run([*compile_flags, *CHECKS, "-x", "c++", kernels], tree / "part.o", tree / "kernels.o")
        _run(["-shared", str(part), *map(str, objects.values())], tree / library.name, library)
    return ctypes.CDLL(str(library))


@functools.cache
def _compiler_version() -> str:
    return subprocess.run([*compiler(), "--version"], check=True, capture_output=True, text=True).stdout


def _digest(texts: dict[str, str]) -> str:
    return hashlib.sha256(repr((sorted(texts.items()), _compiler_version(), compiler(), FLAGS, CHECKS)).encode()).hexdigest()[:16]


def orders(library: ctypes.CDLL, seed: int = 1) -> Iterator[str]:
    """Sets and names the three orders in which threads and blocks run."""
    for kind, name in enumerate(("forward", "reverse", f"random, seed {seed}")):
        library.shim_set_order(kind, ctypes.c_uint64(seed))
        yield name


def in_all_orders(library: ctypes.CDLL, run: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """run() under the three orders: its results, which must be the same bits each time."""
    results = {name: run() for name in orders(library)}
    first = results["forward"]
    for name, result in results.items():
        assert all(same_bits(a, b) for a, b in zip(first, result, strict=True)), f"order {name} gives other bits than forward"
    return first


def succeeded(error: bytes | None) -> None:
    assert error is None, f"launch failed: {(error or b'').decode()}"


@dataclass(frozen=True)
class Emulated(Target):
    """The target 'cuda-emulated': `leaf` takes CPU tensors in schema order and runs the CUDA kernels under the shim."""

    leaf: backend.Leaf | None = None

    @property
    def device(self) -> str:
        return "cpu"

    @contextmanager
    def force(self, op: str) -> Iterator[Any]:
        """The front door's C++ backend is the shim for so long."""
        missing, impls = {(op, "cpp"): None}, {(op, "cpp"): self.leaf}
        with mock.patch.dict(backend._missing, missing), mock.patch.dict(backend._impls, impls), backend.use(**{op: "cpp"}):
            yield
