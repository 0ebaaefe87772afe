"""Tiny models behind live servers on loopback ports, each in a thread of this process, and clients for them."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
openai = pytest.importorskip("openai")

from gptfast import Engine, GPT2Config, GPT2LMHeadModel, GPT2Tokenizer  # noqa: E402
from gptfast.generation.loading import cpp_reason  # noqa: E402
from gptfast.serving import Limits, create_app  # noqa: E402
from gptfast.serving.server import listen, make_server  # noqa: E402

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. \N{GRINNING FACE} na\u00efve "
CONTEXT, BROKEN = 256, 200  # position BROKEN of one of the models is NaN
ENGINES = ("cpp", "eager")


def eventually(condition: Callable[[], Any], what: str, seconds: float = 10.0) -> None:
    """Fails, naming `what`, where it does not come true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"after {seconds} s not yet: {what}"
        time.sleep(0.002)


class Steps:
    """Lets an engine's thread make steps one at a time: after hold() each waits for tick()."""

    def __init__(self, engine: Engine) -> None:
        self.real, self.count = engine.step, 0
        self._free, self._tickets = threading.Event(), threading.Semaphore(0)
        self._free.set()
        engine.step = self.step  # type: ignore[method-assign]

    def step(self) -> bool:
        if not self._free.is_set():
            self._tickets.acquire()
        worked = self.real()
        self.count += 1
        return worked

    def hold(self) -> None:
        self._free.clear()

    def tick(self) -> None:
        """One step."""
        before = self.count
        self._tickets.release()
        eventually(lambda: self.count > before, "the step")

    def go(self) -> None:
        self._free.set()
        self._tickets.release()


class Live:
    """A server in a thread. `url` ends without /v1; `client` is OpenAI's."""

    def __init__(self, open_engine: Any, key: str = "none", **settings: Any) -> None:
        self.steps: Steps | None = None

        def opened() -> Engine:
            engine = open_engine()
            self.steps = Steps(engine)
            return engine

        self.app = create_app(opened, **{"name": "tiny", **settings})
        self.service = self.app.state.service
        self.socket = listen("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = make_server(self.app, "127.0.0.1", self.port)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        self.key = key
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=20)

    def ready(self) -> Live:
        eventually(lambda: self.service.served is not None and self.engine is not None, "the model is loaded", 30)
        return self

    @property
    def engine(self) -> Engine:
        return self.service.thread.engine

    def idle(self) -> None:
        """Fails unless everything is given back soon."""
        eventually(lambda: not self.service.thread.jobs and not self.service.answers, "no request is under way")
        eventually(lambda: (load := self.engine.load()).running + load.waiting + load.held == 0, "no page is held")

    def ask(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON (or text) and headers; `body` as JSON, or bytes as they are."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            kind = {"content-type": "application/json"} if data is not None else {}
            names = {**kind, "authorization": f"Bearer {self.key}", **(headers or {})}
            connection.request(method or ("GET" if data is None else "POST"), path, data, names)
            answer = connection.getresponse()
            text = answer.read()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, json.loads(text) if text and "json" in found.get("content-type", "") else text.decode(), found
        finally:
            connection.close()

    def close(self) -> None:
        if self.steps is not None:
            self.steps.go()
        self.client.close()
        self.server.should_exit = True
        self.thread.join(20)
        self.socket.close()
        assert not self.thread.is_alive() and not self.service.thread.is_alive(), "the server does not end"


def save_model(path: Path, broken: bool = False) -> Path:
    """A model with much to choose from."""
    tokenizer = GPT2Tokenizer.train([TEXT * 4], 300)
    tokenizer.save_pretrained(path)
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, bos_token_id=end,
        eos_token_id=end,
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    if broken:
        with torch.no_grad():
            model.transformer.wpe.weight[BROKEN] = float("nan")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("serving") / "tiny")


@pytest.fixture(scope="session")
def broken_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("serving") / "broken", broken=True)


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> GPT2Tokenizer:
    return GPT2Tokenizer.from_pretrained(folder)


def settings_of(engine: str) -> dict[str, Any]:
    """create_app's, for an engine of ENGINES."""
    reason = cpp_reason("fp32", "cpu") if engine == "cpp" else None
    if reason is not None:
        pytest.skip(f"cpp: {reason}")
    return {"backend": "eager"} if engine == "eager" else {}


@pytest.fixture(scope="session")
def servers(folder: Path) -> Iterator[Callable[[str], Live]]:
    """A server for each engine of ENGINES, which all tests share and leave idle."""
    running: dict[str, Live] = {}

    def get(engine: str) -> Live:
        if engine not in running:
            running[engine] = Live(lambda: Engine(folder, device="cpu", threads=1), **settings_of(engine))
        return running[engine].ready()

    yield get
    for live in running.values():
        live.close()


@pytest.fixture(params=ENGINES)
def live(request: pytest.FixtureRequest, servers: Callable[[str], Live]) -> Iterator[Live]:
    """The shared server of each engine."""
    server = servers(request.param)
    yield server
    server.idle()


@pytest.fixture
def one(servers: Callable[[str], Live]) -> Iterator[Live]:
    """The shared server of the fastest engine here, for what does not concern engines."""
    server = servers("eager" if cpp_reason("fp32", "cpu") else "cpp")
    yield server
    server.idle()


@pytest.fixture
def own(folder: Path) -> Iterator[Callable[..., Live]]:
    """Makes servers of one's own, with settings; they are closed at the end."""
    made: list[Live] = []

    def make(path: Path = folder, limits: dict[str, Any] | None = None, key: str = "none", **settings: Any) -> Live:
        made.append(Live(lambda: Engine(path, device="cpu", threads=1), key, limits=Limits(**(limits or {})), **settings))
        return made[-1].ready()

    yield make
    for live in made:
        live.close()
