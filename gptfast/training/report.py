"""What a run says while it runs and what it writes down: the live line, log.jsonl, and the trackers."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from gptfast.config import TrainConfig
from gptfast.errors import Error
from gptfast.training import memory
from gptfast.training.log import Line, Log, duration
from gptfast.training.schedule import learning_rate
from gptfast.training.state import Progress
from gptfast.training.step import StepResult
from gptfast.training.trackers import Trackers

_HOPELESS = 100  # steps without a finite gradient, one after the other
_SETTLED = 5.0  # seconds of steps before the peak is measured: a short run does without
FORMULA = "MFU = tokens/s x (6 x weights of products + 12 x layers x width x context) / peak"


def flops_per_token(model: Any, context: int) -> float:
    """Of forward and backward: 6 a weight that takes part in a product and 12 layers width T for attention (Chowdhery et al. 2022,
    arXiv:2204.02311, appendix B). Embedding tables are looked up; a tied one counts as the head."""
    config = model.config
    tied = config.tie_word_embeddings and hasattr(model, "lm_head")
    looked_up = ("wpe.weight",) if tied else ("wpe.weight", "wte.weight")
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() >= 2 and not name.endswith(looked_up))
    return float(6 * weights + 12 * config.n_layer * config.n_embd * context)


class Report:
    """The one place that waits for the device: it reads the results of steps when a line or a record is due.

    `with report:` shows the line. loss: mean over the steps of the last record. seconds, tokens: of this process's steps.
    """

    def __init__(
        self, config: TrainConfig, progress: Progress, flops: float, device: torch.device, quiet: bool, rank: int = 0
    ) -> None:
        self.config, self.progress, self.flops, self.device = config, progress, flops, device
        self.rank = rank
        self.line = Line(not quiet)
        self.log, self.trackers = Log(None), Trackers(TrainConfig(), None, 0)
        self.loss, self.seconds, self.tokens = math.nan, 0.0, 0
        self._recent: list[StepResult] = []
        self._interval, self._new, self._barren = 0.0, 0, 0
        self._peak: float | None = None

    def __enter__(self) -> Self:
        self.line.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.line.__exit__(kind, error, trace)
        self.trackers.close()

    def open(self, out: Path | None, event: str, **facts: Any) -> None:
        """Opens the log and the trackers of the run in `out` and writes the first record."""
        self.trackers = Trackers(TrainConfig() if self.rank else self.config, out, self.progress.step)
        name = f"log.rank{self.rank}.jsonl" if self.rank else "log.jsonl"
        self.log = Log(out / name if out is not None and (not self.rank or self.config.log_samples) else None)
        self.record(event, **facts)

    def record(self, event: str, **values: Any) -> None:
        """A record of log.jsonl; a log that cannot be written is said once. Ranks after the first record samples alone."""
        if self.rank and event != "samples":
            return
        problem = self.log.write(event, step=self.progress.step, **values)
        if problem:
            self.line.say(f"warning: {problem}")

    # ---------------------------------------------------------------------------------------------------------------------- steps

    def due(self) -> bool:
        """Whether the step that just ended is logged."""
        return self.progress.step % self.config.log_every == 0 or self.progress.step == self.config.steps

    def add(self, result: StepResult, tokens: int) -> None:
        """A step's result. Waits for the device where something is due, so that the caller's clock is right."""
        self._recent.append(result)
        self._new += tokens
        if self.config.log_samples and result.numbers is not None:
            self.record("samples", numbers=result.numbers.tolist())
        if self.due() or self.line.due():
            self.loss = float(result.loss)

    def took(self, seconds: float) -> None:
        """How long that step was."""
        self._interval += seconds

    def show(self) -> None:
        """After a step: its record and its line, where they are due."""
        if self.due():
            self.flush()
        last = self.progress.step == self.config.steps
        if last or self.line.due():
            self._measure_peak()
            self.line.show(self._text(), now=last)

    def flush(self) -> None:
        """Records the steps since the last time."""
        if not self._recent:
            return
        losses = torch.stack([r.loss for r in self._recent]).tolist()
        finite = torch.cat([r.finite for r in self._recent]).tolist()
        good = [loss for loss, fine in zip(losses, finite, strict=True) if fine]
        bad = len(losses) - len(good)
        self.progress.skipped += bad
        self.loss = sum(good) / len(good) if good else math.nan
        step = self.progress.step
        values = {
            "tokens": self.progress.tokens, "loss": self.loss, "lr": learning_rate(step - 1, self.config),
            "norm": float(self._recent[-1].norm), "tokens_per_s": round(self._new / max(self._interval, 1e-9)),
            "skipped": self.progress.skipped,
        }
        self.seconds += self._interval
        self.tokens += self._new
        self._recent, self._interval, self._new = [], 0.0, 0
        self.record("step", **values)
        self.trackers.write(step, "train", values)
        if bad:
            self.line.say(f"step {step:,}: {bad} of the last {len(losses)} steps were skipped: their gradient is not finite")
        self._barren = 0 if good else self._barren + bad
        if self._barren >= _HOPELESS:
            raise Error(f"the last {self._barren} steps had gradients that are not finite; a lower --lr or --dtype fp32 may help")

    def evaluated(self, values: dict[str, Any], say: bool) -> None:
        """An evaluation's values."""
        self.record("eval", **values)
        self.trackers.write(self.progress.step, "eval", values)
        if say:
            self.line.say(f"step {self.progress.step:,}: held-out loss {values['val_loss']:.4f} ± {values['val_ci']:.4f}")

    # ----------------------------------------------------------------------------------------------------------------------- line

    @property
    def rate(self) -> float:
        """Tokens a second in this process's steps; 0 before the first."""
        seconds = self.seconds + self._interval
        return (self.tokens + self._new) / seconds if seconds else 0.0

    def _measure_peak(self) -> None:
        """The rate of matrix products here and now, once, in a run that lasts and shows a line."""
        slow = self.config.dtype == "fp16" and self.device.type == "cpu"  # in software: its rate is no peak
        if self._peak is not None or slow or not self.line.enabled or self.seconds + self._interval < _SETTLED:
            return
        from gptfast.benchmark import gemm_rate

        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.config.dtype]
        self._peak = gemm_rate(dtype, self.device.type, repeats=1)
        self.line.say(f"{FORMULA}; peak: {self._peak / 1e9:,.0f} GFLOP/s, matrix products in {self.config.dtype} measured here")

    def _text(self) -> str:
        config, step, rate = self.config, self.progress.step, self.rate
        left = (config.steps - step) * self.progress.tokens / max(step, 1)
        used = memory.peak(self.device)
        parts = [
            f"step {step:,}/{config.steps:,}", f"loss {self.loss:.3f}", f"{rate:,.0f} tokens/s",
            f"MFU {100 * rate * self.flops / self._peak:.0f} %" if self._peak else "",
            f"{used / 1e9:.2f} GB" if used else "", f"ETA {duration(left / rate) if rate else '?'}",
        ]
        return "  ".join(part for part in parts if part)


def facts(config: TrainConfig, model: Any) -> dict[str, Any]:
    """What the first record of a run says beside the data: both configurations and torch's version."""
    return {"torch": torch.__version__, "config": dataclasses.asdict(config), "model": dataclasses.asdict(model.config)}
