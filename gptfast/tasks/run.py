"""What `gptfast predict` and `gptfast evaluate` call: a folder that knows its task, and texts or a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gptfast import model as models
from gptfast.errors import Error
from gptfast.generation.loading import DTYPES, pick_device
from gptfast.tasks import find, names, recorded
from gptfast.tasks.task import Task
from gptfast.tokenizer import GPT2Tokenizer


def task_of(folder: str | Path, name: str | None = None, options: dict[str, Any] | None = None) -> Task:
    """The task that a model's folder records, or the one of that name with its default settings; with options changed. Raises
    gptfast.Error where none is recorded and none named, or for an option that the task does not have."""
    task = recorded(folder)
    if name is not None and not isinstance(task, find(name)):
        task = find(name)()
    if task is None:
        raise Error(f"model {folder} records no task, it was not fine-tuned for one; --task names one: {', '.join(names())}")
    return task.with_options(options or {})


def open_model(folder: str | Path, task: Task, dtype: str = "fp32", device: str = "auto") -> tuple[Any, GPT2Tokenizer]:
    """The model of a folder with the task's head, and its tokenizer. Raises gptfast.Error for a dtype that is not computed here,
    gptfast.LoadError for what cannot be loaded."""
    if dtype not in DTYPES:
        raise Error(f"dtype is {dtype!r}; the task {task.name} is computed in {', '.join(DTYPES)}")
    cls = getattr(models, task.head)
    model = cls.from_pretrained(folder, dtype=DTYPES[dtype], device=pick_device(device))
    return model, GPT2Tokenizer.from_pretrained(folder)


def evaluate(
    folder: str | Path, data: str | Path, task: str | None = None, options: dict[str, Any] | None = None, *, skip_bad: bool = False,
    dtype: str = "fp32", device: str = "auto",
) -> dict[str, Any]:
    """The task's metrics over a file of labelled examples, with task, dtype and skipped_lines.

    Raises gptfast.Error as task_of() and open_model() do, gptfast.LoadError with file and line for a bad example.
    """
    found = task_of(folder, task, options)
    examples = found.read(data, skip_bad=skip_bad)
    model, tokenizer = open_model(folder, found, dtype, device)
    with torch.no_grad():
        metrics = found.measure(model, tokenizer, examples.items)
    return {"task": found.name, "dtype": dtype, **metrics, "skipped_lines": examples.skipped}


def predict(
    folder: str | Path, texts: Sequence[str] = (), data: str | Path | None = None, task: str | None = None,
    options: dict[str, Any] | None = None, *, skip_bad: bool = False, dtype: str = "fp32", device: str = "auto",
) -> dict[str, Any]:
    """{"task", "answers": [{"answer", ...}], "skipped_lines"} of texts, or of a file of examples without answers.

    Raises gptfast.Error where there are neither texts nor data, or both, and as evaluate() does.
    """
    if bool(texts) == (data is not None):
        raise Error("predict needs texts: either TEXT... or --data FILE")
    found = task_of(folder, task, options)
    read = None if data is None else found.read(data, labelled=False, skip_bad=skip_bad)
    examples = [found.example(text) for text in texts] if read is None else read.items
    model, tokenizer = open_model(folder, found, dtype, device)
    with torch.no_grad():
        answers = found.answer(model, tokenizer, examples)
    return {"task": found.name, "dtype": dtype, "answers": answers, "skipped_lines": 0 if read is None else read.skipped}
