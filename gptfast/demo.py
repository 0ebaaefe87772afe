"""The demonstration: a GPT that learns Python in two minutes from the source text of the running interpreter's standard library.

The text is real, on every machine, and needs no network. Files are dealt to training and held-out text by a hash of their path. The
number of tokens is fixed by --minutes (about that long on two cores), so a seed gives the same model wherever the arithmetic is the
same; what it learned is measured as a compressor would be, in bits per byte over every byte of the held-out text.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import lzma
import math
import os
import shutil
import sys
import sysconfig
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import gptfast.backend as backend
from gptfast.checkpoint import remove_stale
from gptfast.config import GPT2Config, TrainConfig
from gptfast.data import TokenData
from gptfast.errors import Error, LoadError
from gptfast.generation import Engine, SamplingParams
from gptfast.model import GPT2LMHeadModel
from gptfast.plot import plot
from gptfast.tasks.language_modelling import nats
from gptfast.tokenizer import GPT2Tokenizer
from gptfast.training import Trainer
from gptfast.training.log import Line, Log

EXCLUDED = {"test", "tests", "encodings", "pydoc_data", "idlelib", "site-packages", "dist-packages", "__pycache__"}
HELD_OUT = 0.1  # of the files
VOCABULARY, CONTEXT = 4096, 128
LAYERS, HEADS, WIDTH = 3, 2, 128
BATCH = 8  # sequences a step
STEPS_A_MINUTE = 900
PROMPTS = ("def read_lines(path):\n", "class Stack:\n", "import os\n")


class Corpus(NamedTuple):
    """Documents of both splits, in a fixed order."""

    train: list[bytes]
    held_out: list[bytes]


def corpus() -> Corpus:
    """The standard library's .py files that are UTF-8, without tests, tables and installed packages (about 10 MB).

    Raises gptfast.LoadError where the interpreter has no library in source form.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    splits, places = Corpus([], []), []
    for folder, inside, names in os.walk(root):
        inside[:] = [name for name in inside if name not in EXCLUDED]
        places += [Path(folder, name).relative_to(root) for name in names if name.endswith(".py")]
    for place in sorted(places):
        path = root / place
        try:
            text = path.read_bytes()
            text.decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text:
            share = int.from_bytes(hashlib.sha256(place.as_posix().encode()).digest()[:8], "big") / 2.0**64
            (splits.held_out if share < HELD_OUT else splits.train).append(text)
    if not splits.train or not splits.held_out:
        raise LoadError(f"no Python source in {root}: this interpreter's standard library is not there as text")
    return splits


def encode(documents: list[bytes], tokenizer: GPT2Tokenizer) -> TokenData:
    """<|endoftext|>, then every document followed by one."""
    eos = tokenizer.eos_token_id
    ids = [eos]
    for tokens in tokenizer([text.decode("utf-8") for text in documents])["input_ids"]:
        ids += tokens
        ids.append(eos)
    return TokenData.from_ids(torch.tensor(ids, dtype=torch.int32), eos)


