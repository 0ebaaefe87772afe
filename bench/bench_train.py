"""GPT-2's training step: gptfast's own Trainer step beside plain PyTorch and nanoGPT, eager and compiled, in fp32 and in bf16.

    pytest bench/bench_train.py -k "124m and bfloat16" --nanogpt PATH     a table a model and dtype; every candidate in one run
    pytest bench/bench_train.py -k "train_py" --nanogpt PATH              gptfast's Trainer beside nanoGPT's train.py, as a command
    pytest bench/bench_train.py -k "loop and char"                        `gptfast train` as a command beside the bare step
    pytest bench/bench_train.py -k "memory and char"                      peak resident memory of 20 steps, a process a candidate
    pytest bench/bench_train.py -k "curve and char-4x128"                 loss curves: as close to fp32 eager as eager itself is
    pytest bench/bench_train.py -k "profile and 124m" --profile           where the time of gptfast's step goes, by op

--candidates gptfast,torch times only these; --rounds, --curve-steps, --memory-steps set the sizes. A step of the 124M model takes
seconds, so a sample there is one call. Nothing is timed before its first steps agree with plain PyTorch in fp32 from equal weights
(train_cases.py: losses to 1e-3 in fp32 and 1e-2 in bf16), nor where an op did not run on the backend that the table names.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from gptfast import benchmark as bench
from gptfast.errors import Error
from gptfast.training.log import read as read_log

cases = sys.modules.get("gptfast_bench_train_cases")
if cases is None:  # bench/ is no package: the file beside this one
    import importlib.util

    spec = importlib.util.spec_from_file_location("gptfast_bench_train_cases", Path(__file__).parent / "train_cases.py")
    cases = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = cases
    spec.loader.exec_module(cases)

# nanoGPT on two Zen 5 cores, GPT-2 124M, B=4 T=256, AdamW and clip every step: (candidate, slowest seconds of several runs, GEMM
# FLOP/s of that machine). A peer that is slower here by more than the machine is, is handicapped, and no ratio to it counts.
PUBLISHED = {"float32": ("torch", 5.5, 440e9), "bfloat16": ("torch.compile", 2.3, 890e9)}
CURVE_STEPS = {"124m": 10, "char-4x128": 100, "char-6x384": 20}
SEEDS = (0, 1, 2)
TRAIN_PY = {"char-4x128": (60, 10), "char-6x384": (4, 1)}  # iterations a round, of them not counted
replay = bench.Replay()
each_case = pytest.mark.parametrize("name", cases.CASES)
each_dtype = pytest.mark.parametrize("dtype", cases.DTYPES)


@pytest.fixture
def options(request: pytest.FixtureRequest) -> Any:
    """The command line's options; where a test is asked for by name only, it is skipped unless -k names it."""
    asked = request.config.option.keyword
    part = request.node.originalname.removeprefix("test_")
    if part in ("memory", "curve", "train_py", "published") and part not in asked:
        pytest.skip(f"asked for with -k {part}")
    return request.config.option


def checkout(options: Any) -> Path | None:
    return Path(options.nanogpt).resolve() if options.nanogpt else None


@cache
def limits() -> dict[str, float]:
    return bench.ceilings("cpu", cases.DTYPES.values())


def result(what: str, case: Any, dtype: str, candidate: str, timing: bench.Timing) -> dict[str, Any]:
    kind, ceiling = cases.DTYPES[dtype], f"gemm_{dtype}"
    return bench.row(what, case.shape, kind, "step", candidate, timing, limits(), flops=case.flops, ceiling=ceiling)


def save(label: str, rows: list[dict[str, Any]], **facts: Any) -> None:
    command = " ".join(["pytest", *sys.argv[1:]])
    bench.write(label, rows, limits(), {**bench.machine(), "command": command, **facts})


# ------------------------------------------------------------------------------------------------------------------------ steps


def _task(step: Any, case: Any) -> Callable[[], Any]:
    given = itertools.cycle(cases.batches(case, 1, 4))

    def run() -> None:
        batch = next(given)
        step(batch.ids, batch.targets, case.lr)

    return run


