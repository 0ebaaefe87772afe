"""Generation on the CPU: gptfast's engine beside transformers, CTranslate2 and llama.cpp, 2 threads, all of a table in one run.

    python bench/peers/make_models.py MODELS                               once: random GPT-2 124M in everybody's form
    pytest bench/bench_generate.py --models MODELS                         everything for the models that are there
    pytest bench/bench_generate.py --models MODELS -k "124m and decode"    a token at batch 1 after 64, greedy and sampled
    pytest bench/bench_generate.py --models MODELS -k "goals" -s           everything at 124M, and which goal is reached
    pytest bench/bench_generate.py --models MODELS -k "1558m" --candidates gptfast,llama.cpp

Decode is (seconds of N tokens - seconds of 1) / (N - 1). Every candidate is a process of its own that is stopped while another one
is timed (peers/serve.py); each round times all of them and the memory's read rate. Bytes a token are the weights in the candidate's
own form; `fraction` is their rate to the read rate, `with_cache` counts the keys and values too. Nothing is timed before its log P
of a text and the tokens that it chooses agree with the eager engine in fp32 on the same weights. peers/README.md has the settings.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from gptfast import bandwidth
from gptfast import benchmark as bench
from gptfast.errors import Error

cases = sys.modules.get("gptfast_bench_generate_cases")
if cases is None:  # bench/ is no package: the file beside this one
    import importlib.util

    spec = importlib.util.spec_from_file_location("gptfast_bench_generate_cases", Path(__file__).parent / "generate_cases.py")
    cases = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = cases
    spec.loader.exec_module(cases)

replay = bench.Replay()
NAMES = ("gptfast", "llama.cpp", "transformers", "ctranslate2")
MODES = ("greedy", "sampled", "fixed")
C = 768
each_form = pytest.mark.parametrize("form", cases.FORMATS)


@pytest.fixture
def options(request: pytest.FixtureRequest) -> Any:
    """The command line's options. Each candidate sets its own number of threads; the ceilings take that of torch."""
    torch.set_num_threads(cases.THREADS)
    return request.config.option


def folder(options: Any, size: str) -> Path:
    """The models of one size; skips where they are not made."""
    place = Path(options.models, cases.SIZES[size]) if options.models else None
    if place is None or not (place / "hf/config.json").exists():
        name = cases.SIZES[size]
        pytest.skip(f"--models FOLDER has no {name}: python bench/peers/make_models.py FOLDER --size {name}")
    return place


def save(name: str, rows: list[dict[str, Any]], limits: dict[str, float], **facts: Any) -> None:
    command = " ".join(["pytest", *sys.argv[1:]])
    bench.write(name, rows, limits, {**bench.machine(), "command": command, **facts})


# ----------------------------------------------------------------------------------------------------------------- tokens a second


@cache
def leaders() -> list[Callable[[], float]]:
    """The ways of reading memory that are the fastest today; each group times them again, in every round."""
    ways = bandwidth.read_ways()
    return [ways[name] for name in bandwidth.fastest_reads(ways, 2, 3)]


def fits(wanted: list[Any], place: Path, shape: Any) -> None:
    """Skips where the weights of the candidates and of the reference, and what they keep beside them, would not stay in memory."""
    needed = shape.weight_bytes(4, 4) + sum(shape.weight_bytes(c.block, c.head, c.output) + (1 << 29) for c in wanted)
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    there = int(lines["MemAvailable"].split()[0]) << 10
    if needed > 0.9 * there:
        pytest.skip(f"needs {needed / 1e9:.1f} GB for the weights of all candidates, {there / 1e9:.1f} are there")


