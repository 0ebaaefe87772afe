"""What `gptfast train` calls: a data folder and a configuration in, a Hugging Face folder out."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

import gptfast.backend as backend
from gptfast import data
from gptfast.config import GPT2Config, TrainConfig
from gptfast.errors import Error, LoadError
from gptfast.model import GPT2LMHeadModel
from gptfast.tokenizer import GPT2Tokenizer
from gptfast.training import log
from gptfast.training.distributed import start
from gptfast.training.state import check_out
from gptfast.training.trainer import Trainer, resolve_device


def train(
    config: TrainConfig, model_config: GPT2Config | None = None, resume: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Trains on config.data into config.out; returns what Trainer.fit returns.

    model_config: architecture of a new model (default: GPT-2 124M); its vocabulary is always the data's, padded to a multiple of
    64 while it trains. With config.init that model is trained on. resume: go on from the newest checkpoint in config.out. Raises
    gptfast.Error where data, model and tokenizer do not belong together, SystemExit(75) after SIGTERM.
    """
    for name in ("data", "out"):
        if not getattr(config, name):
            raise Error(f"train: --{name} is needed")
    parallel = start(config)
    with parallel.together():
        return _train(config, model_config, resume or parallel.restarted, quiet or not parallel.main, parallel.main)


def _train(config: TrainConfig, model_config: GPT2Config | None, resume: bool, quiet: bool, main: bool) -> dict[str, Any]:
    if main:
        check_out(Path(config.out), resume)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    meta = data.read_meta(config.data)
    tokenizer = GPT2Tokenizer.from_pretrained(config.data)
    if tokenizer.fingerprint() != meta["vocabulary"]:
        raise LoadError(f"data {config.data}: the tokenizer in it is not the one its shards were made with")
    torch.manual_seed(config.seed)
    if config.init is None:
        model = GPT2LMHeadModel(padded(model_config or GPT2Config(), meta["vocab_size"], meta["eos_token_id"]))
    else:
        model = GPT2LMHeadModel.from_pretrained(config.init, dtype=torch.float32)
        if model.config.real_vocabulary != meta["vocab_size"]:
            sizes = f"{model.config.real_vocabulary:,} ids, the data {meta['vocab_size']:,}"
            raise Error(f"model {config.init} has {sizes}; prepare the data with --tokenizer {config.init}")
    splits = [data.load(config.data, split) for split in data.SPLITS if split == "train" or meta[split]["tokens"]]
    trainer = Trainer(model, splits[0], splits[1] if len(splits) > 1 else None, config, tokenizer, quiet)
    if not quiet:
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{parameters:,} parameters, {len(splits[0]):,} tokens to learn from", file=sys.stderr)
        print(f"backends: {backend.summary(resolve_device(config.device).type)}", file=sys.stderr)
    return trainer.fit(resume)


def padded(config: GPT2Config, vocab_size: int, eos_token_id: int) -> GPT2Config:
    """`config` for a vocabulary of `vocab_size`, its tables padded to a multiple of 64 rows: products are faster there. The rows
    beyond the vocabulary take no part in the loss and are left out of the exported model."""
    rows = -(-vocab_size // 64) * 64
    real = vocab_size if rows != vocab_size else None
    return dataclasses.replace(config, vocab_size=rows, real_vocab_size=real, bos_token_id=eos_token_id, eos_token_id=eos_token_id)


def recorded(out: str | Path) -> dict[str, Any]:
    """The options that the run in `out` last started with, those of TrainConfig and GPT2Config in one mapping; {} where there is
    no log. Raises gptfast.LoadError where there is no such folder."""
    if not Path(out).is_dir():
        raise LoadError(f"run {out}: no such folder to resume")
    path = Path(out) / "log.jsonl"
    starts = [r for r in log.read(path) if isinstance(r.get("config"), dict)] if path.exists() else []
    if not starts:
        return {}
    options = {f.name for cls in (TrainConfig, GPT2Config) for f in dataclasses.fields(cls) if "help" in f.metadata}
    values = {**(starts[-1].get("model") or {}), **starts[-1]["config"]}
    return {name: value for name, value in values.items() if name in options}
