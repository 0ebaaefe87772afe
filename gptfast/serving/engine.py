"""The thread that makes tokens: the engine's scheduler, stepped for as long as there is work, beside the event loop.

The loop submits and cancels; after each step what is new is handed over in one call, however many tokens and requests it is.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from gptfast._environment import parse_backend
from gptfast.backend import use
from gptfast.generation.engine import Engine, Load
from gptfast.generation.parameters import SamplingParams
from gptfast.serving.errors import ApiError, engine_failed
from gptfast.serving.job import Job

if TYPE_CHECKING:
    from gptfast.serving.calls import Call
    from gptfast.serving.metrics import Metrics

logger = logging.getLogger("gptfast.serving")
IDLE = 1.0  # seconds between two heartbeats of a thread that has nothing to do
STALE = 60.0  # seconds without a heartbeat after which the thread is said to hang


class EngineThread(threading.Thread):
    """Opens an engine (`open_engine`, with the backends that `backend` asks for), steps it, and closes it if `owned`.

    `engine` is None until it is loaded; `error`: why it could not be. `failing`: the last step raised an exception.
    """

    def __init__(self, open_engine: Callable[[], Engine], backend: str, owned: bool, on_ready: Callable[[Engine], None]) -> None:
        super().__init__(name="gptfast engine", daemon=True)
        self.engine: Engine | None = None
        self.error: BaseException | None = None
        self.failing = False
        self.jobs: set[Job] = set()
        self.beat = time.monotonic()
        self.metrics: Metrics | None = None
        self._open, self._backend, self._owned, self._on_ready = open_engine, parse_backend(backend), owned, on_ready
        self._dirty: dict[Job, None] = {}
        self._work, self._closing = threading.Event(), False

    # ----------------------------------------------------------------------------------------------------------- this thread's part

    def run(self) -> None:
        """Loads, then steps until close()."""
        asked, forced = self._backend
        with use(asked, **forced):
            try:
                engine = self._open()
                engine.generate([[0]], SamplingParams(max_tokens=1, temperature=0.0))  # what is made on first use is made now
                self._on_ready(engine)
                self.engine = engine
            except BaseException as error:
                self.error = error
                return
            while not self._closing:
                self.beat = time.monotonic()
                if not self._step(engine):
                    self._work.wait(IDLE)
                    self._work.clear()
            self.engine = None
            if self._owned:
                engine.close()

    def _step(self, engine: Engine) -> bool:
        start = time.perf_counter()
        try:
            worked = engine.step()
            if any(job.stopped is None for job in list(self._dirty)):  # somebody got something; what gave up does not count
                self.failing = False
        except KeyboardInterrupt:  # in this thread: hurry() ended a pass before it had anything, and it is made again
            worked = True
        except Exception:
            logger.exception("a step of the engine failed; what was being made is ended")
            self.failing, worked = True, True
            self._give_up(engine)
        if worked and self.metrics is not None:
            self.metrics.step.observe(time.perf_counter() - start)
        self._hand_over()
        return worked

    def _give_up(self, engine: Engine) -> None:
        if self.metrics is not None:
            self.metrics.failures.inc()
        for job in list(self.jobs):
            job.stopped = engine_failed()
            for work in job.work:
                engine.cancel(work)
            self._dirty[job] = None

    def _hand_over(self) -> None:
        if not self._dirty:
            return
        by_loop: dict[asyncio.AbstractEventLoop, list[Job]] = {}
        while self._dirty:
            job, _ = self._dirty.popitem()
            by_loop.setdefault(job.loop, []).append(job)
            if self.metrics is not None and job.tokens:
                tokens, job.tokens = job.tokens, 0
                self.metrics.generation_tokens.inc(tokens)
        for loop, jobs in by_loop.items():
            try:
                loop.call_soon_threadsafe(_wake, jobs)
            except RuntimeError:  # the loop is closed: nobody listens any more
                logger.debug("the event loop is closed")

    # ------------------------------------------------------------------------------------------------------------- others' part

    def touch(self, job: Job) -> None:
        """A job has news. In this thread, and in one that submits what ends at once."""
        self._dirty[job] = None
        if threading.current_thread() is not self:
            self._work.set()

    def submit(self, job: Job, call: Call) -> None:
        """Queues the answers that a call asks for. Raises gptfast.Error. From any thread."""
        engine = self._ready()
        for place, prompt in enumerate(call.prompts):
            job.requests.append(engine.submit(prompt, call.params, job.listener(place)))
        self._begin(engine)

    def score(self, job: Job, call: Call) -> None:
        """Queues log P of a call's prompts. From any thread."""
        engine = self._ready()
        assert call.scored is not None
        job.scores = [engine.submit_score(prompt, call.scored, job.told) for prompt in call.prompts]
        self._begin(engine)

    def _begin(self, engine: Engine) -> None:
        engine.hurry()
        self._work.set()

    def _ready(self) -> Engine:
        if self.engine is None:
            raise ApiError(503, "the server is shutting down" if self._closing else "the model is being loaded")
        return self.engine

    def cancel(self, job: Job) -> None:
        """Ends what is left of a job. From any thread."""
        engine = self.engine
        left = [work for work in job.work if not work.done]
        if engine is not None and left:
            for work in left:
                engine.cancel(work)
            self._work.set()

    def load(self) -> Load | None:
        """How much there is to do; None while there is no engine."""
        engine = self.engine
        return None if engine is None else engine.load()

    @property
    def alive_and_well(self) -> bool:
        """Whether the thread goes on with its work."""
        return self.is_alive() and not self.failing and (self.engine is None or time.monotonic() - self.beat < STALE)

    def close(self) -> None:
        """Ends the thread after its step."""
        self._closing = True
        self._work.set()
        engine = self.engine
        if engine is not None:
            engine.hurry()


def _wake(jobs: list[Job]) -> None:
    for job in jobs:
        job.wake()