class Group:
    """One table: rows and timings by label, prefill's too, and the reasons of those that are missing."""

    def __init__(self, place: Path, size: str, regime: str, form: str, rounds: int, only: str | None) -> None:
        self.place, self.size, self.regime, self.form = place, size, regime, form
        self.shape, self.case = cases.Shape.of(place), cases.REGIMES[regime]
        wanted = [c for c in cases.candidates(regime, form) if only is None or c.name in only.split(",")]
        fits(wanted, place, self.shape)
        self.rows: dict[str, dict[str, Any]] = {}
        self.tasks: dict[str, Any] = {}
        self.about: dict[str, dict[str, Any]] = {}
        reference = cases.reference(place) if size == "124m" else cases.Reference(place)
        with cases.running(wanted, place) as (processes, self.reasons):
            for candidate, process in processes.items():
                self._admit(candidate, process, reference)
            del reference
            read = cases.read_task(leaders(), bandwidth.read_bytes())
            self.timings = bench.alternate({**self.tasks, "read": read}, rounds)
        rates = [bandwidth.read_bytes() / seconds for seconds in self.timings["read"].samples]
        self.limits = {"read": statistics.median(rates), "read_best": max(rates)}
        for name, task in self.tasks.items():
            self.rows[name] = self._row(name, task)
        if self.rows:
            self._compare()
            rows = list(itertools.chain(self.rows.values(), (self._prefill(n, t) for n, t in self.tasks.items())))
            save(f"generate {size} {regime} {form}", rows, self.limits, absent=self.reasons, candidates=self.about)
        print(f"\n{self}")

    def __str__(self) -> str:
        own = f"gptfast {self.form}"
        read, best = (self.limits[name] / 1e9 for name in ("read", "read_best"))
        head = f"{self.size} {self.regime} {self.form}: read {read:.1f} GB/s (best {best:.1f})"
        titles = f"{'ms/token':>9} {'tok/s':>8} {'fraction':>8} {'w. cache':>8} {'prompt ms':>9} {'spread':>6} {'x ours':>7}"
        lines = [head, f"  {'':28} {titles}"]
        for name, row in sorted(self.rows.items(), key=lambda item: item[1]["seconds"]):
            ratio = f"{self.rows[own]['vs'][name]:7.2f}" if own in self.rows and name != own else ""
            figures = f"{row['ms']:9.3f} {row['tokens_per_s']:8.1f} {row['fraction']:8.3f} {row['with_cache']:8.3f}"
            lines.append(f"  {name:28} {figures} {row['prefill_ms']:9.1f} {row['spread']:6.2f} {ratio}")
        return "\n".join(lines + [f"  absent: {reason}" for reason in self.reasons.values()])

    def _admit(self, candidate: Any, process: Any, reference: Any) -> None:
        kinds = cases.modes(candidate, self.case)
        try:
            errors = reference.check(process, kinds)
            measures = {cases.label(candidate, mode): cases.Measure(process, self.case, mode) for mode in kinds}
        except Error as refusal:
            self.reasons[f"{candidate.name} {candidate.form}"] = str(refusal)
            return
        self.tasks.update(measures)
        self.about[f"{candidate.name} {candidate.form}"] = {**process.about, "errors": errors}

    def _row(self, name: str, task: Any) -> dict[str, Any]:
        candidate, timing = task.process.candidate, self.timings[name]
        size = self.shape.weight_bytes(candidate.block, candidate.head, candidate.output)
        cached = self.case.batch * self.shape.cache_bytes(candidate.item, self.case.prompt + self.case.new / 2)
        row = bench.row(
            "generate", self.case.shape, candidate.form, self.regime, name, timing, self.limits, nbytes=size, ceiling="read"
        )
        fractions = [(size + part) / b for part in (0, cached) for b in (bandwidth.read_bytes(),)]
        paired = [cases.paired(self.timings["read"].samples, timing.samples) * fraction for fraction in fractions]
        row |= {"fraction": round(paired[0], 4), "with_cache": round(paired[1], 4), "ms": round(timing.median * 1e3, 4)}
        return {**row, "tokens_per_s": round(self.case.batch / timing.median, 1), "prefill_ms": self._first(task) * 1e3}

    def _first(self, task: Any) -> float:
        return statistics.median(task.first)

    def _prefill(self, name: str, task: Any) -> dict[str, Any]:
        timing, form = bench.summarise(task.first), task.process.candidate.form
        row = bench.row("prefill", self.case.shape, form, self.regime, name, timing, self.limits, ceiling="read")
        return {**row, "vs": self.ratios(name, lambda other: self.tasks[other].first)}

    def ratios(self, name: str, samples: Callable[[str], list[float]]) -> dict[str, float]:
        """How many times as long every other candidate takes, round by round."""
        return {other: round(cases.paired(samples(other), samples(name)), 3) for other in self.tasks if other != name}

    def _compare(self) -> None:
        for name, row in self.rows.items():
            row["vs"] = self.ratios(name, lambda other: self.timings[other].samples)


