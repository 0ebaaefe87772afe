"""From what a user names - a folder, a hub id, a packed file - to a runner: which engine runs it, and why no other."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import gptfast.backend as backend
from gptfast import packed
from gptfast.cache import PAGE
from gptfast.config import GPT2Config
from gptfast.errors import Error
from gptfast.generation.runner import EagerRunner, Runner
from gptfast.model import GPT2LMHeadModel
from gptfast.packed_cache import cached
from gptfast.tokenizer import GPT2Tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of the eager engine


@dataclass
class Loaded:
    """A runner with what belongs to it. `model` is there where the runner runs it; `engine` is "cpp" or "eager"; `reason`: why it
    is not the C++ engine."""

    runner: Runner
    config: GPT2Config
    tokenizer: GPT2Tokenizer
    engine: str
    dtype: str
    device: str
    reason: str | None = None
    model: GPT2LMHeadModel | None = None


def cpp_reason(dtype: str, device: str) -> str | None:
    """None if the C++ engine runs weights of this dtype on this device, else why not. Pure and cheap."""
    if device != "cpu":
        return f"it runs on the CPU, and the device is {device}"
    if dtype not in packed.DTYPES:
        return f"dtype {dtype}; it takes {', '.join(packed.DTYPES)}"
    missing = backend.EXTENSIONS["_C"]
    if missing is not None:
        return missing
    if not hasattr(importlib.import_module("gptfast._C"), "Engine"):
        return "the extension was built without it"
    for op, name in backend.forced().items():
        if name != "cpp":
            return f"{op} is forced to {name}, and it calls no ops"
    return "eager is asked for" if backend.order("linear", "cpu")[0] == "eager" else None


def pick_device(device: str) -> str:
    """auto, cpu or cuda -> cpu or cuda. Raises gptfast.Error for another name, and for cuda where there is none."""
    if device not in ("auto", "cpu", "cuda"):
        raise Error(f"device is {device!r}; allowed: auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise Error("device is 'cuda', and torch sees no CUDA device here; allowed: auto, cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def load(path: str | Path, dtype: str | None, threads: int | None, device: str, contexts: int, pages: int | None) -> Loaded:
    """The runner for a model, with `pages` pages (default: `contexts` whole contexts). dtype None: a packed file's own, else fp32.

    Raises gptfast.LoadError for what cannot be read and gptfast.Error for a dtype that cannot be run here.
    """
    file = packed.open(path, dtype=dtype) if packed.is_packed(path) else None
    dtype = dtype or ("fp32" if file is None else file.dtype)
    if dtype not in DTYPES and dtype not in packed.DTYPES:
        raise Error(f"dtype is {dtype!r}; allowed: {', '.join(dict.fromkeys((*DTYPES, *packed.DTYPES)))}")
    device = pick_device(device)
    reason = cpp_reason(dtype, device)
    if reason is None:
        return _load_cpp(file or cached(path, dtype), threads, contexts, pages)
    if dtype not in DTYPES:
        kinds = ", ".join(DTYPES)
        raise Error(f"dtype is {dtype!r}, which the C++ engine computes, and it does not run here: {reason}; allowed: {kinds}")
    tokenizer = GPT2Tokenizer.from_pretrained(path) if file is None else file.tokenizer()
    model = GPT2LMHeadModel.from_pretrained(path, dtype=DTYPES[dtype], device=device).eval()
    restrict(model.config, tokenizer)
    runner = EagerRunner(model, pages or contexts * -(-model.config.n_positions // PAGE))
    return Loaded(runner, model.config, tokenizer, "eager", dtype, device, reason, model)


def _load_cpp(weights: packed.Packed, threads: int | None, contexts: int, pages: int | None) -> Loaded:
    tokenizer = weights.tokenizer()
    restrict(weights.config, tokenizer)
    cpp: Any = importlib.import_module("gptfast.generation.cpp")
    pages = pages or contexts * -(-weights.config.n_positions // PAGE)
    runner = cpp.CppRunner(weights, threads or torch.get_num_threads(), pages)
    return Loaded(runner, weights.config, tokenizer, "cpp", weights.dtype, "cpu")


def restrict(config: GPT2Config, tokenizer: GPT2Tokenizer) -> None:
    """Ids without a text are never drawn."""
    if len(tokenizer) < config.real_vocabulary:
        config.real_vocab_size = len(tokenizer)
