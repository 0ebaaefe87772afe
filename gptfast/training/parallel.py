"""What training asks of the processes it runs in, and the answers of one process; distributed.py has those of several."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from gptfast import checkpoint, ops
from gptfast.config import TrainConfig
from gptfast.errors import Error
from gptfast.training.loader import Batch

if TYPE_CHECKING:
    from gptfast.training.step import Step

T = TypeVar("T")
Fill = Callable[[checkpoint.Folder], None]


class Parallel:
    """One process, and all that training asks of several."""

    rank, world = 0, 1
    casts = False  # whether the engine itself makes the working copies of the parameters

    def __init__(self) -> None:
        self.parameters: dict[str, Any] = {}  # what the optimizer and a checkpoint have, by the model's names
        self.restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0

    @property
    def main(self) -> bool:
        """Whether this is the process that prints, logs and saves."""
        return self.rank == 0

    def rows(self, config: TrainConfig) -> int:
        """Rows of a batch that each rank computes. Raises gptfast.Error where they cannot be dealt equally."""
        if config.batch % self.world:
            raise Error(f"batch is {config.batch:,}; {self.world} processes need a multiple of {self.world}")
        return config.batch // self.world

    # ------------------------------------------------------------------------------------------------------------- model and step

    def prepare(self, model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        """Fills and returns `parameters`; called once, before there is an optimizer."""
        self.parameters = dict(model.named_parameters())
        return self.parameters

    def attach(self, step: Step) -> None:
        """Called at the end of the step's construction."""

    def loss_sum(self, step: Step, batch: Batch) -> tuple[Tensor, Tensor]:
        """step.loss_sum with the exchange of gradients behind it."""
        return step.loss_sum(batch)

    def exchanging(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The microbatches of a step as they are; what is done with the last one exchanges gradients."""
        yield from batches

    def total(self, loss: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the losses [] and number of targets [], over all ranks. Nothing waits for the device."""
        return loss, count

    def grad_norm(self, params: list[Tensor]) -> tuple[Tensor, Tensor]:
        """ops.grad_norm of the whole gradient, the same on every rank. Every parameter has its .grad afterwards."""
        return ops.grad_norm([p.grad for p in params if p.grad is not None])

    # --------------------------------------------------------------------------------------------------------------------- the run

    def seed(self, seed: int, step: int) -> None:
        """Before a step: noise that differs between ranks, and that a resumed run has too."""

    def agree(self, tokens: int, asked: int | None) -> tuple[int, int | None]:
        """(tokens that all ranks computed, a signal that any of them got), after a step."""
        return tokens, asked

    def spread(self, work: Callable[[T], tuple[float, float]], items: list[T]) -> list[tuple[float, float]]:
        """work(item) of every item, on all ranks; each item is computed by one of them."""
        return [work(item) for item in items]

    def newest(self, run: Path) -> tuple[int, Path] | None:
        """checkpoint.newest, verified once."""
        return checkpoint.newest(run)

    def save(self, write: Callable[[Fill], Any], fill: Fill) -> None:
        """write(fill), on the main process alone. Raises OSError on all of them where that does."""
        write(fill)

    def whole(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Tensors for checkpoint.Folder.tensors, named "<parameter>" or "<what>.<parameter>", with their whole shapes."""
        return tensors

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """What this rank has of a whole tensor that belongs to the parameter `name`."""
        return tensor

    def plain(self, model: Any) -> Any:
        """The whole model on the main process, to be written or used; None on the others."""
        return model

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Around all that a process does after start(): the first failure is said once, and ends all."""
        yield
