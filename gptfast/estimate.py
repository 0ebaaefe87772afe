"""What a training run will need, before it starts: parameters, memory by arithmetic, speed by a calibration of about two seconds.

Memory is counted as the trainer holds it (training/step.py): parameters, gradients and AdamW's two moments in fp32, a working copy
in a smaller dtype, what the blocks keep for the backward pass (ops/transformer_block.py), and the head's logits and gradient
(ops/linear_cross_entropy.py). The calibration runs the trainer's own step on the run's own shapes, as many sequences of it as fit
into the time; a step is taken as so much for each sequence plus the update, which does not depend on their number.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from gptfast import data as shards
from gptfast.cache import PAGE
from gptfast.config import GPT2Config, TrainConfig
from gptfast.errors import Error
from gptfast.model import GPT2LMHeadModel
from gptfast.ops.linear_cross_entropy import pieces
from gptfast.packed import config_of
from gptfast.packed_layout import shapes
from gptfast.training.log import duration
from gptfast.training.run import padded
from gptfast.training.trainer import Trainer, resolve_device

_SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}


def parameters(config: GPT2Config) -> int:
    """Number of parameters, rows that only pad the vocabulary included."""
    whole = dataclasses.replace(config, real_vocab_size=None)
    return sum(math.prod(shape) for shape in shapes(whole).values())


def kept_bytes(config: GPT2Config, tokens: int, size: int) -> int:
    """Bytes that the blocks keep for the backward pass, of `tokens` tokens and `size` bytes a number, where the C++ block runs: the
    residual stream twice, both layer norms' outputs, q k v, attention's output, the MLP before and after its activation; in fp32
    two means, two reciprocal deviations and each head's log-sum-exp."""
    numbers = 8 * config.n_embd + 2 * config.mlp_width
    return config.n_layer * tokens * (size * numbers + 4 * (4 + config.n_head))


