"""`CppRunner`: the C++ engine (csrc/cpu/engine) behind the Runner protocol. Weights are packed; many tokens are one call, in which
Python may do other things. A sequence's tokens and log-probabilities have the same bits whatever else is in the batch, however its
prompt was cut, with any number of threads, and with step() as with decode().
"""

from __future__ import annotations

import contextlib
import importlib
import mmap
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gptfast.config import GPT2Config
from gptfast.errors import Error
from gptfast.generation.rows import Drawn, Row, Sampler
from gptfast.generation.runner import Batch
from gptfast.ops.sample import ORDERS

PARAMETERS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "seed", "choice", "position")
CONSTRAINTS = ("repetition", "frequency", "presence", "bias", "mask", "prompt", "counts")


class Weights(Protocol):
    """What the engine is made of, as packed.Packed has it: matrices as packed uint8 buffers, vectors and wpe as fp32 tensors."""

    @property
    def config(self) -> GPT2Config:
        """The model's."""

    @property
    def dtype(self) -> str:
        """fp32, bf16, int8 or int4."""

    @property
    def path(self) -> Path | None:
        """The file that the tensors are mapped from; None where they are in memory."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Hugging Face's names -> buffer."""


class CppRunner:
    """Runs packed weights on `threads` threads with `pages` pages of 64 tokens. Memory of pages is taken as they are first written.

    Keys and values are fp32 with fp32 weights, else bf16. Raises gptfast.Error for weights or numbers that do not fit.
    """

    def __init__(self, weights: Weights, threads: int, pages: int) -> None:
        for name, value in (("threads", threads), ("pages", pages)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise Error(f"{name} is {value!r}; allowed: a whole number of at least 1")
        config = weights.config
        extension: Any = importlib.import_module("gptfast._C")
        shape = {name: getattr(config, name) for name in SHAPE}
        tensors = weights.tensors if weights.path is None else in_huge_pages(weights.tensors)
        try:
            self._engine: Any = extension.Engine(shape, tensors, weights.dtype, threads, pages)
        except (ValueError, RuntimeError) as error:
            raise Error(f"the C++ engine cannot run these weights: {_line(error)}") from None
        self.vocab, self.context, self.pages = config.real_vocabulary, config.n_positions, pages
        self._sampler: tuple[list[tuple[Row, int]], Sampler] | None = None

    def step(self, batch: Batch) -> Drawn:
        """One pass over all new tokens, and the draws; parameters that kernels do not have are applied to the logits in PyTorch."""
        if batch.targets is not None:
            targets = torch.tensor([token for tokens in batch.targets for token in tokens], dtype=torch.int64)
            out = _results(1, len(targets), 0)
            self._step(batch, {**out, "targets": targets}, 0)
            drawn = _drawn(out, 0)
            return Drawn(targets.tolist(), drawn.status, drawn.logprobs, drawn.top_ids, drawn.top_logprobs)
        rows = [(row, row.start + len(row.tokens) + j) for row, n in _drawing(batch) for j in range(n)]
        if not rows:
            self._step(batch, {}, 0)
            return Drawn()
        sampler = self._sampler_of(rows)
        group = _kernel_group(sampler)
        if group is None:
            return sampler.draw(self.logits(batch))
        out = _results(1, len(rows), group.top_n)
        self._step(batch, {**out, **_parameters(group)}, group.top_n)
        group.position += 1
        return _drawn(out, 0)

    def logits(self, batch: Batch) -> Tensor:
        """The pass of step() without draws: fp32 [draws, vocab]."""
        logits = torch.empty(sum(batch.draws), self.vocab)
        self._step(batch, {"logits": logits}, 0)
        return logits

    def decode(self, batch: Batch, steps: int) -> list[Drawn]:
        """Up to `steps` single-token steps in one call; Ctrl-C ends it after the token it is at, if this is the main thread."""
        rows = [(row, row.start + len(row.tokens)) for row, _ in _drawing(batch)]
        sampler = self._sampler_of(rows)
        group = _kernel_group(sampler)
        if group is None or batch.targets is not None:
            return [self.step(batch)]
        out = _results(steps, len(rows), group.top_n)
        stops = [list(row.stop_ids) for row, _ in rows]
        main = threading.current_thread() is threading.main_thread()
        done = self._call("decode", *_tensors(batch), {**out, **_parameters(group)}, group.top_n, steps, stops, main)
        group.position += done
        self._sampler = ([(row, place + done - 1) for row, place in rows], sampler)
        return [_drawn(out, i) for i in range(done)]

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies pages of all layers."""
        self._call("copy_pages", list(pairs))

    def interrupt(self) -> None:
        """Ends a decode() that is running, after the token it is at. From any thread."""
        if self._engine is not None:
            self._engine.interrupt()

    def close(self) -> None:
        """Lets go of weights, pages and threads. Closing twice does nothing."""
        self._engine = None

    def _step(self, batch: Batch, tensors: dict[str, Tensor | None], top_n: int) -> None:
        self._call("step", *_tensors(batch), tensors, top_n)

    def _call(self, method: str, *arguments: Any) -> Any:
        if self._engine is None:
            raise Error("the engine is closed")
        try:
            return getattr(self._engine, method)(*arguments)
        except (ValueError, RuntimeError) as error:
            raise Error(_line(error)) from None

    def _sampler_of(self, rows: list[tuple[Row, int]]) -> Sampler:
        """The sampler of the step before where it goes on with the same rows; it counts what it drew."""
        before = self._sampler
        now = [(id(row), place) for row, place in rows]
        if before is None or [(id(row), place + 1) for row, place in before[0]] != now:
            ahead = [place - row.start - len(row.tokens) for row, place in rows]
            sampler = Sampler([row for row, _ in rows], self.vocab, torch.device("cpu"), ahead)
        else:
            sampler = before[1]
        self._sampler = (rows, sampler)
        return sampler


def in_huge_pages(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in memory for which huge pages are asked, each at a multiple of 64 bytes.

    A token reads all weights in order, and what limits it on pages of 4 KiB, as a mapped file has, is their number: on Zen 4 int8
    takes 1.2 to 1.4 times, fp32 1.4 to 1.5 times as long on them.
    """
    starts, total = {}, 0
    for name, tensor in tensors.items():
        starts[name] = total
        total += -(-tensor.nbytes // 64) * 64
    memory = mmap.mmap(-1, max(total, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    copies = {}
    for name, tensor in tensors.items():
        copy = whole[starts[name] : starts[name] + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        copies[name] = copy.copy_(tensor)
    return copies


SHAPE = (
    "vocab_size", "real_vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function",
    "layer_norm_epsilon", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "tie_word_embeddings",
)  # fmt: skip


def _line(error: Exception) -> str:
    return str(error).split("\n")[0]


def _drawing(batch: Batch) -> list[tuple[Row, int]]:
    """The rows that draw, and how often each."""
    return [(row, n) for row, n in zip(batch.rows, batch.draws, strict=True) if row is not None and n]


def _kernel_group(sampler: Sampler) -> Any:
    """All rows as one call of the kernels, or None where orders, kinds of log-probabilities or several of them are not theirs."""
    group = sampler.groups[0]
    ours = ORDERS[group.order] == ORDERS["gptfast"] and group.mode == "raw"
    return group if ours and len(sampler.groups) == 1 else None


def _parameters(group: Any) -> dict[str, Tensor | None]:
    numbers: dict[str, Tensor | None] = {name: getattr(group, name) for name in PARAMETERS}
    return numbers | dict(zip(CONSTRAINTS, group.constraints.now(), strict=True))


def _results(steps: int, rows: int, top_n: int) -> dict[str, Tensor]:
    shape = (steps, rows)
    return {
        "token": torch.empty(shape, dtype=torch.int64), "status": torch.empty(shape, dtype=torch.int8),
        "logprob": torch.empty(shape), "top_ids": torch.empty(*shape, top_n, dtype=torch.int64),
        "top_logprobs": torch.empty(*shape, top_n),
    }  # fmt: skip


def _drawn(out: dict[str, Tensor], step: int) -> Drawn:
    return Drawn(*(values[step].tolist() for values in out.values()))


def _tensors(batch: Batch) -> tuple[Tensor, ...]:
    """tokens [N], query_lengths [S], starts [S], block_table [S, W], draws [S], all int32."""
    width = max((len(table) for table in batch.tables), default=0)
    table = [[*pages, *[0] * (width - len(pages))] for pages in batch.tables]
    lists = [token for tokens in batch.tokens for token in tokens], [len(tokens) for tokens in batch.tokens], batch.starts
    tokens, lengths, starts = (torch.tensor(values, dtype=torch.int32) for values in lists)
    block_table = torch.tensor(table, dtype=torch.int32).view(len(table), width)
    return tokens, lengths, starts, block_table, torch.tensor(batch.draws, dtype=torch.int32)
