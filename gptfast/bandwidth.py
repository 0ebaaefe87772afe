"""The rate at which this machine's memory can be read: what a token at batch 1, which reads every weight once, is held against.

No one way of reading is the fastest on every CPU, nor on a shared one at every hour. So read_ways() offers many, and
fastest_reads() finds which lead right now; a benchmark then times the leaders in turn with what it measures.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gptfast.backend import EXTENSIONS

GIB = 1 << 30
Way = Callable[[], float]
QUICK = ("4 x 4, dealt", "1 x 8 prefetch once 4096, dealt")


def read_bytes() -> int:
    """Bytes to measure on: 1 GiB, many times any cache, or an eighth of the memory. (Of a buffer of twice the last cache's size, a
    good part is still in it when it is read again: that rate is not the memory's.)"""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 * GIB
    return min(GIB, memory // 8)


def torch_reads(source: Tensor) -> list[Callable[[], Any]]:
    """torch's functions that read fp32 `source` once and write next to nothing."""
    words = source.view(torch.int32)
    return [lambda: source.sum(), lambda: torch.dot(source, source), lambda: words.max()]


def read_ways(nbytes: int | None = None) -> dict[str, Way]:
    """Ways to read a buffer of `nbytes` (default: read_bytes()) on the CPU, with torch's number of threads; each call reads it, a
    small one several times, and returns bytes a second. C++ kernels, with prefetches and without, in small and in huge pages;
    torch's sums where the extension is not there. The buffers live as long as the ways."""
    nbytes = read_bytes() if nbytes is None else nbytes
    times = max(1, (GIB >> 2) // nbytes)
    if EXTENSIONS["_C"] is not None:
        source = torch.ones(max(nbytes // 4, 1))
        return {f"torch {i}": partial(_torch_rate, read, source.nbytes, times) for i, read in enumerate(torch_reads(source))}
    reader_class: Any = importlib.import_module("gptfast._C").MemoryReader
    ways: dict[str, Way] = {}
    for pages in ("small", "huge"):
        reader = reader_class(nbytes, torch.get_num_threads(), pages == "huge")
        for number, name in enumerate(reader_class.patterns()):
            ways[f"{name}, {pages} pages"] = partial(_rate, reader, number, times)
    return ways


def _rate(reader: Any, pattern: int, times: int) -> float:
    return float(reader.bytes * times / reader.read(pattern, times))


def _torch_rate(read: Callable[[], Any], nbytes: int, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        read()
    return nbytes * times / (time.perf_counter() - start)


def fastest_reads(ways: Mapping[str, Way], repeats: int = 5, keep: int = 6) -> dict[str, float]:
    """The best bytes a second of the `keep` fastest ways, best first: all are tried twice, then the leaders `repeats` times."""
    best = {name: max(way(), way()) for name, way in ways.items()}
    lead = sorted(best, key=lambda name: -best[name])[:keep]
    for name in lead * repeats:
        best[name] = max(best[name], ways[name]())
    return {name: best[name] for name in sorted(lead, key=lambda name: -best[name])}


def quick_read_rate(nbytes: int = GIB >> 2) -> float:
    """Bytes a second, in a tenth of a second or so: a few passes over a smaller buffer by two ways that are rarely far from the
    best. For a figure beside an answer; a benchmark takes fastest_reads()."""
    if EXTENSIONS["_C"] is not None:
        return max(way() for way in read_ways(nbytes).values())
    reader: Any = importlib.import_module("gptfast._C").MemoryReader(nbytes, torch.get_num_threads(), True)
    patterns = [number for number, name in enumerate(reader.patterns()) if name in QUICK]
    return max(_rate(reader, number, 1) for number in patterns * 3)
