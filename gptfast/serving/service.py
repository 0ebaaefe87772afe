"""What a server knows and counts: the engine's thread, who may come in, and how much is under way."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, TypeVar

import gptfast
from gptfast.generation.engine import Engine
from gptfast.serving.calls import Served
from gptfast.serving.engine import EngineThread
from gptfast.serving.errors import ApiError, busy, unavailable
from gptfast.serving.limits import Limits
from gptfast.serving.metrics import Metrics

T = TypeVar("T")
WORKERS = 2  # threads that read bodies and tokenise


class Service:
    """Of one app. `name`: of the model; `template`: of conversations; `keys`: API keys, none for no check."""

    def __init__(
        self, open_engine: Callable[[], Engine], name: str, template: str, limits: Limits, keys: Sequence[str], backend: str,
        owned: bool,
    ) -> None:
        self.name, self.template, self.limits = name, template, limits
        self._keys = [_digest(key) for key in keys]
        self.thread = EngineThread(open_engine, backend, owned, self._loaded)
        self.metrics = self.thread.metrics = Metrics(self.thread.load)
        self.served: Served | None = None
        self.draining, self.created = False, int(time.time())
        self.drain_seconds = limits.drain  # of what is left of it
        self.answers = 0  # waiting or being made
        self._by_key: Counter[bytes] = Counter()
        self._workers = ThreadPoolExecutor(WORKERS, "gptfast tokenise")

    def _loaded(self, engine: Engine) -> None:
        facts = [gptfast.__version__, engine.describe(), asdict(engine.config), engine.tokenizer.fingerprint()]
        print_ = "fp_" + hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:12]
        longest = max(len(engine.tokenizer.token_bytes(token)) for token in range(engine.config.real_vocabulary))
        self.served = Served(self.name, engine.tokenizer, engine.config, print_, self.template, self.limits, longest)

    def ready(self) -> Served:
        """What is served. Raises ApiError 503 while loading or draining."""
        if self.draining:
            raise unavailable("the server is shutting down", 5)
        if self.thread.error is not None:
            raise ApiError(500, "the model could not be loaded", None, "load_error")
        if self.served is None or self.thread.engine is None:
            raise unavailable("the model is being loaded")
        return self.served

    # --------------------------------------------------------------------------------------------------------------- who comes in

    def who(self, authorization: str) -> bytes:
        """A digest of the caller's key. Raises ApiError 401; every key is compared, in constant time."""
        if not self._keys:
            return b""
        scheme, _, key = authorization.partition(" ")
        given = _digest(key.strip())
        known = [hmac.compare_digest(given, expected) for expected in self._keys]
        if not any(known) or scheme.lower() != "bearer":
            text = "an API key is needed: Authorization: Bearer KEY" if not key else "the API key is not known here"
            raise ApiError(401, text, None, "invalid_api_key", {"www-authenticate": "Bearer"})
        return given

    @contextlib.contextmanager
    def request(self, key: bytes) -> Iterator[None]:
        """One of a key's requests. Raises ApiError 429 where it has too many."""
        if self._by_key[key] >= self.limits.max_per_key:
            raise busy(f"{self.limits.max_per_key} requests of this key are under way; allowed: no more at once")
        self._by_key[key] += 1
        try:
            yield
        finally:
            self._by_key[key] -= 1
            if not self._by_key[key]:
                del self._by_key[key]

    @contextlib.contextmanager
    def queue(self, answers: int) -> Iterator[None]:
        """A place for so many answers. Raises ApiError 429 where the queue is full."""
        if self.answers and self.answers + answers > self.limits.max_queue:
            raise busy(f"{self.answers} answers are waiting or being made; allowed: {self.limits.max_queue}")
        self.answers += answers
        try:
            yield
        finally:
            self.answers -= answers

    async def offload(self, function: Callable[..., T], *arguments: Any) -> T:
        """Runs it on a worker, so that the event loop goes on."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, function, *arguments)

    # -------------------------------------------------------------------------------------------------------------- start and end

    def start(self) -> None:
        """Begins to load."""
        self.thread.start()

    def stop_jobs(self, error: ApiError) -> None:
        """Ends all that is under way, with that error. In the event loop."""
        for job in list(self.thread.jobs):
            job.stopped = error
            self.thread.cancel(job)
            job.wake()

    async def close(self) -> None:
        """Ends the engine's thread."""
        self.draining = True
        self.thread.close()
        if self.thread.ident is not None:
            await asyncio.get_running_loop().run_in_executor(None, self.thread.join)
        self._workers.shutdown(wait=False, cancel_futures=True)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
