"""What a checkpoint of a run holds, how a run goes on from it, and the Hugging Face folder that a run ends as."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptfast import checkpoint
from gptfast.config import TrainConfig
from gptfast.errors import Error, LoadError
from gptfast.training.loader import DataSource
from gptfast.training.step import Step

# what the order of the data and the meaning of a step depend on: a resumed run must have the same
_FIXED = ("batch", "context", "seed", "document_mask", "optimizer")


@dataclass
class Progress:
    """How far a run is. tokens: seen, without padding; microbatch: sequences computed at once, fewer than the config's where memory
    ran out; best, best_step: the best evaluation; stale: evaluations in a row that were no better."""

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    microbatch: int = 1
    best: float | None = None
    best_step: int = 0
    stale: int = 0


def trained(step: Step) -> dict[str, Tensor]:
    """The parameters that are trained, by name; of sharded ones this process's part."""
    return {name: p for name, p in step.parallel.parameters.items() if p.requires_grad}


def fill(folder: checkpoint.Folder, step: Step, progress: Progress, config: TrainConfig, data: DataSource) -> None:
    """Adds the files of a checkpoint: weights, optimizer, states of the random generators, and state.json."""
    random, states = checkpoint.random_state()
    optimizer: dict[str, Tensor] = {}
    for name, p in trained(step).items():
        optimizer |= {f"{key}.{name}": value for key, value in step.optimizer.state[p].items()}
    if step.loss_scale is not None:
        optimizer |= {"loss_scale.scale": step.loss_scale.scale, "loss_scale.good": step.loss_scale.good}
    weights(folder, step)
    folder.tensors("optimizer.safetensors", step.parallel.whole(optimizer))
    folder.tensors("random.safetensors", states)
    model: Any = step.model
    folder.json("state.json", {
        "version": checkpoint.VERSION, **dataclasses.asdict(progress), "data": data.fingerprint, "processes": step.parallel.world,
        "config": dataclasses.asdict(config), "model": dataclasses.asdict(model.config), "random": random,
    })  # fmt: skip


def weights(folder: checkpoint.Folder, step: Step) -> None:
    """Adds the model's parameters."""
    folder.tensors("model.safetensors", step.parallel.whole(step.parallel.parameters))


def load_weights(folder: Path, step: Step) -> None:
    """Copies a checkpoint's parameters into the model. Raises gptfast.LoadError where they are another model's."""
    stored = checkpoint.read_tensors(folder / "model.safetensors")
    with torch.no_grad():
        for name, p in step.parallel.parameters.items():
            part = step.parallel.part(name, stored[name]) if name in stored else None
            if part is None or part.shape != p.shape:
                raise LoadError(f"resume: {folder} holds another model: {name} does not fit")
            p.copy_(part)


def load(folder: Path, step: Step, config: TrainConfig, data: DataSource) -> Progress:
    """Puts a run where the checkpoint was written, random generators included; returns how far that is. Raises gptfast.Error where
    the checkpoint is of another run: other data, model or optimizer, or an option that a run keeps."""
    state = checkpoint.read_json(folder / "state.json")
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    for name in _FIXED:
        old, new = state["config"].get(name, defaults[name]), getattr(config, name)
        if old != new:
            raise Error(f"resume: {name} was {old} in {folder}, now it is {new}; a resumed run keeps it")
    if state["data"] != data.fingerprint:
        raise Error(f"resume: the training data is not what {folder} was trained on; give the same --data, or another --out")
    load_weights(folder, step)
    _load_optimizer(folder, step)
    step.refresh()
    checkpoint.set_random_state(state["random"], checkpoint.read_tensors(folder / "random.safetensors"))
    known = {field.name for field in dataclasses.fields(Progress)}
    progress = Progress(**{name: value for name, value in state.items() if name in known})
    progress.tokens = state.get("tokens", progress.step * config.batch * data.context)
    again = state["config"].get("microbatch"), state.get("processes", 1)
    if again != (config.microbatch, step.parallel.world) or "microbatch" not in state:
        rows = step.parallel.rows(config)
        progress.microbatch = min(config.microbatch or rows, rows)  # asked for anew
    return progress


def _load_optimizer(folder: Path, step: Step) -> None:
    """Into the tensors that the optimizer reserved: parameters that share a step counter go on sharing it."""
    moments = checkpoint.read_tensors(folder / "optimizer.safetensors")
    for name, p in trained(step).items():
        for key, tensor in step.optimizer.state[p].items():
            whole = moments.get(f"{key}.{name}")
            part = None if whole is None else step.parallel.part(name, whole)
            if part is None or part.shape != tensor.shape:
                raise LoadError(f"resume: {folder} holds another optimizer's state: {key}.{name} does not fit")
            tensor.copy_(part)
    if step.loss_scale is not None and "loss_scale.scale" in moments:
        step.loss_scale.scale.copy_(moments["loss_scale.scale"])
        step.loss_scale.good.copy_(moments["loss_scale.good"])


def check_out(out: Path, resume: bool) -> None:
    """Raises gptfast.Error where `out` is not empty and resume is not asked for."""
    if out.exists() and (not out.is_dir() or (not resume and any(out.iterdir()))):
        raise Error(f"run {out} is not empty; go on with --resume, or name another folder with --out")


def export(out: Path, write: Callable[[Path], None], card: str) -> None:
    """What write(folder) makes, a Hugging Face folder, and the card in `out`: written beside and fsynced, then renamed into place,
    config.json last. Raises gptfast.LoadError where the disk is full."""
    temporary = out / f"export.tmp-{os.getpid()}"
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        write(temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        for path in temporary.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        checkpoint.sync_folder(temporary)
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, out / path.name)
        checkpoint.sync_folder(out)
    except OSError as error:
        reason = f"the model cannot be written: {error.strerror or error}; the checkpoints are there"
        raise LoadError(f"run {out}: {reason}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
