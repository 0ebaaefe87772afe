"""What the accuracy runs share: an untrained model in a folder, runs over seeds, and their mean and spread as one JSON object."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import gptfast.backend as backend
from gptfast.benchmark import machine
from gptfast.config import GPT2Config
from gptfast.model import GPT2LMHeadModel
from gptfast.tokenizer import GPT2Tokenizer


def untrained(folder: Path, texts: Iterable[str], vocabulary: int, seed: int, **shape: Any) -> Path:
    """A folder with a tokenizer trained on `texts` and a model of random weights."""
    tokenizer = GPT2Tokenizer.train(texts, vocabulary)
    end = tokenizer.eos_token_id
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, **shape)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def over_seeds(seeds: Sequence[int], run: Callable[[int], dict[str, float]], **facts: Any) -> dict[str, Any]:
    """run(seed) for each seed; prints each result as it comes, and at the end all of them with mean and spread (max - min)."""
    results = []
    for seed in seeds:
        start = time.perf_counter()
        results.append({"seed": seed, **run(seed), "seconds_in_all": round(time.perf_counter() - start, 1)})
        print(json.dumps(results[-1]), flush=True)
    names = [name for name, value in results[0].items() if isinstance(value, float) and name != "seconds_in_all"]
    columns = {name: [result[name] for result in results] for name in names}
    summary = {
        **facts, "runs": results, "mean": {name: statistics.fmean(values) for name, values in columns.items()},
        "spread": {name: max(values) - min(values) for name, values in columns.items()},
        "machine": machine(), "backends": backend.summary("cpu"),
    }  # fmt: skip
    print(json.dumps(summary, indent=1))
    return summary
