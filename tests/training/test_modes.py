"""What a run can be asked for: precisions, optimizers, schedules, less memory, early stop, trackers, and exactly-once data."""

from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import gptfast.backend as backend
from gptfast import Error, checkpoint, testing
from gptfast.config import GPT2Config, TrainConfig
from gptfast.data import TokenData
from gptfast.model import GPT2LMHeadModel
from gptfast.options import keys, read_yaml
from gptfast.training import Trainer
from gptfast.training.loader import Batch, DataSource, Loader
from gptfast.training.log import read
from gptfast.training.optimizer import AdamW, groups
from gptfast.training.schedule import learning_rate
from gptfast.training.step import LossScale, Step

SHAPE: dict[str, Any] = {"vocab_size": 64, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "eos_token_id": 0}


def make(dropout: float = 0.0, **shape: Any) -> GPT2LMHeadModel:
    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(**{**SHAPE, **shape}, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout))


def trainer(out: Path | str = "", steps: int = 6, dropout: float = 0.0, **options: Any) -> Trainer:
    base = {"batch": 4, "lr": 1e-2, "warmup": 2, "save_every": 2, "eval_every": 0, "log_every": 1, "device": "cpu"}
    config = TrainConfig(out=str(out), steps=steps, **{**base, **options})
    return Trainer(make(dropout), torch.arange(4000) ** 2 % 61, torch.arange(200) ** 2 % 61, config, quiet=True)


