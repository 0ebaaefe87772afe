"""Options of `gptfast finetune` beside the trainer's own; no torch here, the command line's help reads them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from gptfast.config import LoraConfig, TrainConfig, option
from gptfast.options import Key, keys
from gptfast.tasks import find, names

# of the trainer's options, those that follow from the task's data
_DERIVED = ("data", "out", "init", "steps", "warmup", "document_mask", "eval_every", "eval_sequences", "keep_best")
# where fine-tuning starts from a trained model, other values are a better guess than for random weights
DEFAULTS = {"lr": 2e-4, "min_lr": 0.0, "batch": 32, "weight_decay": 0.01}


@dataclass
class FinetuneConfig:
    """How a task's examples are used; see gptfast.tasks.finetune."""

    epochs: float = option(3.0, "passes over the training examples", low=0.0)
    val: float = option(0.1, "fraction of the examples held out: the best epoch is chosen on it", low=0.0, high=0.9)
    val_data: str | None = option(None, "file of held-out examples, in place of --val")
    warmup: int | None = option(None, "steps in which the learning rate rises from 0 (default: a tenth of all)", low=0)
    dropout: float | None = option(None, "dropout while it trains (default: the model's own)", low=0.0, high=0.9)
    pack: bool = option(False, "several examples in a row of --context tokens; --batch then counts rows")
    skip_bad: bool = option(False, "skip and count bad lines")
    lora: bool = option(False, "train adapters only (LoRA): RUN is the merged model, RUN/adapter peft's files")


def training_keys() -> dict[str, Key]:
    """The trainer's options that finetune has, with its defaults."""
    chosen = {name: key for name, key in keys(TrainConfig).items() if name not in _DERIVED}
    return {name: dataclasses.replace(key, default=DEFAULTS.get(name, key.default)) for name, key in chosen.items()}


def task_keys() -> dict[str, Key]:
    """The options of all tasks; a name that two of them have is one option."""
    return {name: key for task in names() for name, key in keys(find(task)).items()}


TRAINING, FINETUNE, LORA, TASK = training_keys(), keys(FinetuneConfig), keys(LoraConfig), task_keys()
