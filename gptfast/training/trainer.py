"""The loop around the step: learning rate, log, evaluation, checkpoints, resume, signals, and the model folder at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptfast import checkpoint
from gptfast.config import TrainConfig
from gptfast.data import TokenData
from gptfast.errors import Error, LoadError
from gptfast.training.loader import Batch, DataSource, Loader
from gptfast.training.log import Line, Log, duration
from gptfast.training.optimizer import AdamW, groups
from gptfast.training.schedule import learning_rate
from gptfast.training.step import Step, StepResult

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}
_HOPELESS = 100  # steps without a finite gradient, one after the other
# what the order of the data and the meaning of a step depend on: a resumed run must have the same
_FIXED = ("batch", "context", "seed", "document_mask")


class Trainer:
    """Trains a model with `loss_sum` on token data: `Trainer(model, train, val, TrainConfig(...)).fit()`.

    train, val: TokenData (gptfast.data.load), ids [N] as a tensor, an array or a list, or a DataSource of a task's own; val None: no
    evaluation. model: fp32 parameters; it is moved to config.device and trained in place. tokenizer: saved with the model. With
    config.out set, the run keeps log.jsonl and checkpoints there and ends as a Hugging Face folder. Raises gptfast.Error for data that is too short, a
    context the model does not have, or parameters that are not fp32.
    """

    def __init__(
        self, model: Any, train: Any, val: Any = None, config: TrainConfig | None = None, tokenizer: Any = None, quiet: bool = False
    ) -> None:
        self.model, self.config, self.tokenizer, self.quiet = model, config or TrainConfig(), tokenizer, quiet
        config = self.config
        self.device = resolve_device(config.device)
        wrong = next((n for n, p in model.named_parameters() if p.dtype != torch.float32), None)
        if wrong is not None:
            raise Error(f"parameter {wrong} is not fp32; training needs a model in fp32 (from_pretrained(..., dtype='fp32'))")
        self.context = config.context or model.config.n_positions
        if self.context > model.config.n_positions:
            raise Error(f"context is {self.context:,}; the model has {model.config.n_positions:,} positions")
        self.loader = self._source(train)
        self.val = self._held_out(val)
        model.to(self.device)
        decayed = groups(model.named_parameters(), config.weight_decay)
        self.optimizer = AdamW(decayed, config.lr, (config.beta1, config.beta2), config.eps)
        self.step = Step(model, self.optimizer, DTYPES[config.dtype], config.clip)
        self.microbatch = min(config.microbatch or config.batch, config.batch)
        self.done = self.skipped = self.tokens = 0  # steps, skipped ones, tokens seen
        self.out = Path(config.out) if config.out else None
        self.log = Log(None)
        self._recent: list[StepResult] = []
        self._seconds = self._interval = 0.0
        self._counted = self._logged = self._barren = 0
        self._signal: int | None = None
        self._saved = -1
        self.loss = math.nan

    def _source(self, given: Any) -> DataSource:
        """A source as it is, if its rows fit the model; token data in windows."""
        if isinstance(given, DataSource):
            if given.context > self.context:
                raise Error(f"the data has rows of {given.context:,} tokens; the context is {self.context:,}")
            return given
        return Loader(_token_data(given, self.model), self.context, self.config.seed, self.config.document_mask)

    def _held_out(self, val: Any) -> DataSource | None:
        if val is None or isinstance(val, DataSource):
            return None if val is None else self._source(val)
        data = _token_data(val, self.model)
        if len(data) <= self.context:
            lengths = f"the held-out text has {len(data):,} tokens, a context has {self.context:,}"
            warnings.warn(f"no evaluation: {lengths}", stacklevel=3)
            return None
        return self._source(data)

    # ------------------------------------------------------------------------------------------------------------------ the loop

    def fit(self, resume: bool = False) -> dict[str, Any]:
        """Runs to config.steps; returns step, tokens, loss, seconds, tokens_per_s, skipped and, with held-out data, val_loss.

        resume: go on from the newest checkpoint of config.out that verifies, bit for bit as if never stopped (on the CPU). SIGTERM
        and the first Ctrl-C finish the step, save, and raise SystemExit(75 or 130). A save that fails (a full disk) is a warning.
        Raises gptfast.Error where config.out is not empty and resume is not asked for, or where the checkpoint is of another run.
        """
        self._open(resume)
        self.model.train()
        config = self.config
        with Line(not self.quiet) as line, self._signals():
            while self.done < config.steps:
                start = time.perf_counter()
                result = self.step(self._microbatches(self.done), learning_rate(self.done, config))
                self.done += 1
                self._recent.append(result)
                if self.done % config.log_every == 0 or self.done == config.steps or line.due():
                    self.loss = float(result.loss)  # waits for the device, so that the seconds below are real
                self._interval += time.perf_counter() - start
                self._after_step(line)
            final = self.evaluate() if self.val is not None else {}
            self._export(line)
        seconds = max(self._seconds, 1e-9)
        return {
            "step": self.done, "tokens": self.tokens, "loss": self.loss, "skipped": self.skipped,
            "seconds": round(self._seconds, 2), "tokens_per_s": round(self._counted / seconds), **final,
            **({"out": str(self.out)} if self.out else {}),
        }

    def _microbatches(self, step: int) -> Iterator[Batch]:
        first = step * self.config.batch
        for offset in range(0, self.config.batch, self.microbatch):
            count = min(self.microbatch, self.config.batch - offset)
            batch = self.loader.samples(first + offset, count)
            self.tokens += batch.tokens
            yield batch.to(self.device)

    def _after_step(self, line: Line) -> None:
        config, last = self.config, self.done == self.config.steps
        if self.done % config.log_every == 0 or last:
            self._write_log(line)
        if line.due() or last:
            line.show(self._progress(), now=last)
        if self.val is not None and config.eval_every and (self.done % config.eval_every == 0) and not last:
            values = self.evaluate()
            line.say(f"step {self.done:,}: held-out loss {values['val_loss']:.4f} ± {values['val_ci']:.4f}")
        if self.out and config.save_every and (self.done % config.save_every == 0 or last or self._signal is not None):
            self._save(line)
        if self._signal is not None:
            self._write_log(line)
            line.say(f"stopped at step {self.done:,}; --resume goes on from step {max(self._saved, 0):,}")
            raise SystemExit(EXIT_CODES[signal.Signals(self._signal)] if self._saved >= 0 else 1)

    def _write_log(self, line: Line) -> None:
        """Reads the results of the steps since the last time (the one wait for the device) and logs them."""
        if not self._recent:
            return
        losses = torch.stack([r.loss for r in self._recent]).tolist()
        finite = torch.cat([r.finite for r in self._recent]).tolist()
        good = [loss for loss, fine in zip(losses, finite, strict=True) if fine]
        bad = len(losses) - len(good)
        self.skipped += bad
        self.loss = sum(good) / len(good) if good else math.nan
        tokens, self._logged = self.tokens - self._logged, self.tokens
        self._seconds += self._interval
        self._counted += tokens
        problem = self.log.write(
            "step", step=self.done, tokens=self.tokens, loss=self.loss, lr=learning_rate(self.done - 1, self.config),
            norm=float(self._recent[-1].norm), tokens_per_s=round(tokens / max(self._interval, 1e-9)), skipped=self.skipped,
        )
        self._recent, self._interval = [], 0.0
        if bad:
            line.say(f"step {self.done:,}: {bad} of the last {len(losses)} steps were skipped: their gradient is not finite")
        if problem:
            line.say(f"warning: {problem}")
        self._barren = 0 if good else self._barren + bad
        if self._barren >= _HOPELESS:
            raise Error(f"the last {self._barren} steps had gradients that are not finite; a lower --lr or --dtype fp32 may help")

    def _progress(self) -> str:
        seconds = self._seconds + self._interval
        rate = (self._counted + self.tokens - self._logged) / seconds if seconds else 0.0
        left = (self.config.steps - self.done) * self.tokens / self.done
        eta = duration(left / rate) if rate else "?"
        return f"step {self.done:,}/{self.config.steps:,}  loss {self.loss:.3f}  {rate:,.0f} tokens/s  ETA {eta}"

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean loss a target over held-out rows spread evenly over the data, with the half-width of its 95 % confidence interval
        (from the spread between microbatches), and bits per byte where the data records its bytes. Logged."""
        if self.val is None:
            raise Error("there is no held-out data to evaluate on")
        count = min(self.config.eval_sequences, self.val.windows)
        numbers = [number * self.val.windows // count for number in range(count)]
        self.model.eval()
        sums, targets = [], []
        for first in range(0, count, self.microbatch):
            loss, found = self.step.loss_sum(self.val.rows(numbers[first : first + self.microbatch]).to(self.device))
            sums.append(float(loss))
            targets.append(int(found))
        self.model.train()
        total, parts = max(sum(targets), 1), len(sums)
        mean = sum(sums) / total
        # of a ratio of two sums (Cochran 1977, "Sampling Techniques", 6.4); with equal counts that of a mean
        off = sum((loss - mean * found) ** 2 for loss, found in zip(sums, targets, strict=True))
        values = {"val_loss": mean, "val_ci": 1.96 * math.sqrt(off * parts / max(parts - 1, 1)) / total}
        if self.val.bytes_per_target:
            values["val_bits_per_byte"] = mean / self.val.bytes_per_target / math.log(2)
        self.log.write("eval", step=self.done, **values)
        return values

    # ------------------------------------------------------------------------------------------------------- folder, save, resume

    def _open(self, resume: bool) -> None:
        """Starts afresh, or from the newest checkpoint; opens the log."""
        if self.out is not None:
            check_out(self.out, resume)
            self.out.mkdir(parents=True, exist_ok=True)
        found = checkpoint.newest(self.out) if resume and self.out is not None else None
        if found is None:
            if resume:
                warnings.warn(f"run {self.out} has no checkpoint: starting from step 0", stacklevel=3)
            torch.manual_seed(self.config.seed)
        else:
            self._load(found[1])
        self.log = Log(None if self.out is None else self.out / "log.jsonl")
        facts = {"config": dataclasses.asdict(self.config), "model": dataclasses.asdict(self.model.config)}
        event = "resume" if self.done else "start"
        self.log.write(event, step=self.done, data=self.loader.fingerprint, torch=torch.__version__, **facts)

    def _named(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _save(self, line: Line) -> None:
        """A checkpoint of this step; a disk that is full or gone is a warning, and the last good one stays."""
        assert self.out is not None
        self._write_log(line)
        try:
            checkpoint.save(self.out, self.done, self._fill, self.config.keep)
            self._saved = self.done
        except OSError as error:
            reason = error.strerror or str(error)
            self.log.write("save_failed", step=self.done, reason=reason)
            line.say(f"warning: no checkpoint of step {self.done:,}: {reason}; training goes on")

    def _fill(self, folder: checkpoint.Folder) -> None:
        random, states = checkpoint.random_state()
        optimizer: dict[str, Tensor] = {}
        for name, p in self._named().items():
            optimizer |= {f"{key}.{name}": value for key, value in self.optimizer.state[p].items()}
        folder.tensors("model.safetensors", dict(self.model.named_parameters()))
        folder.tensors("optimizer.safetensors", optimizer)
        folder.tensors("random.safetensors", states)
        folder.json("state.json", {
            "version": checkpoint.VERSION, "step": self.done, "skipped": self.skipped, "tokens": self.tokens,
            "data": self.loader.fingerprint,
            "config": dataclasses.asdict(self.config), "model": dataclasses.asdict(self.model.config), "random": random,
        })  # fmt: skip

    def _load(self, folder: Path) -> None:
        state = checkpoint.read_json(folder / "state.json")
        for name in _FIXED:
            old, new = state["config"].get(name), getattr(self.config, name)
            if old != new:
                raise Error(f"resume: {name} was {old} in {folder}, now it is {new}; a resumed run keeps it")
        if state["data"] != self.loader.fingerprint:
            raise Error(f"resume: the training data is not what {folder} was trained on; give the same --data, or another --out")
        weights, moments = (checkpoint.read_tensors(folder / f"{name}.safetensors") for name in ("model", "optimizer"))
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if name not in weights or weights[name].shape != p.shape:
                    raise LoadError(f"resume: {folder} holds another model: {name} does not fit")
                p.copy_(weights[name])
        step = torch.zeros(1, device=self.device)
        for name, p in self._named().items():
            values = {key: moments[f"{key}.{name}"].to(self.device) for key in ("exp_avg", "exp_avg_sq", "step")}
            step.fill_(float(values.pop("step")))
            self.optimizer.state[p] = {"step": step.view(()), **values}
        self.step.refresh()
        checkpoint.set_random_state(state["random"], checkpoint.read_tensors(folder / "random.safetensors"))
        self.done, self.skipped, self._saved = state["step"], state["skipped"], state["step"]
        self.tokens = self._logged = state.get("tokens", self.done * self.config.batch * self.context)

    def _export(self, line: Line) -> None:
        """The model and the tokenizer as a Hugging Face folder: written beside, then renamed into place, config.json last."""
        if self.out is None:
            return
        temporary = self.out / f"export.tmp-{os.getpid()}"
        try:
            export(self.model, temporary, self.tokenizer)
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
                os.replace(path, self.out / path.name)
            checkpoint.sync_folder(self.out)
        except OSError as error:
            reason = f"the model cannot be written: {error.strerror or error}; the checkpoints are there"
            raise LoadError(f"run {self.out}: {reason}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """In runs that save, SIGTERM and the first SIGINT stop after the step; a second SIGINT interrupts at once."""
        main = threading.current_thread() is threading.main_thread()
        if self.out is None or not self.config.save_every or not main:
            yield
            return

        def ask(number: int, frame: Any) -> None:
            if self._signal == number == signal.SIGINT:
                raise KeyboardInterrupt
            self._signal = number

        before = {number: signal.signal(number, ask) for number in EXIT_CODES}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def export(model: Any, folder: Path, tokenizer: Any = None) -> None:
    """Writes and fsyncs a Hugging Face folder: config.json, safetensors, tokenizer files. Raises OSError where the disk is full."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    checkpoint.sync_folder(folder)


def check_out(out: Path, resume: bool) -> None:
    """Raises gptfast.Error where `out` is not empty and resume is not asked for."""
    if out.exists() and (not out.is_dir() or (not resume and any(out.iterdir()))):
        raise Error(f"run {out} is not empty; go on with --resume, or name another folder with --out")


def resolve_device(name: str) -> torch.device:
    """auto: cuda where there is a GPU. Raises gptfast.Error where cuda is asked for and there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise Error("device cuda: PyTorch finds no CUDA device here")
    return torch.device(name)


def _token_data(given: Any, model: Any) -> TokenData:
    """TokenData as it is, ids wrapped; ids the model does not have are an error where that costs one pass over memory."""
    if isinstance(given, TokenData):
        return given
    data = TokenData.from_ids(given, model.config.eos_token_id)
    top = max((int(part.max()) for part in data.parts if len(part)), default=0)
    low = min((int(part.min()) for part in data.parts if len(part)), default=0)
    if low < 0 or top >= model.config.vocab_size:
        raise Error(f"token id {low if low < 0 else top} in the data; the model has ids 0 to {model.config.vocab_size - 1:,}")
    return data
