"""Memory of a run: whether an error says that there is no more, and how much was in use."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from pathlib import Path

import torch

# what torch's CPU allocator, C++ and oneDNN say; CUDA's allocator raises torch.OutOfMemoryError
_SAID = ("can't allocate memory", "not enough memory", "std::bad_alloc", "could not create a primitive")


def exhausted(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on a GPU or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SAID)


def release(device: torch.device) -> None:
    """Gives back what the allocators keep of freed memory: a GPU's, and glibc's where that is the C library."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def peak(device: torch.device) -> int | None:
    """Most bytes in use so far: of a GPU's allocator, or resident ones of this process; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    return int(found[1]) << 10 if found else None
