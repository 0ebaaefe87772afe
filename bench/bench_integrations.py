"""patch(): transformers' own GPT-2 with gptfast's ops in it, beside the same model without, in turn in one run.

    pytest bench/bench_integrations.py -k train -s       a training step of the 124M shape in transformers' loop, B=4 T=256, bf16 autocast
    pytest bench/bench_integrations.py -k generate -s    generate: 64 tokens of prompt, 32 new ones, greedy, fp32 and bf16 weights

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


def steps(dropout: float) -> dict[str, Step]:
    return {"transformers": Step(dropout, None), "patched": Step(dropout, True), "patched, no logits": Step(dropout, False)}


@cache
def trained(dropout: float, rounds: int) -> dict[str, dict[str, Any]]:
    with bench_agreement():
        first = {name: [step() for _ in range(2)] for name, step in steps(0.0).items()}
    for name, losses in first.items():
        assert losses == pytest.approx(first["transformers"], abs=1e-2), name
    tasks: dict[str, Any] = dict(steps(dropout))
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