def cache_bytes(config: GPT2Config, tokens: int, size: int) -> int:
    """Bytes of keys and values of one sequence, in pages of 64 tokens."""
    return 2 * config.n_layer * -(-tokens // PAGE) * PAGE * config.n_embd * size


def memory(config: GPT2Config, train: TrainConfig) -> dict[str, int]:
    """Bytes of weights, gradients, optimizer, copies, activations and head of one training process, their total, and kv_cache: of
    one sequence of the full context while generating in the same dtype."""
    count, size = parameters(config), _SIZES[train.dtype]
    tokens = min(train.microbatch or train.batch, train.batch) * (train.context or config.n_positions)
    # `pieces` asks for numbers of rows alone
    rows, table = torch.empty(tokens, 0, dtype=torch.float32 if size == 4 else torch.bfloat16), torch.empty(config.vocab_size, 0)
    chunks = 8 if resolve_device(train.device).type == "cuda" else pieces(rows, table)
    logits = -(-tokens // chunks) * config.vocab_size * size
    found = {
        "weights": 4 * count, "gradients": 4 * count, "optimizer": 8 * count, "copies": size * count if size < 4 else 0,
        "activations": kept_bytes(config, tokens, size),
        "head": logits + config.vocab_size * config.n_embd * (size if chunks == 1 else 4),
    }  # fmt: skip
    return {**found, "total": sum(found.values()), "kv_cache": cache_bytes(config, config.n_positions, size)}


def calibrate(
    config: GPT2Config, train: TrainConfig, data: shards.TokenData | None = None, seconds: float = 2.0
) -> dict[str, float]:
    """seconds_per_step, tokens_per_s and the calibration_s it took, of a model with random weights of this shape.

    data: what is read (default: random ids). Whole steps are timed where eight of them fit into `seconds`; else steps of one and of
    two microbatches, whose difference is a microbatch's time. Where a sequence takes longer than `seconds`, four are computed.
    """
    began = time.perf_counter()
    context = train.context or config.n_positions
    if data is None:
        data = shards.TokenData.from_ids(torch.randint(config.real_vocabulary, (8 * context + 1,)), config.eos_token_id)
    trainer = Trainer(GPT2LMHeadModel(config), data, None, dataclasses.replace(train, out="", context=context), quiet=True)
    trainer.model.train()
    drawn = 0

    def timed(count: int, size: int) -> float:
        """Seconds of one step of `count` microbatches of `size` sequences; the last one may be smaller."""
        nonlocal drawn
        start = time.perf_counter()
        whole = count * size if count * size < train.batch else train.batch
        offsets = range(0, whole, size)
        batches = (trainer.loader.samples(drawn + at, min(size, whole - at)).to(trainer.device) for at in offsets)
        float(trainer.step(batches, train.lr).loss)  # waits for the device
        drawn += whole
        return time.perf_counter() - start

    micro = min(train.microbatch or train.batch, train.batch)
    timed(1, 1)  # memory, threads and caches are warm after it
    one = timed(1, 1)
    left = seconds - (time.perf_counter() - began)
    if one * train.batch * 8 <= seconds or train.batch == 1:
        step = _mean(lambda: timed(-(-train.batch // micro), micro), left)
    else:
        size = max(1, min(micro, train.batch // 2, int(seconds / 8 / one)))
        step = _from_two(timed, size, one if size == 1 else None, train.batch, left)
    spent = time.perf_counter() - began
    return {"seconds_per_step": step, "tokens_per_s": train.batch * context / step, "calibration_s": spent}


def _mean(run: Callable[[], float], seconds: float) -> float:
    """Mean over as many calls as fit into the time, at least two; the first one counts as warm-up."""
    run()
    times: list[float] = []
    while not times or sum(times) < seconds:
        times.append(run())
    return sum(times) / len(times)


def _from_two(timed: Callable[[int, int], float], size: int, first: float | None, batch: int, seconds: float) -> float:
    """Seconds of a step of `batch` sequences, from steps of one and of two microbatches of `size`, timed in turn."""
    ones: list[float] = [] if first is None else [first]
    twos: list[float] = []
    if first is None:
        timed(1, size)
    start = time.perf_counter()
    while not twos or time.perf_counter() - start < seconds:
        if len(ones) <= len(twos):
            ones.append(timed(1, size))
        twos.append(timed(2, size))
    one, two = statistics.median(ones), statistics.median(twos)
    each = max(two - one, one / 20)  # on a noisy machine the difference may be anything
    return max(one - each, 0.0) + each * batch / size


def estimate(
    config: GPT2Config, train: TrainConfig, seconds: float = 2.0, model: str | None = None
) -> dict[str, Any]:
    """What `train` on `config` will need; with train.data the vocabulary and the number of tokens are that folder's.

    Returns parameters, memory (see `memory`), tokens_per_step, steps, tokens, seconds_per_step, tokens_per_s, calibration_s,
    evaluation_s (of all evaluations), eta_s, and with data data_tokens and epochs. model: a folder or hub id whose shape is taken.
    Raises gptfast.Error where the model and the data do not fit each other.
    """
    if model is not None:
        config = config_of(model)
    data, held_out = None, 0
    if train.data:
        meta = shards.read_meta(train.data)
        if model is None:
            config = padded(config, meta["vocab_size"], meta["eos_token_id"])
        elif config.real_vocabulary != meta["vocab_size"]:
            raise Error(f"model {model} has {config.real_vocabulary:,} ids, the data {meta['vocab_size']:,}")
        data, held_out = shards.load(train.data), int(meta["val"]["tokens"])
    context = train.context or config.n_positions
    if context > config.n_positions:
        raise Error(f"context is {context:,}; the model has {config.n_positions:,} positions")
    tokens = train.batch * context
    speed = calibrate(config, train, data, seconds)
    found: dict[str, Any] = {
        "parameters": parameters(config), "memory": memory(config, train), "dtype": train.dtype,
        "device": str(resolve_device(train.device)), "threads": torch.get_num_threads(), "tokens_per_step": tokens,
        "steps": train.steps, "tokens": tokens * train.steps, **speed,
    }  # fmt: skip
    evaluations = 0 if held_out <= context else 1 + ((train.steps - 1) // train.eval_every if train.eval_every else 0)
    sequences = evaluations * min(train.eval_sequences, max(held_out - 1, 0) // context)
    # the forward pass is a third of a step's operations
    found["evaluation_s"] = sequences * speed["seconds_per_step"] / train.batch / 3
    found["eta_s"] = train.steps * speed["seconds_per_step"] + found["evaluation_s"]
    if data is not None:
        found |= {"data_tokens": len(data), "epochs": found["tokens"] / max(len(data), 1)}
    return found


def text(found: dict[str, Any]) -> str:
    """The estimate as lines for a person."""
    memory = found["memory"]
    names = {
        "weights": "weights (fp32)", "gradients": "gradients (fp32)", "optimizer": "optimizer (fp32)",
        "copies": f"working copy ({found['dtype']})", "activations": "activations", "head": "logits and head's gradient",
        "total": "training, together",
    }  # fmt: skip
    lines = [f"{found['parameters']:,} parameters, {found['dtype']}, {found['device']}, {found['threads']} threads"]
    lines += [f"  {label:27s} {memory[key] / 1e6:12,.1f} MB" for key, label in names.items() if memory[key]]
    lines.append(f"  {'KV cache of a sequence':27s} {memory['kv_cache'] / 1e6:12,.1f} MB")
    step = f"{found['seconds_per_step'] * 1e3:,.1f} ms a step of {found['tokens_per_step']:,} tokens"
    lines.append(f"{found['tokens_per_s']:,.0f} tokens/s, {step} (calibrated in {found['calibration_s']:.1f} s)")
    epochs = f", {found['epochs']:.2f} epochs of {found['data_tokens']:,}" if "epochs" in found else ""
    lines.append(f"{found['steps']:,} steps: {found['tokens']:,} tokens{epochs}, {duration(found['eta_s'])}")
    return "\n".join(lines)
