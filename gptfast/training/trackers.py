"""TensorBoard and Weights & Biases: two extras that get the numbers of log.jsonl while a run goes on."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from gptfast.config import TrainConfig
from gptfast.errors import Error

_INSTALL = "pip install 'gptfast-torch[{0}]'"


def _tensorboard(folder: Path, step: int) -> Any:
    """A writer of events into `folder`; what an interrupted run wrote after `step` is hidden."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise Error(f"--tensorboard needs the package tensorboard: {_INSTALL.format('tensorboard')}") from error
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def _wandb(out: Path, config: TrainConfig) -> Any:
    """A run of Weights & Biases that a resumed run goes on with. Its own variables decide where it logs to (WANDB_MODE=offline)."""
    try:
        import wandb
    except ImportError as error:
        raise Error(f"--wandb needs the package wandb: {_INSTALL.format('wandb')}") from error
    name = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]
    return wandb.init(project="gptfast", name=out.name, id=name, resume="allow", dir=str(out), config=dataclasses.asdict(config))


class Trackers:
    """What config.tensorboard and config.wandb ask for. Raises gptfast.Error without an `out`, or where the package is missing."""

    def __init__(self, config: TrainConfig, out: Path | None, step: int) -> None:
        if out is None and (config.tensorboard or config.wandb):
            raise Error("tensorboard and wandb need --out, the folder of the run")
        self._events = _tensorboard(out / "tensorboard", step) if out and config.tensorboard else None
        self._run = _wandb(out, config) if out and config.wandb else None

    def write(self, step: int, group: str, values: dict[str, Any]) -> None:
        """The numbers among `values` as group/name."""
        plain = {f"{group}/{key}": value for key, value in values.items() if isinstance(value, (int, float))}
        if self._events is not None:
            for key, value in plain.items():
                self._events.add_scalar(key, value, step)
        if self._run is not None:
            self._run.log(plain, step=step)

    def close(self) -> None:
        """Writes what is waiting."""
        if self._events is not None:
            self._events.close()
        if self._run is not None:
            self._run.finish()
