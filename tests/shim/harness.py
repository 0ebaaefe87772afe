"""Builds .cu files for the shim and runs their launchers on CPU tensors: `build("layer_norm.cu")` returns the loaded library.

A library is cached under build/shim by the hash of everything that went into it. `replace` plants a mutant: pieces of csrc/cuda that
are exchanged before compiling. `orders()` yields the three thread orders that every case runs under.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

SHIM = Path(__file__).parent
ROOT = SHIM.parent.parent
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fno-strict-aliasing", "-fno-gnu-unique", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
GUARD = 64  # elements on either side of a buffer that a kernel must leave alone
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
Replacement = tuple[str, str, str]  # file in csrc/cuda, old, new


class Array(ctypes.Structure):
    """gptfast::cuda::Array."""

    _fields_ = [("data", ctypes.c_void_p), ("type", ctypes.c_int32)]


def array(tensor: torch.Tensor | None) -> Array:
    return Array(None, 0) if tensor is None else Array(tensor.data_ptr(), TYPES[tensor.dtype])


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


class Buffer:
    """A NaN-filled output with NaN guards around it. `offset` shifts it by elements from a 64-byte boundary."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, offset: int = 0) -> None:
        size = torch.Size(shape).numel()
        self.whole = torch.full((size + 2 * GUARD + offset,), torch.nan, dtype=dtype)
        self.start = GUARD + offset
        self.tensor = self.whole[self.start : self.start + size].view(*shape)

    def guards_untouched(self) -> bool:
        end = self.start + self.tensor.numel()
        return bool(self.whole[: self.start].isnan().all() and self.whole[end:].isnan().all())


def guarded(tensor: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """A contiguous copy between NaN guards: a kernel that reads past the end computes NaN."""
    buffer = Buffer(tensor.shape, tensor.dtype, offset)
    return buffer.tensor.copy_(tensor)


def compiler() -> list[str] | None:
    """The C++ compiler, or None if there is none."""
    command = shlex.split(os.environ.get("CXX", "g++"))
    return command if shutil.which(command[0]) else None


def _sources(source: Path, replace: Sequence[Replacement]) -> dict[str, str]:
    """Everything the library is made of: path relative to the source tree -> text, mutants planted."""
    headers = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc/cuda").glob("*.h"), *(ROOT / "csrc/cuda").glob("*.cuh"), *SHIM.glob("*.h")]
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in (*headers, SHIM / "shim.cpp", source)}
    for name, old, new in replace:
        places = [key for key in texts if Path(key).name == name]
        if len(places) != 1 or texts[places[0]].count(old) != 1:
            raise ValueError(f"a mutant replaces {old!r} in {name}, which is not there exactly once")
        texts[places[0]] = texts[places[0]].replace(old, new)
    return texts


def _compile(tree: Path, source: str, flags: Sequence[str], target: Path) -> Path:
    """Compiles tree/source into `target` by way of a temporary name, so that a file that is there is complete."""
    command = compiler()
    assert command is not None, "ask compiler() first"
    part = tree / target.name
    include = [f"-I{tree / 'tests/shim'}", f"-I{tree / 'csrc'}"]
    subprocess.run([*command, *FLAGS, *include, *flags, str(tree / source), "-o", str(part)], check=True, capture_output=True, text=True)
    return part.replace(target)


def build(name: str, replace: Sequence[Replacement] = (), folder: Path = ROOT / "csrc/cuda") -> ctypes.CDLL:
    """The library of folder/name (.cu) and the shim, from the cache or compiled. Raises CalledProcessError with the compiler's words."""
    texts = _sources(folder / name, replace)
    shim = {key: text for key, text in texts.items() if key.startswith("tests/shim/") or key == "csrc/cuda/ptx.cuh"}
    shim.pop(f"tests/shim/{name}", None)
    cache = ROOT / "build/shim"
    library, shim_object = cache / f"{Path(name).stem}-{_digest(texts)}.so", cache / f"shim-{_digest(shim)}.o"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            tree = Path(temporary)
            for path, text in texts.items():
                (tree / path).parent.mkdir(parents=True, exist_ok=True)
                (tree / path).write_text(text)
            if not shim_object.exists():
                _compile(tree, "tests/shim/shim.cpp", ["-c"], shim_object)
            # the kernels check alignment and array bounds; shim.cpp answers those calls, so no sanitizer library is linked
            checks = ["-fsanitize=alignment,bounds", "-c", "-x", "c++"]
            kernels = _compile(tree, str((folder / name).relative_to(ROOT)), checks, tree / "kernels.o")
            part = tree / library.name
            subprocess.run([*(compiler() or ()), "-shared", str(kernels), str(shim_object), "-o", str(part)], check=True, capture_output=True)
            part.replace(library)
    return ctypes.CDLL(str(library))


@functools.cache
def _compiler_version() -> str:
    return subprocess.run([*(compiler() or ()), "--version"], check=True, capture_output=True, text=True).stdout


def _digest(texts: dict[str, str]) -> str:
    return hashlib.sha256(repr((sorted(texts.items()), _compiler_version(), compiler(), FLAGS)).encode()).hexdigest()[:16]


def orders(library: ctypes.CDLL, seed: int = 1) -> Iterator[str]:
    """Sets and names the three orders in which threads and blocks run."""
    for kind, name in enumerate(("forward", "reverse", f"random, seed {seed}")):
        library.shim_set_order(kind, ctypes.c_uint64(seed))
        yield name
