"""Batches of text to token ids, in this process or in several others, handed back in order.

Nothing here needs torch, so that a process starts in a fraction of a second and stays small. What a batch becomes does not depend
on where it is encoded, and at most two batches a process are under way: memory is bounded whatever the input's size.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt

from gptfast.errors import Error

Ids = npt.NDArray[np.uint32]
T = TypeVar("T")
ALONE = 1 << 23  # characters encoded in this process before others are started, where their number is left open


class Task(NamedTuple):
    """Texts, for each the split that its ids go to, and whether the end token follows it."""

    texts: list[str]
    splits: list[str]
    ends: list[bool]


_tokenizer: Any = None  # of a process that encodes for another
_end = 0


def tokenizer(spec: str) -> Any:
    """The pipeline in a tokenizer.json's text; what looks like a special token in a text stays text."""
    from tokenizers import Tokenizer

    found = Tokenizer.from_str(spec)
    found.encode_special_tokens = True
    return found


def encode(pipeline: Any, task: Task, end: int) -> dict[str, Ids]:
    """Split -> the ids of its texts, one after the other, each that ends a document followed by `end`."""
    parts: dict[str, list[Ids]] = {}
    tail = np.array([end], np.uint32)
    for item, split, ends in zip(pipeline.encode_batch_fast(task.texts), task.splits, task.ends, strict=True):
        ids = parts.setdefault(split, [])
        ids.append(np.asarray(item.ids, np.uint32))
        if ends:
            ids.append(tail)
    return {split: np.concatenate(ids) for split, ids in parts.items()}


def _start(spec: str, end: int) -> None:
    """Prepares a process: one thread, Ctrl-C is its parent's business, and it ends when its parent does."""
    global _tokenizer, _end
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _tokenizer, _end = tokenizer(spec), end
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _encode(task: Task) -> dict[str, Ids]:
    return encode(_tokenizer, task, _end)


class Encoder:
    """Encodes tasks in `processes` processes; 1: in this one, on all its threads. None: a process a core, once the text is long
    enough to be worth it. A context manager."""

    def __init__(self, spec: str, end: int, processes: int | None) -> None:
        self.spec, self.end, self.processes = spec, end, processes
        self._own = tokenizer(spec)
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def map(self, tasks: Iterable[tuple[Task, T]]) -> Iterator[tuple[dict[str, Ids], T]]:
        """The ids of each task, with what came beside it, in order. Raises gptfast.Error where a process dies."""
        waiting: deque[tuple[Future[dict[str, Ids]], T]] = deque()
        alone = 0
        try:
            for task, beside in tasks:
                if self._pool is None and not self._opens(alone):
                    alone += sum(map(len, task.texts))
                    yield encode(self._own, task, self.end), beside
                    continue
                pool = self._open()
                waiting.append((pool.submit(_encode, task), beside))
                if len(waiting) >= 2 * cores(self.processes):
                    future, first = waiting.popleft()
                    yield future.result(), first
            while waiting:
                future, first = waiting.popleft()
                yield future.result(), first
        except BrokenProcessPool:
            raise Error("a process that encodes text was killed (out of memory?); --processes 1 needs the least") from None

    def _opens(self, alone: int) -> bool:
        if self.processes is None:
            return cores(None) > 1 and alone >= ALONE
        return self.processes > 1

    def _open(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = get_context("spawn")  # a fork would copy the locks of whatever threads run here
            self._pool = ProcessPoolExecutor(cores(self.processes), context, _start, (self.spec, self.end))
        return self._pool


def cores(processes: int | None) -> int:
    """`processes`, or the cores that this process may use."""
    if processes is not None:
        return processes
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
