"""How gptfast measures: candidates interleaved in one run, beside the ceilings of that same run.

The bandwidth of a shared machine swings by the hour, so only figures of one run are compared. interleave() alternates between the
candidates and reports medians with their spread; ceilings() measures what the machine can copy, read and multiply right then;
inputs() hands out fresh operands so that nothing is timed from a cache; force() runs one backend or refuses with the reason;
check() compares a result with eager before its speed counts. Results go to bench/results/<machine>.json.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from gptfast import proof
from gptfast._environment import check_backend, check_op
from gptfast.backend import step_memory, supports, use
from gptfast.bandwidth import fastest_reads, read_ways, torch_reads
from gptfast.errors import Error, LoadError

T = TypeVar("T")
VERSION = 1
MIN_ROUNDS = 5
GIB = 1 << 30
ISA_FLAGS = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8",
)


class Timing(NamedTuple):
    """Seconds a call: median over the rounds, spread = interquartile range / median, and each round's mean."""

    median: float
    spread: float
    samples: list[float]


# ----------------------------------------------------------------------------------------------------------------------- timing


def _sample(function: Callable[[], Any], calls: int, device: str) -> float:
    """Seconds a call over `calls` calls: by the clock on a CPU, by events in the stream on a GPU."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    first.record()
    for _ in range(calls):
        function()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) * 1e-3 / calls


def summarise(samples: list[float]) -> Timing:
    """Median and spread of at least two samples in seconds."""
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, (high - low) / median, samples)


def interleave(
    candidates: Mapping[str, Callable[[], Any]],
    device: str = "cpu",
    rounds: int = 7,
    seconds: float = 0.05,
    warmup: int = 1,
    keep_memory: bool = True,
) -> dict[str, Timing]:
    """Times every candidate in each of `rounds` rounds, each round starting with the next one.

    A sample repeats the call until it lasts about `seconds`; that calibration and `warmup` calls before it (allocations,
    compilation, one for each operand set that keeps a graph) are not counted. With keep_memory every candidate's large tensors on a
    CPU come from memory that is kept, as in a training step: clearing new pages takes the system longer than most kernels here,
    whoever asks for them. Raises gptfast.Error for fewer than five rounds: a median of less says nothing on a shared machine.
    """
    calls = {}
    with step_memory(torch.device(device)) if keep_memory else contextlib.nullcontext():
        for name, function in candidates.items():
            _sample(function, warmup, device)
            calls[name] = max(1, math.ceil(seconds / max(_sample(function, 1, device), 1e-7)))
        return alternate({n: partial(_sample, function, calls[n], device) for n, function in candidates.items()}, rounds)


def alternate(candidates: Mapping[str, Callable[[], float]], rounds: int = 7) -> dict[str, Timing]:
    """interleave() for candidates that time themselves, each call returning seconds: those that run in a process of their own.
    Raises gptfast.Error for fewer than five rounds."""
    if rounds < MIN_ROUNDS:
        raise Error(f"benchmark: {rounds} rounds; at least {MIN_ROUNDS} are needed for a median with a spread")
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for start in range(rounds):
        for name in (*names[start % len(names):], *names[:start % len(names)]):
            samples[name].append(candidates[name]())
    return {name: summarise(values) for name, values in samples.items()}


def one_pass(
    function: Callable[..., Tensor], direction: str, draw: Callable[[], tuple[Sequence[Tensor], Tensor]]
) -> Callable[[], Any]:
    """One call to time: `forward` (without a graph), `backward` alone, or `both`. `draw` gives operands, and an upstream gradient.

    Backward alone goes through graphs that are recorded at each operand set's first turn: give interleave() that many to warm up.
    """
    graphs: dict[int, Tensor] = {}

    def forward() -> Tensor:
        with torch.no_grad():
            return function(*draw()[0])

    def both() -> Any:
        given, upstream = draw()
        return torch.autograd.grad(function(*given), [t for t in given if t.requires_grad], upstream)

    def backward() -> Any:
        given, upstream = draw()
        if id(upstream) not in graphs:
            graphs[id(upstream)] = function(*given)
        return torch.autograd.grad(graphs[id(upstream)], [t for t in given if t.requires_grad], upstream, retain_graph=True)

    return {"forward": forward, "backward": backward, "both": both}[direction]


def cache_bytes(device: str = "cpu") -> int:
    """Bytes of the largest cache: the CPU's last level, as the kernel tells it, or the GPU's L2; 64 MiB where it is not told."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << 10 for size in sizes if size.endswith("K")), default=64 << 20)


