"""Is `gptfast estimate` within 25 %? Three shapes, estimated and then trained, one after the other; peak memory in a process each.

    python bench/estimate.py [--steps 40] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile

import torch

from gptfast import GPT2Config, GPT2LMHeadModel, TrainConfig, estimate
from gptfast.training import Trainer

CASES = {
    "char-4x128": (GPT2Config(vocab_size=65, n_positions=64, n_embd=128, n_layer=4, n_head=4), 12, "fp32"),
    "6x384": (GPT2Config(vocab_size=8192, n_positions=256, n_embd=384, n_layer=6, n_head=6), 8, "bf16"),
    "124m": (GPT2Config(vocab_size=50304, n_positions=256), 4, "bf16"),
}


def train(name: str, steps: int) -> dict[str, float]:
    """tokens/s of a run, and what its peak memory is above the imported process."""
    config, batch, dtype = CASES[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    settings = TrainConfig(batch=batch, steps=steps, dtype=dtype, device="cpu", save_every=0)
    ids = torch.randint(config.vocab_size, (200_000,))
    found = Trainer(GPT2LMHeadModel(config), ids, None, settings, quiet=True).fit()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"tokens_per_s": found["tokens_per_s"], "bytes": peak << 10}


def main() -> int:
    """Prints a line a shape; 1 where a figure is off by more than 25 %."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--train", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.train:
        with open(given.out, "w") as file:
            json.dump(train(given.train, given.steps), file)
        return 0
    worst = 0.0
    for name, (config, batch, dtype) in CASES.items():
        settings = TrainConfig(batch=batch, steps=given.steps, dtype=dtype, device="cpu")
        said = estimate.estimate(config, settings)
        with tempfile.NamedTemporaryFile() as file:
            same = ["--steps", str(given.steps), "--threads", str(given.threads), "--train", name, "--out", file.name]
            subprocess.run([sys.executable, __file__, *same], check=True)
            reached = json.load(open(file.name))  # noqa: SIM115
        off = said["tokens_per_s"] / reached["tokens_per_s"] - 1, said["memory"]["total"] / reached["bytes"] - 1
        print(f"{name:12s} {dtype}: {said['tokens_per_s']:9,.0f} said, {reached['tokens_per_s']:9,.0f} reached ({off[0]:+.1%}); "
              f"{said['memory']['total'] / 1e6:8,.1f} MB said, {reached['bytes'] / 1e6:8,.1f} held ({off[1]:+.1%})")  # fmt: skip
        worst = max(worst, abs(off[0]))
    return int(worst > 0.25)


if __name__ == "__main__":
    sys.exit(main())