def last(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run / f"checkpoints/step_{step:09d}"
    return {**checkpoint.read_tensors(folder / "model.safetensors"), **checkpoint.read_tensors(folder / "optimizer.safetensors")}


def logged(run: Path, event: str) -> list[dict[str, Any]]:
    return [record for record in read(run / "log.jsonl") if record["event"] == event]


# ------------------------------------------------------------------------------------------------------- precisions and optimizers


@pytest.mark.parametrize("options", [{"dtype": "fp16"}, {"optimizer": "muon"}, {"optimizer": "muon", "dtype": "bf16"}])
def test_it_learns_and_resumes_bit_for_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = trainer(tmp_path / "whole", 30, 0.1, **options)
    before = whole.evaluate()["val_loss"]
    assert whole.fit()["val_loss"] < 0.8 * before
    stopped = trainer(tmp_path / "stopped", 30, 0.1, **options)
    stopped._signal = 15
    with pytest.raises(SystemExit):
        stopped.fit()
    torch.manual_seed(99)
    trainer(tmp_path / "stopped", 30, 0.1, **options).fit(resume=True)
    a, b = last(tmp_path / "whole", 30), last(tmp_path / "stopped", 30)
    assert a.keys() == b.keys() and [name for name in a if not torch.equal(a[name], b[name])] == []
    other = {"optimizer": "adamw" if options.get("optimizer") == "muon" else "muon"}
    with pytest.raises(Error, match="optimizer was"):
        trainer(tmp_path / "whole", 32, 0.1, **{**options, **other}).fit(resume=True)


def test_fp16s_step_is_fp32s_and_its_scale_moves() -> None:
    rows = torch.randint(0, 60, (4, 17), generator=torch.Generator().manual_seed(0))
    batch = Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
    results = []
    for dtype in (torch.float32, torch.float16):
        model = make()
        step = Step(model, AdamW(groups(model.named_parameters(), 0.1), 1e-3), dtype)
        results.append(step([batch], 1e-3))
    assert float(results[1].loss) == pytest.approx(float(results[0].loss), rel=1e-3)
    assert float(results[1].norm) == pytest.approx(float(results[0].norm), rel=1e-2), "the scale is divided out"
    assert step.loss_scale is not None
    step.loss_scale.scale.fill_(2.0**24)  # overflows
    before = [p.detach().clone() for p in model.parameters()]
    assert float(step([batch], 1e-3).finite) == 0 and float(step.loss_scale.scale) == 2.0**23
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    scale = LossScale(torch.device("cpu"), 8.0, interval=3)
    seen = []
    for finite in (1, 1, 1, 1, 0, 1, 1, 1):
        scale.update(torch.tensor([float(finite)]))
        seen.append(float(scale.scale))
    assert seen == [8, 8, 16, 16, 8, 8, 8, 16]


@pytest.mark.once
def test_wsd_falls_only_at_the_end() -> None:
    config = TrainConfig(steps=100, lr=1.0, min_lr=0.1, warmup=10, schedule="wsd", decay=0.2)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[9:80] == [1.0] * 71 and rates[99] == pytest.approx(0.1) and rates[89] == pytest.approx(0.55)
    assert all(a > b for a, b in itertools.pairwise(rates[79:]))
    longer = TrainConfig(steps=1000, lr=1.0, min_lr=0.1, warmup=10, schedule="wsd", decay=0.2)
    assert [learning_rate(step, longer) for step in range(80)] == rates[:80]
    assert learning_rate(99, TrainConfig(steps=100, lr=1.0, schedule="wsd", decay=0.0, warmup=0)) == 1.0


# -------------------------------------------------------------------------------------------------------------------- less memory


def batch_of(rows: int, context: int, vocab: int) -> Batch:
    ids = torch.randint(0, vocab, (rows, context + 1), generator=torch.Generator().manual_seed(3))
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_checkpointing_has_the_same_gradients(dtype: torch.dtype) -> None:
    found = []
    for checkpointed in (False, True):
        model = make(0.1)
        model.transformer.gradient_checkpointing = checkpointed
        step = Step(model, AdamW(groups(model.named_parameters(), 0.1), 1e-3), dtype)
        torch.manual_seed(5)
        sums = step.gradients([batch_of(4, 16, 60)])
        found.append((sums.loss, {name: p.grad for name, p in model.named_parameters()}))
    assert torch.equal(found[0][0], found[1][0])
    assert [name for name, grad in found[0][1].items() if grad is None or not torch.equal(grad, found[1][1][name])] == []


@pytest.mark.once
def test_activation_checkpointing_needs_less_memory() -> None:
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    held = []
    for checkpointed in (False, True):
        model = make(n_embd=128, n_layer=8, n_positions=128)
        model.transformer.gradient_checkpointing = checkpointed
        step = Step(model, AdamW(groups(model.named_parameters(), 0.1), 1e-3))
        step([batch_of(16, 128, 60)], 1e-3)
        held.append(step._memory.bytes_held)  # type: ignore[attr-defined]
    assert held[1] < 0.4 * held[0], f"{held[0] / 1e6:.0f} MB without, {held[1] / 1e6:.0f} MB with"


@pytest.mark.once
def test_torch_compile_is_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and split into forward and backward; code generation is PyTorch's matter."""
    torch._dynamo.reset()
    compiled, calls = torch.compile, []

    def without_code(function: Any) -> Any:
        calls.append(function)
        return compiled(function, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", without_code)
    curves = []
    for wanted in (False, True):
        run = trainer(steps=4, dtype="bf16", compile=wanted)
        run.fit()
        curves.append([p.detach() for p in run.model.parameters()])
    assert len(calls) == 1
    for a, b in zip(*curves, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-3)


class Small:
    """Memory for `rows` rows: more of them at once fail at a real allocation."""

    def __init__(self, step: Step, rows: int) -> None:
        self.real, self.rows, self.asked = step.loss_sum, rows, list[int]()
        step.loss_sum = self  # type: ignore[method-assign, assignment]

    def __call__(self, batch: Batch) -> Any:
        self.asked.append(len(batch.ids))
        result = self.real(batch)
        if len(batch.ids) > self.rows:
            torch.empty(1 << 60, dtype=torch.uint8)
        return result


@pytest.mark.once
def test_out_of_memory_halves_the_microbatch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = trainer(tmp_path / "whole", batch=8, log_samples=True)
    whole.fit()
    tight = trainer(tmp_path / "tight", batch=8, log_samples=True)
    tight.quiet = False
    memory = Small(tight.step, 3)
    tight.fit()
    assert memory.asked[:6] == [8, 4, 2, 2, 2, 2] and tight.progress.microbatch == 2
    assert "out of memory: 4 sequences at a time instead of 8, in 2 parts; the batch stays the same" in capsys.readouterr().err
    assert tight.progress.tokens == whole.progress.tokens
    for kind in ("step", "samples"):
        for a, b in zip(logged(tmp_path / "whole", kind), logged(tmp_path / "tight", kind), strict=True):
            if kind == "samples":
                assert a["numbers"] == b["numbers"]
            else:
                assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    again = trainer(tmp_path / "tight", 8, batch=8)
    again.fit(resume=True)
    assert again.progress.microbatch == 2, "a resumed run cuts its steps the same way"
    hopeless = trainer(batch=2)
    Small(hopeless.step, 0)
    with pytest.raises(Error, match=r"too small for one sequence of 16 tokens.*--activation-checkpointing"):
        hopeless.fit()
    broken = trainer(batch=2)
    broken.step.loss_sum = lambda batch: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    with pytest.raises(ZeroDivisionError):
        broken.fit()


LIMITED = """
import resource, torch
torch.set_num_threads(1)
from gptfast.config import GPT2Config, TrainConfig
from gptfast.model import GPT2LMHeadModel
from gptfast.training import Trainer
def run(size=None):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_positions=128, n_embd=64, n_layer=2, n_head=4, eos_token_id=0,
                                       resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    config = TrainConfig(steps=1, batch=64, microbatch=size, warmup=0, eval_every=0, log_every=1, device="cpu")
    trainer = Trainer(model, torch.arange(40000) % 500, None, config)
    return trainer.fit()["loss"], trainer.progress.microbatch
whole = run()
for size in (32, 16, 8):  # oneDNN makes code for each shape, and needs address space of its own for it
    run(size)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
print(*whole, *run())
"""


@pytest.mark.once
def test_a_process_whose_address_space_is_limited_goes_on() -> None:
    done = subprocess.run([sys.executable, "-P", "-c", LIMITED], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    loss, size, tight_loss, tight_size = map(float, done.stdout.split())
    assert size == 64 and 1 <= tight_size < 64 and tight_loss == pytest.approx(loss, rel=1e-5)
    assert f"out of memory: {int(tight_size)} sequences at a time" in done.stderr


# ------------------------------------------------------------------------------------------------------------ evaluation and stop


@pytest.mark.once
def test_it_stops_when_it_gets_no_better_and_keeps_the_best(tmp_path: Path) -> None:
    scores = iter([1.0, 3.0, 2.0, 2.5, 2.9, 3.0])
    run = trainer(tmp_path / "run", 50, eval_every=2, patience=3, keep_best=True)
    at: list[torch.Tensor] = []

    def measure(model: Any) -> dict[str, float]:
        assert not model.training
        at.append(model.transformer.wte.weight.detach().clone())
        return {"score": next(scores)}

    run.measure = measure
    result = run.fit()
    assert result["step"] == 10 and result["best_step"] == 4 and result["score"] == 3.0
    assert torch.equal(GPT2LMHeadModel.from_pretrained(tmp_path / "run").transformer.wte.weight, at[1])
    assert not torch.equal(at[1], at[-2])
    assert [r["score"] for r in logged(tmp_path / "run", "eval")] == [1.0, 3.0, 2.0, 2.5, 2.9]
    assert "of the best evaluation, step 4" in (tmp_path / "run/README.md").read_text()
    with pytest.raises(Error, match="keep_best needs"):
        trainer(keep_best=True)


def test_the_interval_is_that_of_a_ratio() -> None:
    run = trainer(batch=2, microbatch=2, eval_sequences=12)
    assert isinstance(run.val, Loader)
    values = run.evaluate()
    means = [float(loss.detach()) / int(n) for i in range(6) for loss, n in [run.step.loss_sum(run.val.rows([2 * i, 2 * i + 1]))]]
    exact = torch.tensor(means, dtype=torch.float64)
    assert values["val_loss"] == pytest.approx(float(exact.mean()), rel=1e-6)
    assert values["val_ci"] == pytest.approx(1.96 * float(exact.std()) / math.sqrt(6), rel=1e-4)


# --------------------------------------------------------------------------------------------------------------- data of all kinds


class Examples:
    """A task's own rows: padded, with targets on a part of them, one row of each batch longer than the others."""

    windows, context, fingerprint, bytes_per_target = 10, 12, "examples", 0.0

    def samples(self, first: int, count: int) -> Batch:
        return self.rows([number % self.windows for number in range(first, first + count)])

    def rows(self, numbers: list[int]) -> Batch:
        length = max(3 + number for number in numbers)
        ids, targets, documents = torch.zeros(3, len(numbers), length, dtype=torch.int64).unbind()
        targets.fill_(-100)
        documents.fill_(-1)
        for row, number in enumerate(numbers):
            ids[row, : 3 + number] = torch.arange(3 + number) + number
            targets[row, 1 : 3 + number] = number
            documents[row, : 3 + number] = 0
        return Batch(ids, targets, documents, torch.arange(length).expand_as(ids), torch.tensor(numbers))


def test_a_tasks_own_rows(tmp_path: Path) -> None:
    source = Examples()
    assert isinstance(source, DataSource) and isinstance(Loader(TokenData.from_ids(range(99)), 9), DataSource)
    results = []
    for size in (5, 2):  # parts with unequal numbers of targets
        config = TrainConfig(out=str(tmp_path / str(size)), steps=20, batch=5, microbatch=size, lr=1e-2, warmup=2, eps=1e-3)
        results.append(Trainer(make(), source, source, config, quiet=True).fit())
    assert results[0]["tokens"] == 20 * 5 * (3 + 4.5) and results[0]["val_loss"] < 3
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-3)
    with pytest.raises(Error, match="rows of 12 tokens; the context is 8"):
        Trainer(make(), source, None, TrainConfig(context=8))


@pytest.mark.once
def test_every_sample_goes_into_the_weights_once(tmp_path: Path) -> None:
    """One epoch over 20 stops: half of them save (SIGTERM), half lose what was done since the last checkpoint (a crash)."""
    def once() -> Trainer:
        shape: dict[str, Any] = {"steps": 100, "batch": 3, "microbatch": 2}
        config = TrainConfig(out=str(tmp_path / "run"), save_every=3, eval_every=0, log_samples=True, **shape)
        return Trainer(make(), torch.arange(300 * 16 + 1) % 61, None, config, quiet=True)

    rng, stops, lost = random.Random(4), 0, 0
    run = once()
    assert isinstance(run.loader, Loader) and run.loader.windows == 300
    while stops < 20:
        at, crash = run.progress.step + rng.randint(1, 8), stops % 2
        compute = run._compute

        def stopping(report: Any, run: Trainer = run, at: int = at, crash: int = crash, compute: Any = compute) -> Any:
            if run.progress.step == at:
                if crash:
                    raise KeyError("crash")
                run._signal = 15
            return compute(report)

        run._compute = stopping  # type: ignore[method-assign]
        with pytest.raises((KeyError, SystemExit)):
            run.fit(resume=stops > 0)
        reached, stops = run.progress.step, stops + 1
        run = once()
        found = checkpoint.newest(tmp_path / "run")
        assert found is not None
        lost += reached - found[0]
        run.progress.step = found[0]
    run.fit(resume=True)
    records = logged(tmp_path / "run", "samples")
    assert sorted(record["step"] for record in records) == list(range(1, 101)) and lost > 5
    assert sorted(number for record in records for number in record["numbers"]) == list(range(300))
    lines = (tmp_path / "run/log.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["event"] == "samples" for line in lines) == 100 + lost


# ------------------------------------------------------------------------------------------------------- what a run leaves behind


@pytest.mark.once
def test_the_model_card_says_what_was_done(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", seed=7)
    result = run.fit()
    text = (tmp_path / "run/README.md").read_text()
    for piece in (
        run.loader.fingerprint, f"{result['tokens']:,} in 6 steps", f"{result['val_loss']:.4f}", "random weights, seed 7",
        f"{100 * math.exp(-result['val_loss']):.1f} %", "not advice",
    ):
        assert piece in text, piece
    (tmp_path / "config.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    assert TrainConfig(**read_yaml(tmp_path / "config.yaml", keys(TrainConfig))) == run.config


@pytest.mark.once
def test_tensorboard_gets_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer(tmp_path / "run", tensorboard=True).fit()
    found = events.EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    curve = {event.step: event.value for event in found.Scalars("train/loss")}
    assert curve == pytest.approx({r["step"]: r["loss"] for r in logged(tmp_path / "run", "step")}, rel=1e-6) and len(curve) == 6
    assert [event.step for event in found.Scalars("eval/val_loss")] == [6]
    with pytest.raises(Error, match="need --out"):
        trainer(tensorboard=True).fit()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(Error, match=r"pip install 'gptfast-torch\[tensorboard\]'"):
        trainer(tmp_path / "other", tensorboard=True).fit()


@pytest.mark.once
def test_weights_and_biases_gets_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in: what is called, and with what. WANDB_MODE=offline is the way to try the real one without a network."""
    rows: list[tuple[int, dict[str, Any]]] = []
    started: list[dict[str, Any]] = []
    ended: list[bool] = []
    run = SimpleNamespace(log=lambda values, step: rows.append((step, values)), finish=lambda: ended.append(True))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: started.append(options) or run))
    trainer(tmp_path / "run", wandb=True).fit()
    assert started[0]["name"] == "run" and started[0]["config"]["steps"] == 6 and ended == [True]
    assert [step for step, values in rows if "train/loss" in values] == [1, 2, 3, 4, 5, 6]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(Error, match=r"pip install 'gptfast-torch\[wandb\]'"):
        trainer(tmp_path / "other", wandb=True).fit()


@pytest.mark.once
def test_the_line_says_what_it_measures(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from gptfast import benchmark
    from gptfast.training import report

    monkeypatch.setattr(report, "_SETTLED", 0.0)
    monkeypatch.setattr(benchmark, "gemm_rate", lambda dtype, device, repeats: 1e9)
    run = trainer()
    run.quiet = False
    rate = run.fit()["tokens_per_s"]
    said = capsys.readouterr().err
    weights = 2 * 12 * 16**2 + 64 * 16
    percent = 100 * rate * (6 * weights + 12 * 2 * 16 * 16) / 1e9
    assert "MFU = tokens/s x (6 x weights" in said and "peak: 1 GFLOP/s" in said and " GB  ETA 0:00" in said
    assert f"MFU {percent:.0f} %" in said