@cache
def group(place: Path, size: str, regime: str, form: str, rounds: int, only: str | None) -> Group:
    return Group(place, size, regime, form, rounds, only)


def names(regime: str) -> list[tuple[str, str]]:
    """Libraries and modes that may have a row in a regime's tables."""
    modes = cases.REGIMES[regime].modes
    alone = ("llama.cpp", "gptfast") if "sampled" in modes else ("llama.cpp",)
    return [(name, mode) for name in NAMES for mode in MODES if mode in modes or (mode == "fixed" and name in alone)]


ROWS = [
    pytest.param(size, regime, form, name, mode, id=f"{size}-{regime}-{form}-{name}-{mode}")
    for size in cases.SIZES
    for regime in cases.REGIMES
    if (regime == "large") == (size != "124m")
    for form in cases.FORMATS
    for name, mode in names(regime)
    if regime != "large" or name in NAMES[:2]
]


@pytest.mark.parametrize(("size", "regime", "form", "name", "mode"), ROWS)
@pytest.mark.benchmark(timer=replay)
def test_generate(benchmark: Any, options: Any, size: str, regime: str, form: str, name: str, mode: str) -> None:
    wanted = [c for c in cases.candidates(regime, form) if c.name == name]
    if not wanted:
        pytest.skip(f"{name} has no {form}")
    table = group(folder(options, size), size, regime, form, options.rounds, options.candidates)
    row = table.rows.get(cases.label(wanted[0], mode))
    if row is None:
        pytest.skip(table.reasons.get(f"{name} {wanted[0].form}", "not measured"))
    facts = {f"vs_{other}": ratio for other, ratio in row["vs"].items()}
    shown = ("ms", "tokens_per_s", "prefill_ms", "fraction", "with_cache", "spread")
    benchmark.group = f"generate {size} {regime} {form}"
    replay.show(benchmark, table.timings[row["candidate"]], **{key: row[key] for key in shown}, **facts)


# ------------------------------------------------------------------------------------------------------------------ load, memory


@each_form
def test_load(options: Any, form: str) -> None:
    """Seconds to open the model, its file in the system's cache: gptfast's packed file beside the peers' own forms."""
    place = folder(options, "124m")
    with cases.running(cases.candidates("decode", form), place) as (processes, reasons):
        own = next((p for c, p in processes.items() if c.name == "gptfast"), None)
        if own is None:
            pytest.skip("; ".join(reasons.values()))
        timings = bench.alternate({c.name: lambda p=p: p.ask("reopen")["seconds"] for c, p in processes.items()}, options.rounds)
    rows = [{"candidate": name, "form": form, "seconds": t.median, "spread": round(t.spread, 4)} for name, t in timings.items()]
    print(f"\nload {form} (goal 0.5 s): " + ", ".join(f"{name} {timing.median:.3f} s" for name, timing in timings.items()))
    save(f"generate load {form}", rows, {}, file=own.path.name, absent=reasons)


@each_form
def test_memory(options: Any, form: str) -> None:
    """Resident bytes after 128 tokens above the process with the library imported, and above its file of weights."""
    place, shape = folder(options, "124m"), cases.REGIMES["decode"]
    found = {}
    for candidate in cases.candidates("decode", form):
        with cases.running([candidate], place) as (processes, reasons):
            for process in processes.values():
                process.ask("run", prompts=cases.prompts(shape, 1), new=shape.new, mode="greedy", seed=1)
                told, path = process.ask("memory"), process.path
                size = sum(p.stat().st_size for p in (path.glob("model*") if path.is_dir() else [path]))
                resident = told["now"] - told["before"]
                found[candidate.name] = {"resident": resident, "above_weights": resident - size}
    if "gptfast" not in found:
        pytest.skip("; ".join(reasons.values()) or "gptfast does not run this format")
    above = ", ".join(f"{name} {values['above_weights'] / 1e6:.0f}" for name, values in found.items())
    print(f"\nmemory {form}, MB above the weights (goal 150): {above}")
    save(f"generate memory {form}", [{"candidate": name, "form": form, **values} for name, values in found.items()], {})


