"""How fast an answer came, beside what the memory allows: a token at batch 1 costs one read of the weights."""

from __future__ import annotations

import itertools
import time
from typing import Any

BURST = 2e-4  # seconds: pieces that follow each other faster were made by one call


class Clock:
    """Notes when each piece of a stream came, and how many tokens it brought of which choice."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.marks: list[tuple[float, int, int]] = []

    def mark(self, choice: int, tokens: int) -> None:
        """A piece has come."""
        self.marks.append((time.perf_counter(), choice, tokens))

    def pace(self) -> dict[str, Any]:
        """seconds of the whole, first_token_s, and without the first call's tokens ms_per_token (for several choices: per token of
        the longest) and tokens_per_s; both None where one call made everything."""
        times = [moment for moment, _, tokens in self.marks if tokens]
        if not times:
            return {"seconds": time.perf_counter() - self.start, "first_token_s": None, "ms_per_token": None, "tokens_per_s": None}
        first = next((a for a, b in itertools.pairwise(times) if b - a > BURST), times[0])
        later: dict[int, int] = {}
        for moment, choice, tokens in self.marks:
            if moment > first:
                later[choice] = later.get(choice, 0) + tokens
        longest, elapsed = max(later.values(), default=0), times[-1] - first
        return {
            "seconds": times[-1] - self.start, "first_token_s": times[0] - self.start,
            "ms_per_token": 1e3 * elapsed / longest if longest else None,
            "tokens_per_s": sum(later.values()) / elapsed if longest and elapsed > 0 else None,
        }


def memory_limit(model: str, dtype: str, device: str, ms_per_token: float | None) -> dict[str, Any]:
    """bytes_per_token of weights that a token reads, read_bytes_per_s that the memory gives right now with the threads in use, and
    memory_fraction = the shortest possible time / ms_per_token. The last two are None where the weights fit into a cache, whose
    speed is another, or where there is no ms_per_token."""
    from gptfast import benchmark, packed
    from gptfast.bandwidth import quick_read_rate

    size = packed.token_bytes(packed.config_of(model), "bf16" if dtype == "fp16" else dtype)
    facts: dict[str, Any] = {"bytes_per_token": size, "read_bytes_per_s": None, "memory_fraction": None}
    if ms_per_token is not None and size > benchmark.cache_bytes(device):
        rate = quick_read_rate() if device == "cpu" else benchmark.bandwidths(device, repeats=1)["read"]
        facts |= {"read_bytes_per_s": rate, "memory_fraction": size / rate / (ms_per_token * 1e-3)}
    return facts


def line(count: int, ends: str, facts: dict[str, Any]) -> str:
    """The figures as one line."""
    text = f"{count} tokens in {facts['seconds']:.2f} s, ended by {ends}"
    if facts["ms_per_token"] is None or facts["tokens_per_s"] is None:
        return text
    text += f"; {facts['ms_per_token']:.3g} ms/token, {facts['tokens_per_s']:.1f} tokens/s"
    size = f"{facts['bytes_per_token'] / 1e6:.3g} MB of weights a token"
    if facts["memory_fraction"] is None:
        return f"{text} ({size}, which fit into the cache)"
    rate = f"{facts['read_bytes_per_s'] / 1e9:.1f} GB/s"
    return f"{text}, {facts['memory_fraction']:.2f} of the memory limit ({size}, read at {rate})"
