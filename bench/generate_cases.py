"""What bench_generate.py measures: models and regimes, the candidates as processes, and the check before anything is timed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptfast.errors import Error
from gptfast.model import GPT2LMHeadModel
from gptfast.tokenizer import GPT2Tokenizer

THREADS = 2
SIZES = {"124m": "gpt2", "350m": "gpt2-medium", "774m": "gpt2-large", "1558m": "gpt2-xl"}
FORMATS = ("fp32", "bf16", "int8", "int4")
# what is checked: log P of these words, then the tokens that are chosen after half of them
TEXT = (
    "The committee met on a rainy Tuesday in October to decide what should become of the old harbour. Fishing had ended years"
    " before, the warehouses stood empty, and every winter a little more of the northern wall fell into the sea. Some wanted"
    " hotels, others a park; one man, who had spoken at every meeting since 1987, asked that nothing be done at all."
)  # fmt: skip


@dataclass(frozen=True)
class Regime:
    """Prompts and new tokens of a run; decode = (seconds of `new` tokens - seconds of 1) / (new - 1)."""

    batch: int
    prompt: int
    new: int
    modes: tuple[str, ...] = ("greedy",)

    @property
    def shape(self) -> tuple[int, ...]:
        """What a row of results is filed under: batch, prompt tokens, new tokens."""
        return self.batch, self.prompt, self.new


REGIMES = {
    "decode": Regime(1, 64, 128, ("greedy", "sampled")),
    "context": Regime(1, 896, 64),
    "batch": Regime(16, 64, 32),
    "large": Regime(1, 64, 32),
}


@dataclass(frozen=True)
class Shape:
    """A GPT-2 model's sizes, and what a token reads of it."""

    layers: int
    width: int
    vocab: int

    @staticmethod
    def of(folder: Path) -> Shape:
        config = json.loads((folder / "hf/config.json").read_text())
        return Shape(config["n_layer"], config["n_embd"], config["vocab_size"])

    def weight_bytes(self, block: float, head: float, output: int = 0) -> int:
        """Bytes that one token reads: matrices at `block` bytes a weight and `output` more for each of their outputs, the head at
        `head`; biases, norms and two embedding rows in fp32."""
        c = self.width
        matrices = self.layers * (12 * c * c * block + 9 * c * output) + self.vocab * (c * head + output)
        return round(matrices + 4 * (self.layers * 13 * c + 4 * c))

    def cache_bytes(self, item: int, tokens: float) -> int:
        return round(2 * self.layers * self.width * item * tokens)


@dataclass(frozen=True)
class Candidate:
    """One library at one weight format: the file beside peers/serve.py that drives it, its model below the folder, bytes a weight
    in the blocks and in the head, bytes beside each output's weights, and bytes of a number in its cache."""

    name: str
    kind: str
    form: str
    file: str
    block: float
    head: float
    output: int = 0
    item: int = 4


def _own(form: str, block: float, head: float, output: int, item: int) -> Candidate:
    return Candidate("gptfast", "gptfast", form, f"{form}.packed", block, head, output, item)


def _llama(form: str, size: float) -> Candidate:
    return Candidate("llama.cpp", "llama_cpp", form, f"{form}.gguf", size, size, 0, 2)


_OWN = {
    "fp32": _own("fp32", 4, 4, 0, 4), "bf16": _own("bf16", 2, 2, 0, 2), "int8": _own("int8", 1, 1, 8, 2),
    "int4": _own("int4", 0.5 + 2 / 64, 1 + 8 / 768, 0, 2),
}  # fmt: skip
_LLAMA = {"fp32": _llama("f32", 4), "bf16": _llama("bf16", 2), "int8": _llama("q8_0", 34 / 32), "int4": _llama("q4_0", 18 / 32)}
_HF = {"fp32": Candidate("transformers", "transformers", "fp32", "hf", 4, 4, 0, 4)}
_HF["bf16"] = Candidate("transformers", "transformers", "bf16", "hf", 2, 2, 0, 2)
_CT2 = {"fp32": Candidate("ctranslate2", "ctranslate2", "float32", "ct2-float32", 4, 4)}
_CT2["int8"] = Candidate("ctranslate2", "ctranslate2", "int8", "ct2-int8", 1, 1, 4)


def candidates(regime: str, form: str) -> list[Candidate]:
    """Who is compared in one run. int8 and int4 are also held against transformers bf16 at 896 tokens and in a batch; the larger
    models against llama.cpp alone."""
    found = [_OWN[form], *(group[form] for group in (_LLAMA, _HF, _CT2) if form in group)]
    if regime == "large":
        return found[:2]
    if regime != "decode" and form not in _HF:
        found.append(_HF["bf16"])
        if form not in _CT2:
            found.append(_CT2["int8"])
    return found


def modes(candidate: Candidate, regime: Regime) -> tuple[str, ...]:
    """"fixed" is evaluation alone, without a sampler: llama.cpp's, and beside sampling our own."""
    alone = candidate.kind == "llama_cpp" or (candidate.kind == "gptfast" and "sampled" in regime.modes)
    return ("fixed", *regime.modes) if alone else regime.modes


def label(candidate: Candidate, mode: str) -> str:
    return f"{candidate.name} {candidate.form}" + {"greedy": "", "sampled": " sampled", "fixed": " evaluation"}[mode]


# ------------------------------------------------------------------------------------------------------------------- processes


