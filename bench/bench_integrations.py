"""patch(): transformers' own GPT-2 with gptfast's ops in it, beside the same model without, in turn in one run.

    pytest bench/bench_integrations.py -k train -s       a training step, 124M, B=4 T=256, bf16 autocast
    pytest bench/bench_integrations.py -k generate -s    generate: 64 tokens of prompt, 32 new ones, greedy, fp32 and bf16

The loop is that of transformers' Trainer on one device: forward under autocast, backward, clip_grad_norm_, torch's fused AdamW,
zero_grad. Both models start from the same random weights; `dropout` is GPT-2's default of 0.1 and 0. Nothing is timed before both
agree: losses of the first steps without dropout to 1e-2, and equal tokens in fp32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from gptfast import benchmark as bench
from gptfast.integrations.transformers import patch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
transformers.logging.set_verbosity_error()

replay = bench.Replay()
LAYERS, WIDTH, VOCAB, BATCH, LENGTH, PROMPT, NEW = 12, 768, 50257, 4, 256, 64, 32
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# 6 a weight and token, attention 12 layers width T a token, as in bench_train.py
FLOPS = float(BATCH * LENGTH * (6 * (12 * LAYERS * WIDTH**2 + VOCAB * WIDTH) + 12 * LAYERS * WIDTH * LENGTH))


def model(dropout: float, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, eos_token_id=None, pad_token_id=0)
    return transformers.GPT2LMHeadModel(config).to(dtype)


class Step:
    """One training step; returns the loss."""

    def __init__(self, dropout: float, logits: bool | None) -> None:
        self.model = model(dropout).train()
        self.report = None if logits is None else patch(self.model, logits=logits)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-5, fused=True)
        self.ids = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))

    def __call__(self) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.model(self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


LOGITS = {"transformers": None, "patched": True, "patched, no logits": False}


def save(
    name: str, timings: dict[str, bench.Timing], reports: dict[str, Any], dtype: torch.dtype, flops: float | None
) -> dict[str, dict[str, Any]]:
    """Rows by candidate, written to the results with the ops that ran; refuses a patched model that called none."""
    limits = bench.ceilings("cpu", [dtype])
    shape, ceiling = (BATCH, LENGTH, LAYERS, WIDTH, VOCAB), f"gemm_{str(dtype).removeprefix('torch.')}"
    rows = {}
    for candidate, timing in timings.items():
        row = bench.row(name.split()[1], shape, dtype, "both", candidate, timing, limits, flops=flops, ceiling=ceiling)
        ratio = timings["transformers"].median / timing.median
        rows[candidate] = {**row, "vs_transformers": round(ratio, 3)}
        if reports[candidate] is not None:
            assert sum(reports[candidate].calls.values()) > 0, f"{candidate} called no op"
            rows[candidate]["ops"] = str(reports[candidate]).splitlines()
        print(f"{name}: {candidate} {timing.median * 1e3:.1f} ms, {ratio:.2f}x (spread {timing.spread:.2f})")
    bench.write(name, list(rows.values()), limits, {**bench.machine(), "command": " ".join(["pytest", *sys.argv[1:]])})
    return {candidate: {**row, "timing": timings[candidate]} for candidate, row in rows.items()}


@cache
def trained(dropout: float, rounds: int) -> dict[str, dict[str, Any]]:
    first = []
    for logits in LOGITS.values():
        step = Step(0.0, logits)
        first.append([step() for _ in range(2)])
        del step
    assert all(losses == pytest.approx(first[0], abs=1e-2) for losses in first), first
    tasks = {name: Step(dropout, logits) for name, logits in LOGITS.items()}
    timings = bench.interleave(tasks, rounds=rounds, seconds=0.0, keep_memory=False)
    return save(f"integrations train dropout {dropout}", timings, {n: t.report for n, t in tasks.items()}, torch.bfloat16, FLOPS)


@cache
def generated(form: str, rounds: int) -> dict[str, dict[str, Any]]:
    models = {name: model(0.0, DTYPES[form]).eval() for name in ("transformers", "patched")}
    report = patch(models["patched"])
    ids = torch.randint(0, VOCAB, (1, PROMPT), generator=torch.Generator().manual_seed(1))

    def task(which: Any) -> Callable[[], Any]:
        return lambda: which.generate(ids, max_new_tokens=NEW, do_sample=False)

    tasks = {name: task(which) for name, which in models.items()}
    if form == "fp32":
        assert torch.equal(*(run() for run in tasks.values()))
    timings = bench.interleave(tasks, rounds=rounds, seconds=0.0, keep_memory=False)
    return save(f"integrations generate {form}", timings, {"transformers": None, "patched": report}, DTYPES[form], None)


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    return int(request.config.option.rounds)


@pytest.mark.parametrize("candidate", LOGITS)
@pytest.mark.parametrize("dropout", [0.1, 0.0])
@pytest.mark.benchmark(timer=replay)
def test_train(benchmark: Any, rounds: int, dropout: float, candidate: str) -> None:
    row = trained(dropout, rounds)[candidate]
    replay.show(benchmark, row["timing"], vs_transformers=row["vs_transformers"])


@pytest.mark.parametrize("candidate", ["transformers", "patched"])
@pytest.mark.parametrize("form", DTYPES)
@pytest.mark.benchmark(timer=replay)
def test_generate(benchmark: Any, rounds: int, form: str, candidate: str) -> None:
    row = generated(form, rounds)[candidate]
    replay.show(benchmark, row["timing"], vs_transformers=row["vs_transformers"])