@cache
def group(name: str, dtype: str, wanted: tuple[str, ...], rounds: int, place: Path | None) -> tuple[dict[str, Any], dict[str, str]]:
    """Rows of all candidates that run here, timed in turn, and for the others the reason why not."""
    case, found, reasons, worst = cases.CASES[name], {}, {}, {}
    for candidate in wanted:
        try:
            step = cases.build(candidate, case, dtype, 0.0, checkout=place)
            worst[candidate] = cases.check(candidate, step, case, dtype)
            found[candidate] = step if case.dropout == 0 else cases.build(candidate, case, dtype, case.dropout, checkout=place)
        except Error as refusal:
            reasons[candidate] = str(refusal)
    seconds = 0.0 if name == "124m" else 0.3
    tasks = {n: _task(step, case) for n, step in found.items()}
    timings = bench.interleave(tasks, rounds=rounds, seconds=seconds, keep_memory=False)  # each as its users run it
    rows = {}
    for candidate, timing in timings.items():
        row = result("train_step", case, dtype, candidate, timing)
        tokens = round(case.batch * case.length / timing.median)
        rows[candidate] = {**row, "tokens_per_s": tokens, "backends": found[candidate].backends, "loss_off_by": worst[candidate]}
        rows[candidate]["timing"] = timing
        if found[candidate].backends:
            print(f"{candidate} {name} {dtype}: {found[candidate].backends}")
    if rows:
        save(f"train_step {name} {dtype}", [{k: v for k, v in row.items() if k != "timing"} for row in rows.values()])
    return rows, reasons


def measured(options: Any, name: str, dtype: str) -> tuple[dict[str, Any], dict[str, str]]:
    wanted = tuple(options.candidates.split(",")) if options.candidates else cases.CANDIDATES
    unknown = set(wanted) - set(cases.CANDIDATES)
    if unknown:
        raise pytest.UsageError(f"--candidates: {', '.join(unknown)}; candidates are {', '.join(cases.CANDIDATES)}")
    return group(name, dtype, wanted, options.rounds, checkout(options))


@pytest.mark.parametrize("candidate", cases.CANDIDATES)
@each_dtype
@each_case
@pytest.mark.benchmark(timer=replay)
def test_step(benchmark: Any, options: Any, name: str, dtype: str, candidate: str) -> None:
    rows, reasons = measured(options, name, dtype)
    if candidate not in rows:
        pytest.skip(reasons.get(candidate, "not asked for"))
    row = rows[candidate]
    peers = {n: rows[n]["seconds"] for n in rows if not n.startswith("gptfast")}
    facts = {f"vs_{n}": round(seconds / row["seconds"], 2) for n, seconds in peers.items()}
    shown = ("tokens_per_s", "fraction", "spread", "loss_off_by")
    benchmark.group = f"train_step {name} {dtype}"
    replay.show(benchmark, row["timing"], **{n: row[n] for n in shown}, **facts)


@each_dtype
def test_published(options: Any, dtype: str) -> None:
    """The peer is as fast here as its published figure, by the ratio of the machines' GEMM rates (-k published)."""
    candidate, seconds, rate = PUBLISHED[dtype]
    rows, reasons = measured(options, "124m", dtype)
    if candidate not in rows:
        pytest.skip(reasons.get(candidate, "not asked for"))
    expected = seconds * rate / limits()[f"gemm_{dtype}"]
    ratio = expected / rows[candidate]["seconds"]
    print(f"{candidate} {dtype}: {rows[candidate]['seconds']:.2f} s a step, {ratio:.2f} of the published rate scaled to here")
    save(f"train_step published {dtype}", [], candidate=candidate, expected_seconds=expected, of_published=round(ratio, 3))
    assert ratio >= 0.9, "the peer is slower than published: a disturbed machine, or a handicapped peer; no ratio to it counts"


# ------------------------------------------------------------------------------------------------------------ nanoGPT's program


def _characters() -> tuple[Any, str]:
    """Tinyshakespeare's characters where GPTFAST_DATA has it, numbered as by nanoGPT's prepare.py, else the library's."""
    from gptfast.testing import find_data

    try:
        text = find_data("tinyshakespeare.txt").read_text()
    except pytest.skip.Exception:
        return cases.tokens(cases.CHARACTERS), "the standard library's source, 65 characters"
    numbers = {character: number for number, character in enumerate(sorted(set(text)))}
    return [numbers[character] for character in text], "tinyshakespeare"


