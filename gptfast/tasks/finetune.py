"""`gptfast finetune`: a model and a task's data in, a Hugging Face folder that knows its task out."""

from __future__ import annotations

import json
import math
import shutil
import sys
import warnings
from dataclasses import asdict, dataclass
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
from gptfast.training.trainer import Trainer, check_out, export, resolve_device

class Tuner(Trainer):
    """A trainer that also measures the task, keeps the weights of the best evaluation, and ends with these."""

    def __init__(
        self, model: Any, rows: tuple[ExampleRows, ExampleRows | None], config: TrainConfig, tokenizer: GPT2Tokenizer, quiet: bool,
        task: Task, held_out: list[Any], options: FinetuneConfig, adapters: LoraConfig | None,
    ) -> None:
        super().__init__(model, *rows, config, tokenizer, quiet)
        self.task, self.held_out, self.adapters, self.options = task, held_out, adapters, options
        self.best: dict[str, Any] = {}
        self._home = Path(config.out) / "best"

    def _open(self, resume: bool) -> None:
        super()._open(resume)
        facts = {"task": self.task.name, "settings": self.task.settings(), "options": asdict(self.options)}
        adapters = None if self.adapters is None else asdict(self.adapters)
        self.log.write("finetune", step=self.done, training=asdict(self.config), lora=adapters, **facts)
        for step, folder in checkpoint.steps(self._home):
            if step > self.done:  # this run makes that step again
                shutil.rmtree(folder)
        found = checkpoint.newest(self._home)
        self.best = checkpoint.read_json(found[1] / "state.json") if found else {}

    def evaluate(self) -> dict[str, float]:
        """The loss and the task's metrics on the held-out examples; the best weights so far are kept in RUN/best."""
        values = super().evaluate()
        metrics = self.task.validate(self.model, self.tokenizer, self.held_out)
        if metrics:
            self.log.write("task", step=self.done, **metrics)
        values = {**values, **metrics}
        key, way = self.task.chosen_by
        score = values[key] if way == "highest" else -values[key]
        if math.isfinite(score) and (not self.best or score > self.best["score"]):
            self._keep({"step": self.done, "score": score, **values})
        return values

    def _keep(self, facts: dict[str, Any]) -> None:
        def fill(folder: checkpoint.Folder) -> None:
            folder.tensors("model.safetensors", dict(self.model.named_parameters()))
            folder.json("state.json", facts)

        try:
            checkpoint.save(Path(self.config.out) / "best", self.done, fill, keep=1)
            self.best = facts
        except OSError as error:
            warnings.warn(f"the best weights cannot be kept: {error.strerror or error}; training goes on", stacklevel=2)

    def write_model(self, folder: Path) -> None:
        """The best weights, adapters merged, with the task as it was fitted on the held-out examples."""
        found = checkpoint.newest(self._home) if self.best else None
        if found is not None:
            weights = checkpoint.read_tensors(found[1] / "model.safetensors")
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    parameter.copy_(weights[name])
        if self.held_out:
            self.task = self.task.calibrate(self.model, self.tokenizer, self.held_out)
        if self.adapters is not None:
            lora.save(self.model, Path(self.config.out) / "adapter", self.adapters, str(self.config.init))
            lora.merge(self.model)
        folder.mkdir(parents=True, exist_ok=True)
        write(self.task, folder)
        export(self.model, folder, self.tokenizer)


def finetune(
    task: str | Task, config: TrainConfig, options: FinetuneConfig | None = None, adapters: LoraConfig | None = None,
    resume: bool = False, quiet: bool = False,
) -> dict[str, Any]:
    """Trains config.init, a folder or a hub id, on config.data, a file of the task's examples, into config.out.

    task: a name with default settings, or a Task. The steps follow from options.epochs; a part of the examples is held out, an
    epoch's end evaluates on it, and the folder gets the weights of the best one. adapters: LoRA instead of full fine-tuning; the
    folder holds the merged model, and RUN/adapter peft's files. Returns what Trainer.fit returns, with task, settings, examples,
    held_out, skipped_lines and best {step, ...}. Raises gptfast.Error for bad examples, LoadError for bad files.
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
    tuner = Tuner(
        model, (rows[0], rows[1] if len(rows) > 1 else None), config, tokenizer, quiet, task, held_out.items, options,
        adapters,
    )  # fmt: skip
    if not quiet:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        sizes = f"{len(train):,} examples to learn from, {len(held_out):,} held out, {config.steps:,} steps"
        print(f"{task.name}: {trained:,} trained parameters, {sizes}", file=sys.stderr)
        print(f"backends: {backend.summary(resolve_device(config.device).type)}", file=sys.stderr)
    result = tuner.fit(resume)
    skipped = train.skipped + (held_out.skipped if options.val_data else 0)
    return {
        **result, "task": task.name, "settings": tuner.task.settings(), "examples": len(train), "held_out": len(held_out),
        "skipped_lines": skipped, "best": {key: value for key, value in tuner.best.items() if key != "score"},
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
        **asdict(config), "steps": steps, "eval_every": max(round(rows[0].windows / config.batch), 1),
        "eval_sequences": max(rows[-1].windows, 1), "warmup": steps // 10 if options.warmup is None else options.warmup,
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
