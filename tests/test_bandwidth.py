"""gptfast/bandwidth.py: the ways of reading memory, and which of them lead."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from gptfast import bandwidth
from gptfast.backend import EXTENSIONS
from gptfast.testing import requires

MIB = 1 << 20


@pytest.fixture
def reader() -> Any:
    requires("cpp", EXTENSIONS["_C"])
    from gptfast import _C

    return _C.MemoryReader(4 * MIB, 2, False)


def test_every_way_reads_at_a_rate_that_memory_or_a_cache_has(reader: Any) -> None:
    names = reader.patterns()
    assert len(set(names)) == len(names) >= 12 and reader.bytes == 4 * MIB
    for number, name in enumerate(names):
        rate = reader.bytes * 8 / min(reader.read(number, 8) for _ in range(3))
        assert 1e7 < rate < 1e12, f"{name}: {rate:.3g} B/s; a kernel that skips what it should read is faster than any cache"
    with pytest.raises(IndexError):
        reader.read(len(names), 1)


def test_two_passes_take_longer_than_one(reader: Any) -> None:
    for number in range(len(reader.patterns())):
        once, often = (min(reader.read(number, times) for _ in range(5)) for times in (4, 40))
        assert often > 2 * once, reader.patterns()[number]


def test_ways_come_in_small_and_huge_pages(reader: Any) -> None:
    ways = bandwidth.read_ways(MIB)
    assert len(ways) == 2 * len(reader.patterns()) and sum(name.endswith("huge pages") for name in ways) == len(reader.patterns())
    assert next(iter(ways.values()))() > 0
    assert MIB <= bandwidth.read_bytes() <= 1 << 30


def test_without_the_extension_torch_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bandwidth.EXTENSIONS, "_C", "not built")
    ways = bandwidth.read_ways(MIB)
    assert list(ways) == ["torch 0", "torch 1", "torch 2"] and all(way() > 0 for way in ways.values())
    assert bandwidth.quick_read_rate(MIB) > 0


def test_a_quick_rate_takes_the_patterns_by_their_names(reader: Any) -> None:
    assert set(bandwidth.QUICK) <= set(reader.patterns())
    assert bandwidth.quick_read_rate(MIB) > 0


def test_torch_reads_read_their_tensor() -> None:
    source = torch.ones(1000)
    source[-1] = 3.0
    total, square, _ = (read() for read in bandwidth.torch_reads(source))
    assert (float(total), float(square)) == (1002.0, 1008.0)


def test_leaders_are_the_fastest_in_order() -> None:
    calls: dict[str, int] = dict.fromkeys("abcd", 0)

    def way(name: str, rates: list[float]) -> Any:
        turn = itertools.cycle(rates)

        def run() -> float:
            calls[name] += 1
            return next(turn)
        return run

    ways = {"a": way("a", [1.0, 2.0]), "b": way("b", [5.0, 1.0, 9.0]), "c": way("c", [6.0, 6.0]), "d": way("d", [3.0, 3.0])}
    assert bandwidth.fastest_reads(ways, repeats=1, keep=2) == {"b": 9.0, "c": 6.0}
    assert calls == {"a": 2, "b": 3, "c": 3, "d": 2}
