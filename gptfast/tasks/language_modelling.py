"""Language modelling: any text, the loss on every token, measured as perplexity and bits per byte by generation/score.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gptfast import data as shards
from gptfast.errors import Error, LoadError
from gptfast.generation import Engine
from gptfast.generation.score import token_logprobs
from gptfast.model import GPT2LMHeadModel
from gptfast.packed import config_of, is_packed
from gptfast.tokenizer import GPT2Tokenizer


def nats(model: GPT2LMHeadModel, data: shards.TokenData, stride: int | None = None) -> float:
    """-log P of every token of `data` but the first, which is given, summed. Windows as in generation/score.py."""
    return -float(token_logprobs(model, torch.from_numpy(data.read(0, len(data))), stride).double().sum())


def _texts(path: Path, tokenizer: GPT2Tokenizer) -> Iterator[tuple[list[int], int]]:
    """(ids after <|endoftext|>, bytes) of each document in a .jsonl file, or of a text file as one document."""
    if tokenizer.eos_token_id is None:
        raise Error("the tokenizer has no <|endoftext|>, which the first token of a text is predicted from")
    for text in shards.read_texts(path):
        yield [tokenizer.eos_token_id, *tokenizer.encode(text)], len(text.encode("utf-8", "surrogatepass"))


def evaluate(
    model: str | Path, data: str | Path, stride: int | None = None, dtype: str = "fp32", device: str = "auto",
    threads: int | None = None,
) -> dict[str, Any]:
    """Perplexity and bits per byte of a model on text it was not trained on; of another dtype than fp32 beside fp32's.

    model: a folder, a hub id or a packed file. data: a folder from `gptfast prepare` (its held-out split), a text file (one
    document) or a .jsonl file of {"text": ...}. Each document is scored from <|endoftext|> on; a longer one in windows `stride`
    tokens apart (default: half the context). Returns task, dtype, engine, tokens, bytes, loss (nats a token), perplexity,
    bits_per_byte, stride, and for another dtype of a model whose fp32 weights are there `fp32` {loss, perplexity, bits_per_byte}
    and difference_percent of the perplexities. Raises gptfast.Error where there is no text, or data is of another tokenizer.
    """
    found = _measure(model, data, stride, dtype, device, threads)
    if dtype != "fp32" and not is_packed(model):
        whole = _measure(model, data, stride, "fp32", device, threads)
        found["fp32"] = {key: whole[key] for key in ("loss", "perplexity", "bits_per_byte")}
        found["difference_percent"] = 100 * (math.exp(found["loss"] - whole["loss"]) - 1)
    return found


def _measure(
    model: str | Path, data: str | Path, stride: int | None, dtype: str, device: str, threads: int | None
) -> dict[str, Any]:
    """evaluate() in one dtype."""
    path, total, tokens, size = Path(data), 0.0, 0, 0
    with Engine(model, dtype, threads, device=device) as engine:
        how = engine.describe()
        if path.is_dir():
            if engine.tokenizer.fingerprint() != shards.read_meta(path)["vocabulary"]:
                raise LoadError(f"data {data}: prepared with another tokenizer than the model {model} has")
            split = shards.load(path, "val")
            if len(split):
                total -= float(engine.token_logprobs(torch.from_numpy(split.read(0, len(split))), stride).double().sum())
                tokens, size = len(split) - 1, split.bytes
        else:
            for ids, length in _texts(path, engine.tokenizer):
                total -= float(engine.token_logprobs(ids, stride).double().sum())
                tokens, size = tokens + len(ids) - 1, size + length
    if tokens < 1 or size < 1:
        raise Error(f"data {data}: no text to evaluate on")
    return {
        "task": "lm", "dtype": dtype, "engine": how, "tokens": tokens, "bytes": size, "loss": total / tokens,
        "perplexity": math.exp(min(total / tokens, 700.0)), "bits_per_byte": total / math.log(2) / size,
        "stride": stride or max(config_of(model).n_positions // 2, 1),
    }
