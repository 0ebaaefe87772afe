"""The loop around the step: learning rate, log, evaluation, checkpoints, resume, signals, and the model folder at the end."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from gptfast import checkpoint
from gptfast.config import TrainConfig
from gptfast.data import TokenData
from gptfast.errors import Error
from gptfast.training import card, distributed, memory, muon, state
from gptfast.training.loader import Batch, DataSource, Loader
from gptfast.training.optimizer import AdamW, groups
from gptfast.training.report import Report, facts, flops_per_token
from gptfast.training.schedule import learning_rate
from gptfast.training.state import Progress, check_out
from gptfast.training.step import Step, StepResult, Sums

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}
Measure = Callable[[Any], dict[str, float]]


class Trainer:
    """Trains a model with `loss_sum` on token data: `Trainer(model, train, val, TrainConfig(...)).fit()`.

    train, val: TokenData (gptfast.data.load), ids [N] as a tensor, an array or a list, or a DataSource of a task's own; val None:
    no evaluation. model: fp32 parameters; it is moved to config.device and trained in place. tokenizer: saved with the model.
    measure: called with the model in evaluation mode at every evaluation; what it returns is recorded too, and its "score", if it
    has one (higher is better), decides which evaluation is best, else the held-out loss does. about: what the model card says of
    the kind of model. With config.out set, the run keeps log.jsonl and checkpoints there and ends as a Hugging Face folder. Raises
    gptfast.Error for data that is too short, a context the model does not have, or parameters that are not fp32.
    """

    def __init__(
        self,
        model: Any,
        train: Any,
        val: Any = None,
        config: TrainConfig | None = None,
        tokenizer: Any = None,
        quiet: bool = False,
        measure: Measure | None = None,
        about: str = card.BASE,
    ) -> None:
        self.model, self.config, self.tokenizer, self.quiet = model, config or TrainConfig(), tokenizer, quiet
        self.measure, self.about = measure, about
        config = self.config
        self.parallel = distributed.start(config)
        self.rows = self.parallel.rows(config)
        self.device = resolve_device(config.device)
        wrong = next((n for n, p in model.named_parameters() if p.dtype != torch.float32), None)
        if wrong is not None:
            raise Error(f"parameter {wrong} is not fp32; training needs a model in fp32 (from_pretrained(..., dtype='fp32'))")
        self.context = config.context or model.config.n_positions
        if self.context > model.config.n_positions:
            raise Error(f"context is {self.context:,}; the model has {model.config.n_positions:,} positions")
        self.loader = self._source(train)
        self.val = self._held_out(val)
        self.out = Path(config.out) if config.out else None
        if config.keep_best and (self.out is None or self.val is None):
            raise Error("keep_best needs held-out data and --out, where the best weights are kept")
        model.to(self.device)
        model.transformer.gradient_checkpointing = config.activation_checkpointing
        self.parallel.prepare(model, DTYPES[config.dtype])
        self.step = Step(model, self._optimizer(), DTYPES[config.dtype], config.clip, config.compile, self.parallel)
        self.optimizer = self.step.optimizer
        self.progress = Progress(microbatch=min(config.microbatch or self.rows, self.rows))
        self._signal: int | None = None  # that this process got
        self._stop: int | None = None  # that any process got
        self._saved = -1
        self._evaluated: tuple[int, dict[str, float]] = (-1, {})

    def _optimizer(self) -> AdamW:
        config, named = self.config, self.parallel.parameters.items()
        betas = config.beta1, config.beta2
        if config.optimizer == "adamw":
            return AdamW(groups(named, config.weight_decay), config.lr, betas, config.eps)
        products = torch.float32 if config.dtype == "fp32" else torch.bfloat16
        return muon.of_model(named, config.lr, config.weight_decay, config.momentum, betas, config.eps, products)

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

    @property
    def done(self) -> int:
        """Steps done so far."""
        return self.progress.step

    # ------------------------------------------------------------------------------------------------------------------ the loop

    def fit(self, resume: bool = False) -> dict[str, Any]:
        """Runs to config.steps; returns step, tokens, loss, seconds, tokens_per_s, skipped and, with held-out data, val_loss.

        resume: go on from the newest checkpoint of config.out that verifies, bit for bit as if never stopped (on the CPU). SIGTERM
        and the first Ctrl-C finish the step, save, and raise SystemExit(75 or 130). A save that fails (a full disk) is a warning.
        Where memory runs out in a step, it is computed again in microbatches of half the size. Raises gptfast.Error where
        config.out is not empty and resume is not asked for, where the checkpoint is of another run, or where one sequence is too
        much for the memory.
        """
        progress, config = self._open(resume), self.config
        quiet = self.quiet or not self.parallel.main
        report = Report(config, progress, flops_per_token(self.model, self.context), self.device, quiet, self.parallel.rank)
        self.model.train()
        with report, self._signals():
            given = facts(config, self.model)
            report.open(self.out, "resume" if progress.step else "start", data=self.loader.fingerprint, **given)
            while not self._ended():
                start = time.perf_counter()
                result, tokens = self._compute(report)
                tokens, self._stop = self.parallel.agree(tokens, self._signal)
                progress.step += 1
                progress.tokens += tokens
                report.add(result, tokens)
                report.took(time.perf_counter() - start)
                self._after_step(report)
            report.flush()
            final = dict(self._judge(report, say=False)) if self.val is not None else {}
            self._export(report, final)
        return {
            "step": progress.step, "tokens": progress.tokens, "loss": report.loss, "skipped": progress.skipped,
            "seconds": round(report.seconds, 2), "tokens_per_s": round(report.rate), **final,
            **({"best_step": progress.best_step} if config.keep_best else {}),
            **({"out": str(self.out)} if self.out else {}),
        }

    def _ended(self) -> bool:
        """All steps are done, or the evaluations have stopped getting better."""
        patience = self.config.patience
        return self.progress.step >= self.config.steps or (patience > 0 and self.progress.stale >= patience)

    def _compute(self, report: Report) -> tuple[StepResult, int]:
        """One step: its result and its tokens. The batch is the same whatever memory allows to compute at once."""
        self.parallel.seed(self.config.seed, self.progress.step)
        while True:
            noise = torch.get_rng_state()
            seen: list[int] = []
            sums: Sums | None = None
            reason = ""
            try:
                sums = self.step.gradients(self._microbatches(self.progress.step, seen))
            except (RuntimeError, MemoryError) as error:
                if not memory.exhausted(error):
                    raise
                if self.parallel.world > 1:  # the others wait in the middle of an exchange
                    size = self.progress.microbatch
                    raise Error(f"out of memory with a microbatch of {size}; give the processes a smaller --microbatch") from error
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            if sums is not None:
                return self.step.apply(sums, learning_rate(self.progress.step, self.config)), sum(seen)
            self._halve(report, reason)  # the exception is gone by now, and with it the tensors that its frames held
            torch.set_rng_state(noise)

    def _halve(self, report: Report, reason: str) -> None:
        self.step.discard()
        memory.release(self.device)
        size, half = self.progress.microbatch, (self.progress.microbatch + 1) // 2
        if size == 1:
            ways = "--activation-checkpointing, a shorter --context or a smaller model"
            raise Error(f"memory is too small for one sequence of {self.context:,} tokens ({reason}); ways to need less: {ways}")
        self.progress.microbatch = half
        parts = -(-self.config.batch // half)
        report.record("microbatch", sequences=half)
        report.line.say(f"out of memory: {half} sequences at a time instead of {size}, in {parts} parts; the batch stays the same")

    def _microbatches(self, step: int, seen: list[int]) -> Iterator[Batch]:
        """The batch of a step in parts; the tokens of each are added to `seen`."""
        first = step * self.config.batch + self.parallel.rank * self.rows
        for offset in range(0, self.rows, self.progress.microbatch):
            batch = self.loader.samples(first + offset, min(self.progress.microbatch, self.rows - offset))
            seen.append(batch.tokens)
            yield batch.to(self.device)

    def _after_step(self, report: Report) -> None:
        config, step = self.config, self.progress.step
        report.show()
        if self.val is not None and config.eval_every and step % config.eval_every == 0 and step < config.steps:
            self._judge(report, say=True)
        last = self._ended()
        if self.out and config.save_every and (step % config.save_every == 0 or last or self._stop is not None):
            self._save(report)
        if self._stop is not None:
            report.flush()
            report.line.say(f"stopped at step {step:,}; --resume goes on from step {max(self._saved, 0):,}")
            raise SystemExit(EXIT_CODES[signal.Signals(self._stop)] if self._saved >= 0 else 1)
        if last and step < config.steps:
            since = f"no better than step {self.progress.best_step:,} in {config.patience} evaluations"
            report.line.say(f"stopped at step {step:,}: {since}")

    # ---------------------------------------------------------------------------------------------------------------- evaluation

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean loss a target over held-out rows spread evenly over the data, with the half-width of its 95 % confidence interval
        (from the spread between microbatches), bits per byte where the data records its bytes, and what `measure` returns."""
        if self.val is None:
            raise Error("there is no held-out data to evaluate on")
        count, size = min(self.config.eval_sequences, self.val.windows), self.progress.microbatch
        numbers = [number * self.val.windows // count for number in range(count)]
        self.model.eval()
        parts = [numbers[first : first + size] for first in range(0, count, size)]
        sums, targets = zip(*self.parallel.spread(self._loss_of, parts), strict=True)
        measured = self.measure(self.model) if self.measure is not None else {}
        self.model.train()
        total = max(sum(targets), 1)
        mean = sum(sums) / total
        # of a ratio of two sums (Cochran 1977, "Sampling Techniques", section 2.11); with equal counts that of a mean
        off = sum((loss - mean * found) ** 2 for loss, found in zip(sums, targets, strict=True))
        values = {"val_loss": mean, "val_ci": 1.96 * math.sqrt(off * len(parts) / max(len(parts) - 1, 1)) / total}
        if self.val.bytes_per_target:
            values["val_bits_per_byte"] = mean / self.val.bytes_per_target / math.log(2)
        return {**values, **measured}

    def _loss_of(self, numbers: list[int]) -> tuple[float, float]:
        """Sum of the losses and number of targets of some held-out rows."""
        assert self.val is not None
        loss, targets = self.step.loss_sum(self.val.rows(numbers).to(self.device))
        return float(loss), float(targets)

    def _judge(self, report: Report, say: bool) -> dict[str, float]:
        """Evaluates, unless this step was, and compares with the best so far."""
        progress = self.progress
        if self._evaluated[0] == progress.step:
            return self._evaluated[1]
        values = self.evaluate()
        self._evaluated = progress.step, values
        report.evaluated(values, say)
        value = -values["score"] if "score" in values else values["val_loss"]
        if progress.best is None or value < progress.best:
            progress.best, progress.best_step, progress.stale = value, progress.step, 0
            if self.config.keep_best:
                self._save(report, best=True)
        else:
            progress.stale += 1
        return values

    # ------------------------------------------------------------------------------------------------------- folder, save, resume

    def _open(self, resume: bool) -> Progress:
        """Starts afresh, or from the newest checkpoint."""
        resume = resume or self.parallel.restarted
        if self.out is not None and self.parallel.main:
            check_out(self.out, resume)
            self.out.mkdir(parents=True, exist_ok=True)
        self.parallel.agree(0, None)  # the folder is there now
        found = self.parallel.newest(self.out) if resume and self.out is not None else None
        if found is None:
            if resume:
                warnings.warn(f"run {self.out} has no checkpoint: starting from step 0", stacklevel=3)
            torch.manual_seed(self.config.seed)
        else:
            self.progress = state.load(found[1], self.step, self.config, self.loader)
            self._saved = found[0]
        return self.progress

    def _save(self, report: Report, best: bool = False) -> None:
        """A checkpoint of this step, or its weights as the best ones; a disk that is full or gone is a warning, and the last good
        checkpoint stays."""
        assert self.out is not None
        report.flush()
        step = self.progress.step
        try:
            if best:
                self._write(self.out / "best", lambda folder: state.weights(folder, self.step), 2)
            else:
                fill = lambda folder: state.fill(folder, self.step, self.progress, self.config, self.loader)  # noqa: E731
                self._write(self.out, fill, self.config.keep)
                self._saved = step
        except OSError as error:
            reason = error.strerror or str(error)
            report.record("save_failed", reason=reason)
            report.line.say(f"warning: no checkpoint of step {step:,}: {reason}; training goes on")

    def _write(self, run: Path, fill: Callable[[checkpoint.Folder], None], keep: int) -> None:
        self.parallel.save(lambda fill: checkpoint.save(run, self.progress.step, fill, keep), fill)

    def _export(self, report: Report, final: dict[str, float]) -> None:
        """The run's folder becomes a Hugging Face folder with the last weights, or the best ones."""
        if self.out is None:
            return
        progress = self.progress
        if self.config.keep_best and progress.best_step != progress.step:
            best = self.out / f"best/checkpoints/step_{progress.best_step:09d}"
            reason = checkpoint.verify(best)
            if reason is None:
                state.load_weights(best, self.step)
                self.step.refresh()
                final.update(self.evaluate())
            else:
                report.line.say(f"warning: the best weights are gone ({reason}); the model is the last step's")
        self.model = self.parallel.plain(self.model)
        if not self.parallel.main:
            return
        text = card.card(
            self.out.name, self.model, self.config, progress, self.loader, report.loss, final, self.device, self.about
        )  # fmt: skip
        state.export(self.out, self.write_model, text)

    def write_model(self, folder: Path) -> None:
        """Writes into an empty folder what the run ends as: config.json, safetensors, tokenizer files."""
        self.model.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

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
