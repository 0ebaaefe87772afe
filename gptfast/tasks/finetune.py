"""`gptfast finetune`: a model and a task's data in, a Hugging Face folder that knows its task out."""

from __future__ import annotations

import json
import math
import shutil
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import gptfast.backend as backend
from gptfast import checkpoint, data
from gptfast import model as models
from gptfast.config import LoraConfig, TrainConfig
from gptfast.errors import Error, LoadError
from gptfast.layers import Attention, Dropout
from gptfast.tasks import find
from gptfast.tasks.files import Examples
from gptfast.tasks.options import FinetuneConfig
from gptfast.tasks.rows import ExampleRows
from gptfast.tasks.task import Task, write
from gptfast.tokenizer import GPT2Tokenizer
from gptfast.training import log, lora
from gptfast.training.state import Progress, check_out
from gptfast.training.trainer import Trainer, resolve_device

ABOUT = (
    "This model was fine-tuned for one task, {task}. It knows what its training examples show and nothing beyond them; what it "
    "answers is neither advice nor a source."
)

class Tuner(Trainer):
    """A trainer that measures the task at every evaluation and ends with a folder that knows it."""

    def __init__(
        self, model: Any, rows: list[ExampleRows], config: TrainConfig, tokenizer: GPT2Tokenizer, quiet: bool, task: Task,
        held_out: list[Any], options: FinetuneConfig, adapters: LoraConfig | None,
    ) -> None:
        val = rows[1] if len(rows) > 1 else None
        super().__init__(model, rows[0], val, config, tokenizer, quiet, self._measure, ABOUT.format(task=task.name))
        self.task, self.held_out, self.options, self.adapters = task, held_out, options, adapters

    def _measure(self, model: Any) -> dict[str, float]:
        """The task's metrics on the held-out examples; "score" is the one that decides which evaluation is best, of equal ones that
        with the lower loss."""
        metrics = self.task.validate(model, self.tokenizer, self.held_out)
        key, way = self.task.chosen_by
        if key not in metrics:
            return metrics
        score = metrics[key] if way == "highest" else -metrics[key]
        return {**metrics, "score": score - 1e-6 * min(metrics.get("loss", 0.0), 100.0)}

    def _open(self, resume: bool) -> Progress:
        progress, out = super()._open(resume), Path(self.config.out)
        for step, folder in checkpoint.steps(out / "best"):
            if step > progress.step:  # this run makes that step again, perhaps with other options
                shutil.rmtree(folder)
        facts = {"task": self.task.name, "settings": self.task.settings(), "options": asdict(self.options)}
        adapters = None if self.adapters is None else asdict(self.adapters)
        log.Log(out / "log.jsonl").write("finetune", step=progress.step, training=asdict(self.config), lora=adapters, **facts)
        return progress

    def write_model(self, folder: Path) -> None:
        """The model, adapters merged, its tokenizer, and the task as it was fitted on the held-out examples."""
        if self.held_out:
            self.task = self.task.calibrate(self.model, self.tokenizer, self.held_out)
        if self.adapters is not None:
            lora.save(self.model, Path(self.config.out) / "adapter", self.adapters, str(self.config.init))
            lora.merge(self.model)
        super().write_model(folder)
        write(self.task, folder)