def past_cache(device: str = "cpu") -> int:
    """Bytes of operands that no cache holds: twice the largest cache, at most 1 GiB and an eighth of the memory."""
    if device == "cuda":
        return 2 * cache_bytes(device)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 * GIB
    return min(2 * cache_bytes(), GIB, memory // 8)


def inputs(make: Callable[[], T], nbytes: int, device: str = "cpu") -> list[T]:
    """Operand sets of `nbytes` each, as many as it takes to leave every cache; turn through them with itertools.cycle."""
    return [make() for _ in range(max(2, math.ceil(past_cache(device) / max(nbytes, 1))))]


def parameter_shapes(layers: int, width: int, vocab: int, context: int) -> list[tuple[int, ...]]:
    """The shapes of a GPT-2 model's parameters, in their order: what an optimizer's lists hold."""
    c = width
    norm: list[tuple[int, ...]] = [(c,), (c,)]
    block = [*norm, (3 * c, c), (3 * c,), (c, c), (c,), *norm, (4 * c, c), (4 * c,), (c, 4 * c), (c,)]
    return [(vocab, c), (context, c), *block * layers, *norm]


# --------------------------------------------------------------------------------------------------------------------- ceilings


def _best(candidates: Iterable[Callable[[], Any]], device: str, repeats: int) -> float:
    """Seconds of the fastest call among the candidates: a ceiling is the best that was seen, not a median."""
    best = math.inf
    for function in candidates:
        _sample(function, 1, device)
        best = min(best, *(_sample(function, 1, device) for _ in range(repeats)))
    return best


def bandwidths(device: str = "cpu", repeats: int = 5) -> dict[str, float]:
    """Bytes a second with torch's threads: `copy` counts what is read and written, best of two sizes, each past every cache, and
    of several kernels; `read` what is read, the fastest of read_ways() on a CPU."""
    rates = {"copy": 0.0, "read": 0.0}
    if device == "cpu":
        rates["read"] = max(fastest_reads(read_ways(), repeats).values())
    for size in (past_cache(device), past_cache(device) // 2):
        source = torch.ones(max(size, 1 << 20) // 4, device=device)
        target = torch.empty_like(source)
        nbytes = source.numel() * 4
        copies: list[Callable[[], Any]] = [
            lambda s=source, t=target: t.copy_(s),  # type: ignore[misc]
            lambda s=source, t=target: torch.mul(s, 2.0, out=t),  # type: ignore[misc]
        ]
        rates["copy"] = max(rates["copy"], 2 * nbytes / _best(copies, device, repeats))
        if device != "cpu":
            rates["read"] = max(rates["read"], nbytes / _best(torch_reads(source), device, repeats))
    return rates


def _products(a: Tensor, b: Tensor) -> list[Callable[[], Any]]:
    """Ways to compute a @ b.T; oneDNN's own entry is private to torch and absent from some builds, so it is tried once."""
    ways: list[Callable[[], Any]] = [lambda: torch.nn.functional.linear(a, b)]
    if a.device.type == "cpu":
        def through_onednn() -> Tensor:
            return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")  # type: ignore[no-any-return]

        with contextlib.suppress(RuntimeError, AttributeError):
            through_onednn()
            ways.append(through_onednn)
    return ways


def gemm_rate(dtype: torch.dtype, device: str = "cpu", repeats: int = 5) -> float:
    """FLOP/s of a matrix product (2 M N K operations), best of two sizes and of the ways that torch has."""
    best = 0.0
    for n in (2048, 1024) if device == "cpu" else (8192, 4096):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        best = max(best, 2.0 * n**3 / _best(_products(a, b), device, repeats))
    return best


def ceilings(device: str = "cpu", dtypes: Iterable[torch.dtype] = (), repeats: int = 5) -> dict[str, float]:
    """What this machine can do right now: `copy` and `read` in bytes/s, `gemm_<dtype>` in FLOP/s."""
    rates = bandwidths(device, repeats)
    for dtype in dtypes:
        rates[f"gemm_{str(dtype).removeprefix('torch.')}"] = gemm_rate(dtype, device, repeats)
    return rates


# --------------------------------------------------------------------------------------------------------------- what was timed


@contextlib.contextmanager
def force(op: str, name: str, *operands: Any, needs_grad: bool = False) -> Iterator[None]:
    """Runs `op` on backend `name` and on no other. Raises gptfast.Error with the reason where it cannot take these operands."""
    reason = supports(check_op(op), check_backend(name), operands, needs_grad)
    if reason is None and name == "triton" and any(isinstance(o, Tensor) and o.device.type == "cpu" for o in operands):
        reason = "Triton's interpreter runs there (TRITON_INTERPRET), which says nothing about speed"
    if reason is not None:
        raise Error(f"benchmark of {op} on {name} refused: {reason}")
    with use(**{op: name}):
        yield


def _evaluate(function: Callable[..., Any], operands: Sequence[Any], seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of operands that want one, under random upstream gradients drawn from `seed`."""
    fresh = [o.detach().clone().requires_grad_(o.requires_grad) if isinstance(o, Tensor) else o for o in operands]
    result = function(*fresh)
    outputs = [result] if isinstance(result, Tensor) else [t for t in result if isinstance(t, Tensor)]
    wanted = [o for o in fresh if isinstance(o, Tensor) and o.requires_grad]
    if not wanted:
        return outputs, []
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(t.shape, generator=generator).to(t.device, t.dtype) for t in outputs]
    return [t.detach() for t in outputs], list(torch.autograd.grad(outputs, wanted, upstream))


def check(label: str, function: Callable[..., Any], eager: Callable[..., Any], operands: Sequence[Any], seed: int = 0) -> None:
    """Refuses to time a wrong result: raises gptfast.Error unless outputs and gradients of `function` on `operands` are as close to
    eager in float64 as gptfast/testing's tolerance demands. The operands are not changed."""
    from gptfast.testing import assert_close_to_reference

    double = [o.detach().double().requires_grad_(o.requires_grad) if _is_float(o) else o for o in operands]
    fast, own, reference = (_evaluate(f, o, seed) for f, o in ((function, operands), (eager, operands), (eager, double)))
    for part, name in enumerate(("output", "gradient")):
        for index, (mine, theirs, exact) in enumerate(zip(fast[part], own[part], reference[part], strict=True)):
            gradient = name == "gradient"
            try:
                assert_close_to_reference(mine, theirs, exact, name=f"{name} {index}", gradient=gradient, long_sum=gradient)
            except AssertionError as error:
                raise Error(f"benchmark of {label} refused, its result is wrong: {error}") from error


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


# ---------------------------------------------------------------------------------------------------------------- machine facts


def _cpu() -> tuple[list[str], int]:
    """The CPU's instruction sets that matter here, and its physical cores."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    flags = set(next(iter(re.findall(r"^flags\s*:\s*(.+)$", text, re.MULTILINE)), "").split())
    sockets, numbers = (re.findall(rf"^{key}\s*:\s*(\d+)", text, re.MULTILINE) for key in ("physical id", "core id"))
    cores = set(zip(sockets, numbers, strict=False))
    return [flag for flag in ISA_FLAGS if flag in flags], len(cores) or os.cpu_count() or 1


def machine(device: str = "cpu") -> dict[str, Any]:
    """The facts a figure is worth nothing without: CPU or GPU, threads, versions, commit and whether the tree is clean."""
    model, (isa, cores) = proof.cpu_model(), _cpu()
    commit, clean = proof.commit()
    facts: dict[str, Any] = {
        "name": model, "isa": isa, "cores": cores, "threads": torch.get_num_threads(), "system": platform.platform(),
        "python": platform.python_version(), "torch": torch.__version__, "triton": _version("triton"),
        "commit": commit, "clean": clean, "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        gpu = {"sm": f"{properties.major}{properties.minor}", "memory": properties.total_memory, "cuda": torch.version.cuda}
        with contextlib.suppress(ModuleNotFoundError, RuntimeError):  # needs nvidia-ml-py; the other facts stand without it
            gpu["clock_mhz"] = torch.cuda.clock_rate()
        facts |= {"cpu": model, "name": properties.name, "gpu": gpu}
    return facts


def _version(package: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# ---------------------------------------------------------------------------------------------------------------------- results


def row(
    op: str, shape: Iterable[int], dtype: torch.dtype | str, direction: str, candidate: str, timing: Timing,
    limits: Mapping[str, float], nbytes: int | None = None, flops: float | None = None, ceiling: str = "copy",
) -> dict[str, Any]:
    """One line of the results. `nbytes` moved or `flops` done a call give the rate and, with `limits` from ceilings(), the fraction
    of `ceiling` that was reached. Raises gptfast.Error for a ceiling that was not measured."""
    if ceiling not in limits:
        raise Error(f"benchmark: ceiling {ceiling!r} was not measured in this run; measured: {', '.join(limits)}")
    work = nbytes if nbytes is not None else flops
    rate = None if work is None else work / timing.median
    source = proof.source_hash(op, candidate) if candidate in ("eager", "cpp", "cuda", "triton") else None
    return {
        "op": op, "shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "direction": direction, "candidate": candidate,
        "seconds": timing.median, "spread": round(timing.spread, 4), "rounds": len(timing.samples), "rate": rate,
        "unit": "B/s" if nbytes is not None else "FLOP/s", "ceiling": ceiling,
        "fraction": None if rate is None else round(rate / limits[ceiling], 4), "source": source,
    }


def results_file(facts: Mapping[str, Any]) -> Path:
    """bench/results/<machine>.json, named after the CPU or GPU."""
    slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", str(facts["name"]).lower())).strip("-")
    return proof.ROOT / "bench" / "results" / f"{slug or 'machine'}.json"


def write(
    name: str, rows: list[dict[str, Any]], limits: Mapping[str, float], facts: Mapping[str, Any], path: Path | None = None
) -> Path:
    """Puts a run (rows, ceilings, machine facts) under `name` into the results file, in place of an older one of that name."""
    path = path or results_file(facts)
    data: dict[str, Any] = read(path) if path.exists() else {"version": VERSION, "runs": {}}
    data["runs"][name] = {"machine": dict(facts), "ceilings": dict(limits), "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def read(path: Path) -> dict[str, Any]:
    """A results file. Raises gptfast.LoadError where it is none, or one of another version."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"{path}: not a results file ({error})") from error
    if not isinstance(data, dict) or data.get("version") != VERSION or not isinstance(data.get("runs"), dict):
        version = data.get("version") if isinstance(data, dict) else None
        raise LoadError(f"{path}: results of version {version!r}; this gptfast reads version {VERSION}")
    return data


class Replay:
    """A timer that replays measured samples to pytest-benchmark.

    pytest-benchmark times its rows one after the other, and a shared machine drifts meanwhile. So a group is measured once by
    interleave(), and each row hands its samples to the fixture: `@pytest.mark.benchmark(timer=replay)`, then replay.show(...).
    """

    def __init__(self) -> None:
        self._clock: Iterator[float] = itertools.repeat(0.0)

    def __call__(self) -> float:
        """The next reading, in seconds."""
        return next(self._clock)

    def show(self, fixture: Any, timing: Timing, **facts: Any) -> None:
        """Fills the `benchmark` fixture's row with the samples and its extra_info with `facts`."""
        ends = itertools.accumulate(timing.samples)
        self._clock = itertools.chain.from_iterable((end - sample, end) for end, sample in zip(ends, timing.samples, strict=True))
        fixture.extra_info.update(facts)
        fixture.pedantic(lambda: None, rounds=len(timing.samples), iterations=1)