def run(minutes: float = 2.0, out: str | Path = "runs/demo", seed: int = 0, quiet: bool = False) -> dict[str, Any]:
    """Trains, measures, writes; returns the figures. `out` becomes a Hugging Face folder with log.jsonl and loss.png, by rename
    when it is complete; an older one moves aside (out.1, out.2, ...).

    minutes: about how long training takes on two cores; the number of tokens is proportional to it. quiet: nothing is printed.
    Raises gptfast.Error for minutes that are not positive.
    """
    if not 0.01 <= minutes <= 1e5:
        raise Error(f"minutes is {minutes}; allowed: 0.01 to 100000")
    out = Path(out)
    remove_stale(out.parent, glob.escape(out.name))
    say = _silent if quiet else partial(print, flush=True)  # flushed: the live line goes to stderr between these
    say(f"backends: {backend.summary('cpu')}")
    with Line(not quiet) as line:
        line.show("reading the standard library, training a tokenizer", now=True)
        text = corpus()
        tokenizer = GPT2Tokenizer.train((document.decode("utf-8") for document in text.train), VOCABULARY)
        train, held_out = encode(text.train, tokenizer), encode(text.held_out, tokenizer)
    size = sum(map(len, text.train)), sum(map(len, text.held_out))
    say(f"data: {size[0] / 1e6:.1f} MB of Python to learn from ({len(train):,} tokens), {size[1] / 1e6:.2f} MB held out")
    temporary = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    try:
        model, summary = _train(train, tokenizer, temporary, minutes, seed, quiet)
        figures = _measure(model, held_out, b"".join(text.held_out), quiet)
        _write_facts(temporary, {**summary, **figures})
        if not (picture := plot([temporary], temporary / "loss.png")).is_file:
            say(picture.text)
        _publish(temporary, out)
    except OSError as error:
        if isinstance(error, Error):
            raise
        raise LoadError(f"output {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if not quiet:
        _report(figures, out)
        _samples(out, seed)
        command = _command()
        print(f"\nTry next:\n  {command} generate {out} \"class Queue:\"\n  {command} demo --minutes 20\n  {command} backends")
    return {**summary, **figures, "out": str(out)}


def _silent(*text: str) -> None:
    """What stands for print where nothing is to be printed."""


def _train(
    data: TokenData, tokenizer: GPT2Tokenizer, folder: Path, minutes: float, seed: int, quiet: bool
) -> tuple[GPT2LMHeadModel, dict[str, Any]]:
    eos = tokenizer.eos_token_id
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=len(tokenizer), n_positions=CONTEXT, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=eos, eos_token_id=eos,
    ))  # fmt: skip
    steps = max(round(minutes * STEPS_A_MINUTE), 1)
    config = TrainConfig(
        out=str(folder), steps=steps, batch=BATCH, lr=4e-3, min_lr=0.0, warmup=steps // 10, eps=1e-6, device="cpu",
        seed=seed, log_every=20, eval_every=0, save_every=0,
    )  # fmt: skip
    parameters = sum(p.numel() for p in model.parameters())
    if not quiet:
        tokens = steps * BATCH * CONTEXT
        how = f"fp32, {torch.get_num_threads()} threads"
        print(f"model: {parameters / 1e6:.1f} M parameters, {how}, {tokens / 1e6:.1f} M tokens to learn from", flush=True)
    return model, Trainer(model, data, None, config, tokenizer, quiet).fit()


def _measure(model: GPT2LMHeadModel, held_out: TokenData, text: bytes, quiet: bool) -> dict[str, Any]:
    """Bits per byte of the model, gzip -9 and xz -9 over the same bytes."""
    with Line(not quiet) as line:
        line.show("measuring on the held-out text", now=True)
        total = nats(model, held_out) / math.log(2)
        sizes = {"gzip": len(gzip.compress(text, 9, mtime=0)), "xz": len(lzma.compress(text, preset=9))}
    return {
        "bits_per_byte": total / len(text), "held_out_bytes": len(text),
        **{f"{name}_bits_per_byte": 8 * count / len(text) for name, count in sizes.items()},
    }


def _write_facts(folder: Path, facts: dict[str, Any]) -> None:
    problem = Log(folder / "log.jsonl").write("demo", **{key: value for key, value in facts.items() if key != "out"})
    if problem:
        raise LoadError(problem)


def _publish(temporary: Path, out: Path) -> None:
    """Renames the complete folder into place; what was there moves aside."""
    if out.exists():
        number = next(n for n in range(1, 10**9) if not out.with_name(f"{out.name}.{n}").exists())
        os.rename(out, out.with_name(f"{out.name}.{number}"))
    os.rename(temporary, out)


def _report(figures: dict[str, Any], out: Path) -> None:
    print(f"\nbits per byte over {figures['held_out_bytes']:,} bytes of Python it never saw")
    rows = (("gptfast", "bits_per_byte"), ("gzip -9", "gzip_bits_per_byte"), ("xz -9", "xz_bits_per_byte"))
    for name, key in sorted(rows, key=lambda row: figures[row[1]]):
        print(f"  {name:8s} {figures[key]:.3f}")
    print(f"\nthe model, its log and loss.png are in {out}")


def _command() -> str:
    """What to type for this installation's gptfast: its name if that is on PATH, else its place."""
    beside = Path(sys.executable).with_name("gptfast")
    found = shutil.which("gptfast")
    if found is not None and (not beside.exists() or os.path.samefile(found, beside)):
        return "gptfast"
    return os.path.relpath(beside) if beside.exists() else f"{Path(sys.executable).name} -m gptfast"


def _samples(folder: Path, seed: int) -> None:
    """Three texts, printed as they are made."""
    with Engine(str(folder)) as engine:
        for number, prompt in enumerate(PROMPTS):
            print(f"\n--- {prompt.strip()}\n{prompt}", end="", flush=True)
            for chunk in engine.stream(prompt, SamplingParams(temperature=0.7, top_k=50, max_tokens=80, seed=seed + number)):
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
            print()
