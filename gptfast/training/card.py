"""The model card of a run, README.md in its folder: what the model was trained on, how it was measured, what it is worth."""

from __future__ import annotations

import math
from typing import Any

import torch

from gptfast import __version__
from gptfast.config import GPT2Config, TrainConfig
from gptfast.options import keys, to_yaml
from gptfast.training.loader import DataSource
from gptfast.training.state import Progress

_NAMES = {"val_bits_per_byte": "held-out bits per byte"}
BASE = (
    "This is a base model: it continues text in the manner of its training data and knows nothing beyond that. What it writes is a "
    "sample of a distribution, not advice and not a source."
)


def _rows(
    model: Any, config: TrainConfig, progress: Progress, data: DataSource, loss: float, evaluation: dict[str, float]
) -> list[tuple[str, str]]:
    epochs = progress.step * config.batch / data.windows
    rows = [
        ("parameters", f"{sum(p.numel() for p in model.parameters()):,}"),
        ("started from", config.init or f"random weights, seed {config.seed}"),
        ("training data", f"sha256 `{data.fingerprint}`, {data.windows:,} samples"),
        ("tokens seen", f"{progress.tokens:,} in {progress.step:,} steps, {epochs:.2f} epochs; {progress.skipped:,} steps skipped"),
        ("training loss, last record", f"{loss:.4f} nats {_unit(model)}"),
    ]
    if "val_loss" in evaluation:
        interval = f"{evaluation['val_loss']:.4f} ± {evaluation['val_ci']:.4f}"
        rows.append(("held-out loss", f"{interval} nats {_unit(model)} (95 % interval)"))
    rest = {key: value for key, value in evaluation.items() if key not in ("val_loss", "val_ci")}
    rows += [(_NAMES.get(key, key.replace("_", " ")), f"{value:.4f}") for key, value in rest.items()]
    if config.keep_best and progress.best_step:
        rows.append(("weights", f"of the best evaluation, step {progress.best_step:,}"))
    return rows


def _unit(model: Any) -> str:
    """What a loss is the mean over."""
    return "a token" if hasattr(model, "lm_head") else "an example"


def _worth(model: Any, evaluation: dict[str, float]) -> str:
    if "val_loss" not in evaluation:
        return "It was not measured on any text that it had not seen: nothing is known of how it does there."
    if _unit(model) != "a token":
        return "The figures above are of held-out examples from the same source: on others it does worse by an unknown amount."
    chance = 100 * math.exp(-evaluation["val_loss"])
    return (
        f"On held-out text from the same source it gives the next token a probability of {chance:.1f} % (geometric mean). It was "
        "measured on nothing else: on other text it does worse by an unknown amount."
    )


def card(
    name: str, model: Any, config: TrainConfig, progress: Progress, data: DataSource, loss: float, evaluation: dict[str, float],
    device: torch.device, about: str = BASE,
) -> str:
    """The card as Markdown with Hugging Face's header. evaluation: what Trainer.evaluate last returned, {} where there was none;
    about: what kind of model this is and what it is not."""
    shape: GPT2Config = model.config
    rows = "\n".join(f"| {title} | {text} |" for title, text in _rows(model, config, progress, data, loss, evaluation))
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    training = to_yaml("Training", config, keys(TrainConfig))
    return f"""---
library_name: gptfast
tags:
- gpt2
---
# {name}

A {type(model).__name__}: {shape.n_layer} layers, {shape.n_head} heads, {shape.n_embd} wide, context {shape.n_positions:,} tokens,
vocabulary {shape.real_vocabulary:,}. Trained with gptfast {__version__} and torch {torch.__version__} in {config.dtype} on
{device.type}{threads}.

| | |
|---|---|
{rows}

## What it is worth

{about}

{_worth(model, evaluation)} Whatever is wrong or biased in the data is in the model too.

## Configuration

```yaml
{training}```
"""