# -------------------------------------------------------------------------------------------------------- the products of a prompt


def _layers(rows: int, form: str) -> tuple[dict[str, Callable[[], Any]], float]:
    """The four products of each of six layers of the 124M model on `rows` rows: by packed weights as the engine has them, by oneDNN
    with weights in the order it prefers, and by torch's linear; and their FLOPs. int8 has no peer here but bf16."""
    from gptfast import ops

    shapes = [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C)]
    dtype = torch.float32 if form == "fp32" else torch.bfloat16
    plain = [torch.randn(shape) * 0.02 for _ in range(6) for shape in shapes]
    inputs = {k: torch.randn(rows, k) for k in (C, 4 * C)}
    narrow = {k: x.to(dtype) for k, x in inputs.items()}
    packed = [ops.pack_weight(w, form) for w in plain]
    tasks: dict[str, Callable[[], Any]] = {f"gptfast {form}": lambda: [ops.linear(inputs[w.shape[1]], w) for w in packed]}
    if form == "int8":
        other = [ops.pack_weight(w, "bf16") for w in plain]
        tasks["gptfast bf16"] = lambda: [ops.linear(inputs[w.shape[1]], w) for w in other]
    else:
        kept = [w.to(dtype) for w in plain]
        tasks["torch"] = lambda: [torch.nn.functional.linear(narrow[w.shape[1]], w) for w in kept]
        point, reorder = torch.ops.mkldnn._linear_pointwise, torch.ops.mkldnn._reorder_linear_weight
        ordered = [(w.shape[1], reorder(w, rows)) for w in kept]
        tasks["oneDNN"] = lambda: [point(narrow[k], w, None, "none", [], "") for k, w in ordered]
    exact = torch.nn.functional.linear(inputs[C], plain[0])
    for name, task in tasks.items():
        error = float((task()[0].float() - exact).std() / exact.std())
        if not error < (1e-5 if form == "fp32" else 2e-2):
            raise Error(f"benchmark of {name} refused: its products are off by {error:.2g} standard deviations")
    return tasks, sum(2.0 * rows * w.numel() for w in plain)


@pytest.mark.parametrize("rows", [64, 512, 896])
@pytest.mark.parametrize("form", ["fp32", "bf16", "int8"])
def test_products(options: Any, form: str, rows: int) -> None:
    """A prompt's products by the engine's kernels beside oneDNN's (goal: 0.85 of its rate; int8 faster than bf16)."""
    torch.manual_seed(rows)
    with torch.no_grad(), bench.use(linear="cpp"):
        tasks, flops = _layers(rows, form)
        timings = bench.interleave(tasks, rounds=options.rounds, seconds=0.3)
    own = timings[f"gptfast {form}"]
    found = [
        {
            "candidate": name, "form": form, "rows": rows, "seconds": timing.median, "spread": round(timing.spread, 4),
            "rate": flops / timing.median, "ours_of_this": round(cases.paired(timing.samples, own.samples), 3),
        }
        for name, timing in timings.items()
    ]  # fmt: skip
    figures = (f"{row['candidate']} {row['rate'] / 1e9:.0f} GFLOP/s (ours {row['ours_of_this']:.2f} of it)" for row in found)
    print(f"\n{rows} rows {form}: " + ", ".join(figures))
    save(f"generate products {rows} {form}", found, {})


# ------------------------------------------------------------------------------------------------------------------------- goals

