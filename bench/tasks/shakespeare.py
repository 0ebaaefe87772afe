"""tinyshakespeare by nanoGPT's character-level recipe for CPUs (4 layers, 128 wide, context 64, 12 sequences a step, 2,000 steps),
nanoGPT's train.py and gptfast's Trainer in turn, seed by seed; both scored over the whole validation split by the code below.

    python bench/tasks/shakespeare.py --text $GPTFAST_DATA/tinyshakespeare.txt --nanogpt PATH
    python bench/tasks/shakespeare.py --text ... --nanogpt PATH --seeds 1337 --steps 20           a minute, to see that it runs

The last tenth of the characters is the validation split, cut into windows of 64 characters without overlap; the loss is the mean
over the characters of all whole windows. Weights of nanoGPT's checkpoint are read into the same model as gptfast's (exact GELU).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gptfast.config import GPT2Config, TrainConfig
from gptfast.model import GPT2LMHeadModel
from gptfast.training import Trainer

CONTEXT, BATCH, STEPS = 64, 12, 2000


def _module(name: str, path: Path) -> Any:  # bench/ is no package
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


HERE = Path(__file__).parent
nanogpt = _module("gptfast_bench_nanogpt", HERE.parent / "peers/nanogpt.py")
common = _module("gptfast_bench_tasks_common", HERE / "common.py")


def empty(vocab: int) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=vocab, n_positions=CONTEXT, n_embd=128, n_layer=4, n_head=4, activation_function="gelu", resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


@torch.no_grad()
def score(model: GPT2LMHeadModel, ids: np.ndarray) -> float:  # type: ignore[type-arg]
    """Mean loss in nats a character over all whole windows of the validation split, in fp32."""
    model.eval()
    windows = (len(ids) - 1) // CONTEXT
    whole = torch.from_numpy(ids[: windows * CONTEXT + 1].astype(np.int64))
    rows = torch.stack((whole[:-1].view(windows, CONTEXT), whole[1:].view(windows, CONTEXT)))
    total = sum(float(model.loss_sum(x, y)[0]) for x, y in zip(*(part.split(256) for part in rows), strict=True))
    return total / (windows * CONTEXT)


def theirs(given: argparse.Namespace, ids: np.ndarray, vocab: int, seed: int) -> tuple[GPT2LMHeadModel, float]:  # type: ignore[type-arg]
    """The weights that nanoGPT's train.py ends with, and the seconds of its iterations without its evaluations."""
    flags = ["--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128", "--dropout=0.0"]
    flags += [f"--lr_decay_iters={given.steps}", "--always_save_checkpoint=True"]
    with tempfile.TemporaryDirectory() as place:
        script = nanogpt.TrainScript(given.nanogpt, Path(place, "n"), ids, vocab, flags)
        source = script.folder / "train.py"
        text, count = re.subn(r"manual_seed\(1337", f"manual_seed({seed}", source.read_text())
        assert count == 1, "nanoGPT's train.py has its seed in another form"
        source.write_text(text)
        # the checkpoint is written by the evaluation after the last step
        command = [part for part in script.command(given.steps) if not part.startswith("--eval_interval")]
        command = [sys.executable, *command[1:], f"--eval_interval={given.steps}"]
        done = subprocess.run(command, cwd=script.folder, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"nanoGPT's train.py ended with {done.returncode}: {done.stderr[-2000:]}")
        times = [float(found) for found in re.findall(r"^iter \d+: .* time ([\d.]+)ms", done.stdout, re.MULTILINE)]
        state = _state(next(script.folder.rglob("ckpt.pt")))
    model = empty(vocab)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = state.get(name)  # its models for training from scratch have no biases
            parameter.copy_(torch.zeros_like(parameter) if value is None else value.t() if name.endswith(nanogpt.CONV1D) else value)
    return model, sum(sorted(times)[: given.steps]) / 1e3


def _state(path: Path) -> dict[str, Any]:
    """A checkpoint's weights. Only tensors and plain values are read from it."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)["model"]
    return {name.removeprefix("_orig_mod."): value for name, value in state.items()}


def ours(given: argparse.Namespace, ids: np.ndarray, vocab: int, seed: int) -> tuple[GPT2LMHeadModel, float]:  # type: ignore[type-arg]
    config = TrainConfig(
        batch=BATCH, context=CONTEXT, steps=given.steps, lr=1e-3, min_lr=0.1, warmup=100, beta2=0.99, weight_decay=0.1, clip=1.0,
        dtype=given.dtype, device="cpu", seed=seed, eval_every=0, save_every=0,
    )
    torch.manual_seed(seed)
    model = empty(vocab)
    start = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
        Trainer(model, ids, None, config, quiet=True).fit()
    return model, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of github.com/karpathy/nanoGPT")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1338, 1339])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    given.nanogpt = given.nanogpt.resolve()
    torch.set_num_threads(given.threads)
    text = given.text.read_text(encoding="utf-8")
    number = {character: place for place, character in enumerate(sorted(set(text)))}
    ids = np.array([number[character] for character in text], dtype=np.uint16)
    cut = len(ids) * 9 // 10

    def run(seed: int) -> dict[str, float]:
        found = {}
        for name, train, data in (("nanogpt", theirs, ids), ("gptfast", ours, ids[:cut])):
            model, seconds = train(given, data, len(number), seed)
            found |= {f"{name} loss": score(model, ids[cut:]), f"{name} seconds": seconds}
        return found

    summary = common.over_seeds(given.seeds, run, steps=given.steps, dtype=given.dtype, threads=given.threads)
    mean = summary["mean"]
    gap, faster = mean["gptfast loss"] - mean["nanogpt loss"], mean["nanogpt seconds"] / mean["gptfast seconds"]
    print(json.dumps({"loss above nanoGPT's": round(gap, 4), "times faster": round(faster, 2)}))


if __name__ == "__main__":
    main()
