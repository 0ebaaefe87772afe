"""What /metrics tells, in Prometheus's text form, with the names that dashboards of language model servers know."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily

from gptfast.generation.engine import Load

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_STEP = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class Metrics:
    """One registry for one server: nothing is shared between two in a process. No text of a request is in it."""

    def __init__(self, load: Callable[[], Load | None]) -> None:
        self.registry = CollectorRegistry()
        self._load = load

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"gptfast:{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(f"gptfast:{name}_seconds", text, registry=self.registry, buckets=buckets)

        self.prompt_tokens = counter("prompt_tokens", "tokens of prompts that were taken in")
        self.generation_tokens = counter("generation_tokens", "tokens that were drawn")
        self.success = counter("request_success", "answers that ended", ("finished_reason",))
        self.rejected = counter("rejected", "requests that were refused, by status", ("reason",))
        self.disconnects = counter("disconnects", "clients that went away before their answer was whole")
        self.numerical_errors = counter("numerical_errors", "answers and scores that ended with NaN logits")
        self.failures = counter("engine_failures", "steps that raised an exception")
        self.first_token = histogram("time_to_first_token", "from the arrival of a request to each answer's first token")
        self.each_token = histogram("time_per_output_token", "mean time between an answer's tokens", _STEP)
        self.end_to_end = histogram("e2e_request_latency", "from the arrival of a request to its end")
        self.step = histogram("engine_step", "one call of the engine, of one token or several", _STEP)
        gauges: dict[str, tuple[str, Callable[[Load], float]]] = {
            "num_requests_running": ("answers being made", lambda load: load.running),
            "num_requests_waiting": ("answers and scores that wait", lambda load: load.waiting),
            "kv_cache_usage_perc": ("fraction of the cache's pages that are held", lambda load: load.held / load.pages),
            "kv_cache_pages_held": ("pages of 64 tokens that are held", lambda load: load.held),
        }
        for name, (text, value) in gauges.items():
            Gauge(f"gptfast:{name}", text, registry=self.registry).set_function(self._reader(value))
        self.registry.register(_Reuse(load))

    def _reader(self, value: Callable[[Load], float]) -> Callable[[], float]:
        def read() -> float:
            load = self._load()
            return 0.0 if load is None else float(value(load))

        return read

    def text(self) -> bytes:
        """The page."""
        return bytes(generate_latest(self.registry))


class _Reuse:
    """Counters that the scheduler keeps."""

    def __init__(self, load: Callable[[], Load | None]) -> None:
        self._load = load

    def collect(self) -> Iterator[Any]:
        load = self._load()
        hits, preemptions = (0, 0) if load is None else (load.reused, load.preemptions)
        yield CounterMetricFamily("gptfast:prefix_cache_hits", "prompt tokens that were found in the cache", value=hits)
        yield CounterMetricFamily("gptfast:num_preemptions", "answers that gave up their pages for a while", value=preemptions)