def _fit(case: Any, dtype: str, folder: Path, iterations: int, skip: int) -> float:
    """Seconds an iteration of Trainer.fit, log and loader included, from the clock in its log."""
    with cases.recorded() as seen:
        cases.trainer(case, dtype, case.dropout, 0, steps=iterations, out=str(folder), log_every=1, save_every=0).fit()
    cases.ran_as_asked("gptfast", seen)
    clock = [line["seconds"] for line in read_log(folder / "log.jsonl") if line["event"] == "step"]
    return (clock[-1] - clock[skip - 1]) / (len(clock) - skip)


@pytest.mark.parametrize("name", TRAIN_PY)
def test_train_py(options: Any, tmp_path: Path, name: str) -> None:
    """Rounds of nanoGPT's train.py (fp32 on a CPU, whatever its dtype says) and of gptfast's Trainer, in turn."""
    place, case, (iterations, skip) = checkout(options), cases.CASES[name], TRAIN_PY[name]
    if place is None:
        pytest.skip("a checkout of nanoGPT is given with --nanogpt PATH")
    ids, text = _characters()
    script = cases.nanogpt.TrainScript(place, tmp_path / "nanogpt", ids, cases.CHARACTERS, case.flags)
    command = " ".join(script.command(iterations))
    print(f"\n{command}   (on {text})")
    samples: dict[str, list[float]] = {"train.py": [], "float32": [], "bfloat16": []}
    try:
        for number in range(options.rounds):
            for candidate in (*list(samples)[number % 3 :], *list(samples)[: number % 3]):
                if candidate == "train.py":
                    value = statistics.mean(script.run(iterations, skip)[0])
                else:
                    value = _fit(case, candidate, tmp_path / f"{candidate}-{number}", iterations, skip)
                samples[candidate].append(value)
    except Error as refusal:
        pytest.skip(str(refusal))
    rows = []
    for candidate, values in samples.items():
        dtype = "float32" if candidate == "train.py" else candidate
        label, timing = "nanoGPT train.py" if candidate == "train.py" else "gptfast Trainer", bench.summarise(values)
        rows.append(result("train_loop", case, dtype, label, timing))
        ratio = statistics.median(samples["train.py"]) / timing.median
        print(f"{label} {dtype}: {timing.median * 1e3:.1f} ms an iteration (spread {timing.spread:.2f}), {ratio:.2f}x train.py")
    save(f"train_loop {name}", rows, peer_command=command, text=text)


# ------------------------------------------------------------------------------------------------------------- the loop around it


LOOP = {"124m": (4, 1), "char-4x128": (600, 50), "char-6x384": (6, 1)}  # steps a round, of them not counted


