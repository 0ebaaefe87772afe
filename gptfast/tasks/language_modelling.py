"""Language modelling: any text, the loss on every token, measured as perplexity and bits per byte by generation/score.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gptfast import data as shards
from gptfast.errors import Error, LoadError
from gptfast.generation.score import token_logprobs
from gptfast.model import GPT2LMHeadModel
from gptfast.tokenizer import GPT2Tokenizer
from gptfast.training.trainer import resolve_device


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
    model: str | Path, data: str | Path, stride: int | None = None, dtype: str = "fp32", device: str = "auto"
) -> dict[str, Any]:
    """Perplexity and bits per byte of a model on text it was not trained on.

    model: a folder or a hub id. data: a folder from `gptfast prepare` (its held-out split), a text file (one document) or a .jsonl
    file of {"text": ...}. Each document is scored from <|endoftext|> on; a longer one in windows `stride` tokens apart (default:
    half the context). Returns task, tokens, bytes, loss (nats a token), perplexity, bits_per_byte, stride. Raises gptfast.Error
    where there is no text, or the data was made with another tokenizer.
    """
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if dtype not in kinds:
        raise Error(f"dtype is {dtype!r}; allowed: {', '.join(kinds)}")
    loaded = GPT2LMHeadModel.from_pretrained(model, dtype=kinds[dtype], device=resolve_device(device))
    tokenizer = GPT2Tokenizer.from_pretrained(model)
    path, total, tokens, size = Path(data), 0.0, 0, 0
    if path.is_dir():
        if tokenizer.fingerprint() != shards.read_meta(path)["vocabulary"]:
            raise LoadError(f"data {data}: prepared with another tokenizer than the model {model} has")
        split = shards.load(path, "val")
        total, tokens, size = (nats(loaded, split, stride), len(split) - 1, split.bytes) if len(split) else (0.0, 0, 0)
    else:
        for ids, length in _texts(path, tokenizer):
            total -= float(token_logprobs(loaded, ids, stride).double().sum())
            tokens, size = tokens + len(ids) - 1, size + length
    if tokens < 1 or size < 1:
        raise Error(f"data {data}: no text to evaluate on")
    return {
        "task": "lm", "tokens": tokens, "bytes": size, "loss": total / tokens, "perplexity": math.exp(min(total / tokens, 700.0)),
        "bits_per_byte": total / math.log(2) / size, "stride": stride or max(loaded.config.n_positions // 2, 1),
    }