# what each figure should be, from the tables above: (regime, form, what, least value, of which candidate, against which)
FRACTIONS = {"fp32": 0.88, "bf16": 0.88, "int8": 0.82, "int4": 0.70}
RATIOS = [
    ("decode", "fp32", "llama.cpp f32 evaluation", 1.2), ("decode", "fp32", "transformers fp32", 2.2),
    ("decode", "bf16", "llama.cpp bf16 evaluation", 1.25), ("decode", "bf16", "transformers bf16", 2.8),
    ("decode", "int8", "llama.cpp q8_0 evaluation", 1.5), ("decode", "int8", "ctranslate2 int8", 3.0),
    ("decode", "int4", "llama.cpp q4_0 evaluation", 1.3),
    ("batch", "int8", "transformers bf16", 4.0), ("batch", "int8", "ctranslate2 int8", 4.0),
]  # fmt: skip
PREFILLS = [
    ("bf16", "transformers bf16", 1.8), ("int8", "ctranslate2 int8", 2.0), ("bf16", "llama.cpp bf16", 2.0),
    ("int8", "llama.cpp q8_0", 2.0),
]  # fmt: skip


def _goals(tables: dict[tuple[str, str], Group]) -> Iterator[tuple[str, float | None, float]]:
    """(what, value, least) of every goal; None where one of the two was not measured."""
    own = {form: f"gptfast {form}" for form in cases.FORMATS}

    def row(regime: str, form: str, name: str) -> dict[str, Any]:
        return tables[regime, form].rows.get(name, {})

    for form, least in FRACTIONS.items():
        yield f"{form} fraction of the read rate", row("decode", form, own[form]).get("fraction"), least
    for regime, form, peer, least in RATIOS:
        yield f"{regime} {form} vs {peer}", row(regime, form, own[form]).get("vs", {}).get(peer), least
    for form, peer, least in PREFILLS:
        table = tables["context", form]
        ratios = table.ratios(own[form], lambda name, table=table: table.tasks[name].first) if own[form] in table.rows else {}
        yield f"prefill of 896 {form} vs {peer}", ratios.get(peer), least
    for form in cases.FORMATS:
        alone = f"{own[form]} evaluation"
        yield f"{form} without a sampler / greedy", row("decode", form, own[form]).get("vs", {}).get(alone), 0.98
        yield f"{form} greedy / sampled", row("decode", form, f"{own[form]} sampled").get("vs", {}).get(own[form]), 0.98
        short, long = row("decode", form, own[form]), row("context", form, own[form])
        if not short or not long:
            yield f"{form} decode at 896", None, 0.0
        elif form in ("fp32", "bf16"):
            scale = tables["decode", form].limits["read"] / tables["context", form].limits["read"]
            yield f"{form} decode at 64 / at 896, at one read rate", short["seconds"] / long["seconds"] * scale, 1 / 1.15
        else:
            yield f"{form} fraction at 896 / at 64, cache counted", long["with_cache"] / short["with_cache"], 0.92


def test_goals(options: Any) -> None:
    """Measures what the other tests at 124M measure, if they did not, and prints every goal beside its figure; fails if the read
    rate was beaten, for then it was no ceiling."""
    if options.keyword and "goals" not in options.keyword:
        pytest.skip("asked for with -k goals, and in a run of everything")
    place = folder(options, "124m")
    regimes = [regime for regime in cases.REGIMES if regime != "large"]
    tables = {(r, f): group(place, "124m", r, f, options.rounds, options.candidates) for r in regimes for f in cases.FORMATS}
    found = [(what, value, least) for what, value, least in _goals(tables)]
    print()
    for what, value, least in found:
        verdict = "not measured" if value is None else f"{value:.3f} {'reaches' if value >= least else 'MISSES'} {least:.3f}"
        print(f"{what:60} {verdict}")
    highest = max((max(row["fraction"] for row in table.rows.values()) for table in tables.values() if table.rows), default=0.0)
    print(f"{'highest rate of anybody / the ceiling':60} {highest:.3f}")
    rows = [{"goal": what, "value": value, "least": least} for what, value, least in found]
    save("generate goals", [*rows, {"goal": "highest rate / ceiling", "value": highest, "least": None}], {})
    assert highest <= 1 / 0.95, "somebody reads faster than the ways of reading: they are no ceiling"