def _command(case: Any, dtype: str, data: Path, out: Path, steps: int, skip: int) -> float:
    """Seconds a step of `gptfast train` in a process of its own, from the clock in its log; nothing is evaluated or saved."""
    shape = {"n-layer": case.layers, "n-head": case.heads, "n-embd": case.width, "n-positions": case.context}
    drop = {f"{part}-pdrop": case.dropout for part in ("resid", "embd", "attn")}
    options = {
        **shape, **drop, "batch": case.batch, "context": case.length, "lr": case.lr, "beta2": case.beta2, "steps": steps,
        "dtype": {"float32": "fp32", "bfloat16": "bf16"}[dtype], "device": "cpu", "eval-every": 0, "save-every": 0,
        "log-every": 1 if steps < 50 else 10,
        "activation-function": "gelu", "threads": torch.get_num_threads(),
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-P", "-m", "gptfast", "train", "--data", str(data), "--out", str(out), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    clock = {line["step"]: line["seconds"] for line in read_log(out / "log.jsonl") if line["event"] == "step"}
    first, last = min(step for step in clock if step >= skip), max(clock)
    return (clock[last] - clock[first]) / (last - first)


@each_dtype
@each_case
def test_loop(options: Any, tmp_path: Path, name: str, dtype: str) -> None:
    """`gptfast train`, with its log and its real loader, has at least 95 % of the rate of the bare step (-k "loop and char")."""
    from gptfast.data import prepare

    case, (steps, skip) = cases.CASES[name], LOOP[name]
    (tmp_path / "text.txt").write_text(cases.text())
    # a tokenizer of no more ids than the case's model has: the products of the head are the same
    meta = prepare([tmp_path / "text.txt"], tmp_path / "data", train_tokenizer=max(case.vocab, 320), val=0.0, progress=False)
    case = dataclasses.replace(case, vocab=-(-meta["vocab_size"] // 64) * 64)
    bare = cases.build("gptfast", case, dtype, case.dropout)
    task, runs = _task(bare, case), itertools.count()

    def step() -> float:
        start = time.perf_counter()
        for _ in range(steps - skip):
            task()
        return (time.perf_counter() - start) / (steps - skip)

    def loop() -> float:
        return _command(case, dtype, tmp_path / "data", tmp_path / f"run-{next(runs)}", steps, skip)

    task()
    timings = bench.alternate({"step": step, "gptfast train": loop}, options.rounds)
    ratio = timings["step"].median / timings["gptfast train"].median
    save(f"train_loop bare {name} {dtype}", [result("train_loop", case, dtype, n, t) for n, t in timings.items()], ratio=ratio)
    shown = ", ".join(f"{n} {t.median * 1e3:.1f} ms (spread {t.spread:.2f})" for n, t in timings.items())
    print(f"\n{name} {dtype}: {shown}: {100 * ratio:.1f} % of the bare rate")
    assert ratio >= 0.95


# --------------------------------------------------------------------------------------------------------------- memory, curves


@pytest.mark.parametrize("candidate", cases.CANDIDATES)
@each_dtype
@each_case
def test_memory(options: Any, name: str, dtype: str, candidate: str) -> None:
    """Peak resident memory above the imported process, in a process of its own; a compiled candidate's includes its compilation."""
    if options.candidates and candidate not in options.candidates.split(","):
        pytest.skip("not asked for")
    command = [sys.executable, str(Path(cases.__file__)), name, dtype, candidate, str(options.memory_steps)]
    place = checkout(options)
    done = subprocess.run([*command, *([str(place)] if place else [])], capture_output=True, text=True)
    if "refused: " in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"\n{candidate} {name} {dtype}: {found['above'] / 1e6:,.0f} MB above the imported process ({found['steps']} steps)")
    bench.write(f"train_memory {name} {dtype} {candidate}", [found], {}, bench.machine())


def _curve(candidate: str, case: Any, dtype: str, seed: int, steps: int) -> list[float]:
    step = cases.build(candidate, case, dtype, case.dropout, seed)
    return [loss for loss, _ in cases.losses(step, case, steps, seed, warmup=100)]


def _distance(a: list[float], b: list[float]) -> float:
    return statistics.mean((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5


@each_dtype
@each_case
def test_curve(options: Any, name: str, dtype: str) -> None:
    """d(a) = RMS over the steps of loss_a - loss of fp32 eager, mean of 3 seeds: d(fast) <= 2 d(eager in the same dtype) + 1e-3.
    Both drop the same elements."""
    case, steps = cases.CASES[name], options.curve_steps or CURVE_STEPS[name]
    fast, eager, last = [], [], 0.0
    for seed in SEEDS:
        exact = _curve("gptfast-eager", case, "float32", seed, steps)
        own = exact if dtype == "float32" else _curve("gptfast-eager", case, dtype, seed, steps)
        try:
            mine = _curve("gptfast", case, dtype, seed, steps)
        except Error as refusal:
            pytest.skip(str(refusal))
        fast.append(_distance(mine, exact))
        eager.append(_distance(own, exact))
        last = mine[-1]
    bound = 2 * statistics.mean(eager) + 1e-3
    distances = f"d(fast) {statistics.mean(fast):.2e}, d(eager) {statistics.mean(eager):.2e}, bound {bound:.2e}"
    print(f"\n{name} {dtype}, {steps} steps: {distances}")
    facts = {"steps": steps, "seeds": len(SEEDS), "fast": fast, "eager": eager, "bound": bound, "last_loss": last}
    bench.write(f"train_curve {name} {dtype}", [facts], {}, bench.machine())
    assert statistics.mean(fast) <= bound


# ---------------------------------------------------------------------------------------------------------------------- profile


@each_dtype
@each_case
def test_profile(options: Any, capsys: pytest.CaptureFixture[str], name: str, dtype: str) -> None:
    """Prints where the time of gptfast's step goes, by op; asked for with --profile."""
    if not options.profile:
        pytest.skip("asked for with --profile")
    case = cases.CASES[name]
    step = cases.build((options.candidates or "gptfast").split(",")[0], case, dtype, case.dropout)
    run, repeats = _task(step, case), 1 if name == "124m" else 5
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(repeats):
            run()
    table = profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40)
    with capsys.disabled():
        print(f"\n{name} {dtype}, {repeats} steps; {step.backends}\n{table}")
