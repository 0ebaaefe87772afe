"""What bench_train.py measures: the models, their data, and the candidates that train them. Run as a command it measures one
candidate's memory:

    python bench/train_cases.py char-4x128 bfloat16 gptfast 20       bytes above the imported process after 20 steps, as JSON
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

import gptfast.backend as backend
from gptfast.config import GPT2Config, TrainConfig
from gptfast.data import TokenData
from gptfast.demo import corpus
from gptfast.errors import Error
from gptfast.model import GPT2LMHeadModel
from gptfast.training import Trainer
from gptfast.training.loader import Batch, Loader

CANDIDATES = ("gptfast", "gptfast-eager", "torch", "torch.compile", "nanogpt", "nanogpt.compile")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CHARACTERS = 65  # as many as tinyshakespeare has
# The first steps from equal weights must agree with plain PyTorch in fp32: |loss - its loss|, and the gradient's norm relatively
AGREEMENT = {"float32": (1e-3, 1e-3), "bfloat16": (1e-2, 3e-2)}
FIRST_STEPS = 3
Step = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]  # ids, targets, learning rate -> loss, norm


def load(path: Path) -> ModuleType:
    """The module in a file; bench/ is no package."""
    spec = importlib.util.spec_from_file_location(f"gptfast_bench_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


nanogpt = load(Path(__file__).parent / "peers/nanogpt.py")


@dataclass(frozen=True)
class Case:
    """A model, the batch of one step, and nanoGPT's recipe for it."""

    name: str
    layers: int
    heads: int
    width: int
    vocab: int
    context: int
    batch: int
    length: int
    dropout: float
    lr: float
    beta2: float
    flags: tuple[str, ...] = ()  # of nanoGPT's train.py, where it has a configuration for this model

    @property
    def shape(self) -> tuple[int, ...]:
        """What a row of results is filed under: B, T, layers, width, V."""
        return self.batch, self.length, self.layers, self.width, self.vocab

    @property
    def flops(self) -> float:
        """Of one step: 6 a matrix weight and token, and attention's 12 layers width T a token (nanoGPT's and PaLM's formula)."""
        weights = 12 * self.layers * self.width**2 + self.vocab * self.width
        return float(self.batch * self.length * (6 * weights + 12 * self.layers * self.width * self.length))


# nanoGPT's README gives the first character model for CPUs ("I only have a macbook"), config/train_shakespeare_char.py the second
_CPU = ("--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128", "--lr_decay_iters=2000", "--dropout=0.0")
CASES = {
    case.name: case
    for case in (
        Case("124m", 12, 12, 768, 50304, 1024, 4, 256, 0.0, 6e-4, 0.95),
        Case("char-4x128", 4, 4, 128, CHARACTERS, 64, 12, 64, 0.0, 1e-3, 0.99, _CPU),
        Case("char-6x384", 6, 6, 384, CHARACTERS, 256, 64, 256, 0.2, 1e-3, 0.99, ("--dropout=0.2",)),
    )
}

# ------------------------------------------------------------------------------------------------------------------------ data


@cache
def text() -> str:
    """Two million characters of the running interpreter's standard library: real text that every machine has."""
    return b"\n".join(corpus().train).decode()[: 2 * 10**6]


@cache
def tokens(vocab: int) -> Any:
    """ids [N]: characters by frequency for a small vocabulary, words by frequency for a large one; rare ones are the last id."""
    pieces = list(text()) if vocab == CHARACTERS else re.findall(r"\w+|\W", text())
    rank = {piece: min(place, vocab - 1) for place, (piece, _) in enumerate(Counter(pieces).most_common())}
    return np.array([rank[piece] for piece in pieces], dtype=np.uint16)


def batches(case: Case, seed: int, count: int) -> list[Batch]:
    """The first `count` batches of the trainer's own loader."""
    loader = Loader(TokenData.from_ids(tokens(case.vocab)), case.length, seed)
    return [loader.samples(number * case.batch, case.batch) for number in range(count)]


# ------------------------------------------------------------------------------------------------------------------ candidates


def _config(case: Case, dropout: float) -> GPT2Config:
    return GPT2Config(
        vocab_size=case.vocab, n_positions=case.context, n_embd=case.width, n_layer=case.layers, n_head=case.heads,
        activation_function="gelu", resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
        bos_token_id=None, eos_token_id=None,
    )


def model(case: Case, dropout: float, seed: int) -> GPT2LMHeadModel:
    """gptfast's model with the initial weights that every candidate gets."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(_config(case, dropout))


def trainer(case: Case, dtype: str, dropout: float, seed: int, **more: Any) -> Trainer:
    """gptfast's Trainer with nanoGPT's recipe: the step that is measured is the one that it built."""
    config = TrainConfig(
        batch=case.batch, context=case.length, lr=case.lr, beta2=case.beta2, weight_decay=nanogpt.WEIGHT_DECAY, clip=nanogpt.CLIP,
        dtype={"float32": "fp32", "bfloat16": "bf16"}[dtype], device="cpu", seed=seed, **more,
    )
    return Trainer(model(case, dropout, seed), tokens(case.vocab), None, config, quiet=True)


@contextlib.contextmanager
def recorded() -> Iterator[dict[str, set[str]]]:
    """Which backends each op took while this lasted."""
    seen: dict[str, set[str]] = {}
    choose = backend.choose

    def record(op: str, *inputs: Any, needs_grad: bool = False) -> str:
        name = choose(op, *inputs, needs_grad=needs_grad)
        seen.setdefault(op, set()).add(name)
        return name

    backend.choose = record
    try:
        yield seen
    finally:
        backend.choose = choose


def ran_as_asked(name: str, seen: dict[str, set[str]]) -> str:
    """'cpp: ...; eager: ...' for the ops of a step. Raises gptfast.Error where one did not run on what the table names for it, or
    where nothing of `gptfast` is gptfast's."""
    rows = {row["op"]: row for row in backend.table("cpu")}
    wrong = {op: ", ".join(sorted(on)) for op, on in seen.items() if on != {rows[op]["choice"]}}
    strays = [f"{op} ran on {on} and not on {rows[op]['choice']}" for op, on in wrong.items()]
    if strays:
        raise Error(f"benchmark of {name} refused: {'; '.join(strays)}")
    by_backend: dict[str, list[str]] = {}
    for op in sorted(seen):
        by_backend.setdefault(rows[op]["choice"], []).append(op)
    if name == "gptfast" and "cpp" not in by_backend:
        raise Error(f"benchmark of gptfast refused: no op of the step has a C++ kernel here ({rows['layer_norm']['cpp']})")
    missing = [op for op in by_backend.get("eager", []) if name == "gptfast" and rows[op]["cpp"] is not None]
    notes = f" (without a kernel: {' '.join(missing)})" if missing else ""
    return "; ".join(f"{place}: {' '.join(ops)}" for place, ops in by_backend.items()) + notes