def finetune(
    task: str | Task, config: TrainConfig, options: FinetuneConfig | None = None, adapters: LoraConfig | None = None,
    resume: bool = False, quiet: bool = False,
) -> dict[str, Any]:
    """Trains config.init, a folder or a hub id, on config.data, a file of the task's examples, into config.out.

    task: a name with default settings, or a Task. The steps follow from options.epochs; a part of the examples is held out, an
    epoch's end evaluates on it, and the folder gets the weights of the best one. adapters: LoRA instead of full fine-tuning; the
    folder holds the merged model, and RUN/adapter peft's files. Returns what Trainer.fit returns (the held-out metrics are those of
    the weights that are kept), with task, settings, examples, held_out and skipped_lines. Raises gptfast.Error for bad
    examples, gptfast.LoadError for bad files.
    """
    options = options or FinetuneConfig()
    task = find(task)() if isinstance(task, str) else task
    for name in ("data", "out", "init"):
        if not getattr(config, name):
            raise Error(f"finetune: {'MODEL' if name == 'init' else f'--{name}'} is needed")
    check_out(Path(config.out), resume)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    tokenizer = GPT2Tokenizer.from_pretrained(str(config.init))
    task, train, held_out = read(task, config, options)
    torch.manual_seed(config.seed)
    model = load(task, str(config.init), options.dropout)
    context = min(config.context or model.config.n_positions, model.config.n_positions)
    pack = context if options.pack else None
    encoded = [task.encode_all(part, tokenizer, context, options.skip_bad) for part in (train, held_out) if len(part)]
    rows = [ExampleRows(part, config.seed, pack) for part in encoded]
    if adapters is not None:
        lora.apply(model, adapters)
    config = plan(config, options, rows)
    tuner = Tuner(model, rows, config, tokenizer, quiet, task, held_out.items, options, adapters)
    if not quiet:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        sizes = f"{len(train):,} examples to learn from, {len(held_out):,} held out, {config.steps:,} steps"
        print(f"{task.name}: {trained:,} trained parameters, {sizes}", file=sys.stderr)
        print(f"backends: {backend.summary(resolve_device(config.device).type)}", file=sys.stderr)
    result = tuner.fit(resume)
    result.pop("score", None)
    return {
        **result, "task": task.name, "settings": tuner.task.settings(), "examples": len(train), "held_out": len(held_out),
        "skipped_lines": train.skipped + held_out.skipped,
    }


def read(task: Task, config: TrainConfig, options: FinetuneConfig) -> tuple[Task, Examples[Any], Examples[Any]]:
    """The task as its data makes it, the examples to train on and those held out: those of options.val_data, or a part of the
    data, told by a hash of the example, so that copies of one are on one side."""
    every = task.read(config.data, skip_bad=options.skip_bad)
    task = task.prepare(every.items)
    if options.val_data:
        return task, every, task.read(options.val_data, skip_bad=options.skip_bad)
    splits: dict[str, list[Any]] = {"train": [], "val": []}
    for example in every:
        content = {key: value for key, value in asdict(example).items() if key != "line"}
        splits[data.deal(f"{config.seed} {json.dumps(content, sort_keys=True)}", options.val)].append(example)
    if not splits["train"]:
        raise Error(f"data {config.data}: all {len(every):,} examples were held out; give more, or a smaller --val")
    if options.val and not splits["val"]:
        warnings.warn(f"data {config.data}: none of {len(every):,} examples is held out; the last weights are kept", stacklevel=2)
    return task, Examples(every.path, splits["train"], every.skipped), Examples(every.path, splits["val"])


def load(task: Task, path: str, dropout: float | None = None) -> Any:
    """The model to train, with the task's head, in fp32."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*this head starts with random weights")
        model = getattr(models, task.head).from_pretrained(path, dtype=torch.float32)
    task.configure(model)
    if dropout is not None:
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            setattr(model.config, name, dropout)
        for module in model.modules():
            if isinstance(module, (Dropout, Attention)):
                module.p = dropout
    return model


def plan(config: TrainConfig, options: FinetuneConfig, rows: list[ExampleRows]) -> TrainConfig:
    """The configuration with what follows from the data: steps, their warm-up, an evaluation of all that is held out each epoch."""
    steps = max(math.ceil(options.epochs * rows[0].windows / config.batch), 1)
    values = {
        **asdict(config), "steps": steps, "eval_every": -(-rows[0].windows // config.batch),
        "eval_sequences": rows[-1].windows, "keep_best": len(rows) > 1,
        "warmup": steps // 10 if options.warmup is None else options.warmup,
    }
    return TrainConfig(**values)


def recorded(out: str | Path) -> dict[str, Any]:
    """What the fine-tuning run in `out` last started with: task, settings, options, training, lora. Raises gptfast.LoadError where
    its log has no such record."""
    path = Path(out) / "log.jsonl"
    starts = [record for record in log.read(path) if record.get("event") == "finetune"] if path.is_file() else []
    if not starts:
        raise LoadError(f"run {out}: its log has no fine-tuning to resume")
    return starts[-1]