class Process:
    """A candidate in a process of its own, stopped except while it works. Raises gptfast.Error where it cannot run."""

    def __init__(self, candidate: Candidate, folder: Path) -> None:
        path = folder / candidate.file
        if not path.exists():
            raise Error(f"{path} is not there; bench/peers/make_models.py makes it")
        self.candidate, self.path = candidate, path
        script = Path(__file__).parent / "peers/serve.py"
        command = [sys.executable, "-P", str(script), candidate.kind, candidate.form, str(path), str(THREADS)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "TOKENIZERS_PARALLELISM": "false"}
        pipe = subprocess.PIPE
        self.child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=environment)
        self.about = self._answer()
        if "absent" in self.about:
            self.close()
            raise Error(f"{candidate.name} {candidate.form}: {self.about['absent']}")

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Sends one command and waits for its answer."""
        assert self.child.stdin is not None
        os.kill(self.child.pid, signal.SIGCONT)
        self.child.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.child.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            raise Error(f"{self.candidate.name} {self.candidate.form}: its process ended with {self.child.wait()}")
        os.kill(self.child.pid, signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise Error(f"{self.candidate.name} {self.candidate.form}: {answer['failed']}")
        return answer

    def close(self) -> None:
        self.child.kill()
        self.child.communicate()


@contextlib.contextmanager
def running(wanted: list[Candidate], folder: Path) -> Iterator[tuple[dict[Candidate, Process], dict[str, str]]]:
    """The processes of those that run here, and for the others the reason why not."""
    found: dict[Candidate, Process] = {}
    reasons: dict[str, str] = {}
    try:
        for candidate in wanted:
            try:
                found[candidate] = Process(candidate, folder)
            except Error as refusal:
                reasons[f"{candidate.name} {candidate.form}"] = str(refusal)
        yield found, reasons
    finally:
        for process in found.values():
            process.close()


@cache
def prompts(regime: Regime, seed: int) -> list[list[int]]:
    """Random ids: no prompt has a prefix in common with another, so that none is found in a prefix cache."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 50000, (regime.batch, regime.prompt), generator=generator).tolist()


class Measure:
    """Seconds a token of one candidate in one mode; `first` collects the seconds until the first token, prompt included."""

    def __init__(self, process: Process, regime: Regime, mode: str) -> None:
        self.process, self.regime, self.mode = process, regime, mode
        self.first: list[float] = []
        self.turn = 0
        self._run(8)

    def _run(self, new: int) -> float:
        self.turn += 1
        answer = self.process.ask("run", prompts=prompts(self.regime, self.turn), new=new, mode=self.mode, seed=self.turn)
        return float(answer["seconds"])

    def __call__(self) -> float:
        self.first.append(self._run(1))
        return (self._run(self.regime.new) - self.first[-1]) / (self.regime.new - 1)


# ----------------------------------------------------------------------------------------------------------------------- checks

# |error of log P|, as its root mean square over the text in units of the logits' standard deviation
ALLOWED = {"fp32": 1e-3, "f32": 1e-2, "float32": 1e-3, "bf16": 3e-2, "int8": 0.1, "q8_0": 0.1, "int4": 0.4, "q4_0": 0.4}


class Reference:
    """gptfast's eager engine in fp32 on the same weights."""

    def __init__(self, folder: Path) -> None:
        self.model = GPT2LMHeadModel.from_pretrained(folder / "hf", dtype=torch.float32).eval()
        tokenizer = GPT2Tokenizer.from_pretrained(folder / "hf")
        self.ids = [50256, *tokenizer.encode(TEXT)]
        self.logits = self._run(self.ids)
        self.spread = float(self.logits.std(-1).mean())

    @torch.no_grad()
    def _run(self, ids: list[int]) -> Tensor:
        return self.model(torch.tensor([ids])).logits[0]

    def check(self, process: Process, kinds: tuple[str, ...]) -> dict[str, float]:
        """Raises gptfast.Error unless the process computes this model: log P of the text, and what each mode of `kinds` chooses
        after half of it, teacher-forced through the reference. Returns the errors in units of the logits' spread."""
        name, allowed = f"{process.candidate.name} {process.candidate.form}", ALLOWED[process.candidate.form]
        theirs = torch.tensor(process.ask("score", ids=self.ids)["logprobs"])
        own = self.logits[:-1].log_softmax(-1).gather(1, torch.tensor(self.ids[1:])[:, None])[:, 0]
        error = float((theirs - own).pow(2).mean().sqrt()) / self.spread
        if not error <= allowed:
            off = f"{error:.2g} standard deviations of the logits, allowed are {allowed}"
            raise Error(f"benchmark of {name} refused: log P is off by {off}")
        found = {"logprob": round(error, 6)}
        prompt, new = self.ids[: len(self.ids) // 2], 24
        for mode in kinds:
            made = process.ask("run", prompts=[prompt], new=new, mode=mode, seed=1, keep=True)["tokens"][0]
            if len(made) != new:
                raise Error(f"benchmark of {name} refused: {len(made)} tokens where {new} were asked for")
            if mode == "fixed":
                continue
            logits = self._run([*prompt, *made])[len(prompt) - 1 : -1]
            chosen = logits.gather(1, torch.tensor(made)[:, None])[:, 0]
            boundary = logits.topk(50 if mode == "sampled" else 1).values[:, -1]
            behind = float((boundary - chosen).max()) / self.spread
            if not behind <= 4 * allowed:
                raise Error(f"benchmark of {name} refused: a {mode} token lies {behind:.2g} deviations behind what may be chosen")
            found[mode] = round(max(behind, 0.0), 6)
        return found


@cache
def reference(folder: Path) -> Reference:
    return Reference(folder)


def paired(theirs: list[float], ours: list[float]) -> float:
    """The median over the rounds of their seconds in units of ours: what drifts from round to round is not in it."""
    return statistics.median(t / o for t, o in zip(theirs, ours, strict=True))


def read_task(ways: list[Callable[[], float]], nbytes: int) -> Callable[[], float]:
    """Seconds to read `nbytes` by the fastest of the ways at this moment."""
    return lambda: nbytes / max(way() for way in ways for _ in range(2))