class OwnStep:
    """The step of gptfast's Trainer; its first call verifies what the ops ran on and puts that into `backends`."""

    def __init__(self, name: str, case: Case, dtype: str, dropout: float, seed: int) -> None:
        self.name, self.backends = name, ""
        self.step = trainer(case, dtype, dropout, seed).step

    def __call__(self, ids: Tensor, targets: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        with backend.use("eager") if self.name == "gptfast-eager" else contextlib.nullcontext():
            if self.backends:
                result = self.step([Batch(ids, targets)], lr)
            else:
                with recorded() as seen:
                    result = self.step([Batch(ids, targets)], lr)
                self.backends = ran_as_asked(self.name, seen)
        return result.loss, result.norm


def build(name: str, case: Case, dtype: str, dropout: float, seed: int = 0, checkout: Path | None = None) -> Any:
    """A candidate with the weights of `seed`: call it with ids, targets and a learning rate for (loss, norm); `backends` says what
    its ops run on, after the first call. Raises gptfast.Error with the reason where it cannot run here."""
    if name.startswith("gptfast"):
        return OwnStep(name, case, dtype, dropout, seed)
    sizes = case.vocab, case.context, case.layers, case.heads, case.width, dropout
    if name.startswith("nanogpt"):
        if checkout is None:
            raise Error("a checkout of nanoGPT is given with --nanogpt PATH")
        peer = nanogpt.from_checkout(checkout, *sizes)
    else:
        peer = nanogpt.GPT(*sizes)
    nanogpt.load_weights(peer, dict(model(case, dropout, seed).state_dict()))
    peer.train()
    return nanogpt.Step(peer, case.lr, (0.9, case.beta2), DTYPES[dtype], name.endswith(".compile"))


def losses(step: Step, case: Case, steps: int, seed: int = 0, warmup: int = 0) -> list[tuple[float, float]]:
    """(loss, norm) of the first steps; the learning rate rises over `warmup` steps."""
    found = []
    for number, batch in enumerate(batches(case, seed, steps)):
        lr = case.lr * min((number + 1) / (warmup + 1), 1.0)
        loss, norm = step(batch.ids, batch.targets, lr)
        found.append((float(loss), float(norm)))
    return found


@cache
def reference(case: Case) -> list[tuple[float, float]]:
    """The first steps of plain PyTorch in fp32 without dropout."""
    return losses(build("torch", case, "float32", 0.0), case, FIRST_STEPS)


def check(name: str, step: Step, case: Case, dtype: str) -> float:
    """The largest difference of a loss from the reference. Raises gptfast.Error where a candidate computes something else."""
    within, relative = AGREEMENT[dtype]
    worst = 0.0
    for number, (mine, theirs) in enumerate(zip(losses(step, case, FIRST_STEPS), reference(case), strict=True)):
        worst = max(worst, abs(mine[0] - theirs[0]))
        if not (abs(mine[0] - theirs[0]) <= within and abs(mine[1] - theirs[1]) <= relative * theirs[1]):
            values = f"loss {mine[0]:.5f} and norm {mine[1]:.5f}, plain PyTorch in fp32 has {theirs[0]:.5f} and {theirs[1]:.5f}"
            raise Error(f"benchmark of {name} refused, step {number} of {case.name} in {dtype} is wrong: {values}")
    return worst


# ---------------------------------------------------------------------------------------------------------------------- memory


def _status(key: str) -> int:
    found = re.search(rf"^{key}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def memory(case: Case, dtype: str, name: str, steps: int, checkout: Path | None) -> dict[str, Any]:
    """Peak resident bytes over `steps` steps above those of this process before it had a model."""
    given = itertools.cycle(batches(case, 0, 4))
    torch.ones(1 << 16).sum()  # the thread pool
    before = _status("VmRSS")
    step = build(name, case, dtype, case.dropout, checkout=checkout)
    for batch, _ in zip(given, range(steps), strict=False):
        step(batch.ids, batch.targets, case.lr)
    return {"before": before, "peak": _status("VmHWM"), "above": _status("VmHWM") - before, "steps": steps}


if __name__ == "__main__":
    case_name, dtype_name, candidate_name, count, *folder = sys.argv[1:]
    place = Path(folder[0]) if folder else None
    try:
        print(json.dumps(memory(CASES[case_name], dtype_name, candidate_name, int(count), place)))
    except Error as refusal:
        sys.exit(f"refused: {refusal}")
