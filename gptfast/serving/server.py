"""Runs the app on uvicorn: which connections are kept, what a signal does, where API keys come from."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import signal
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI
from h11 import LocalProtocolError, RemoteProtocolError
from uvicorn.protocols.http.h11_impl import H11Protocol

from gptfast.errors import Error, LoadError
from gptfast.serving.errors import ApiError
from gptfast.serving.service import Service

KEEP_ALIVE = 15  # seconds that a connection without a request is kept
LINGER = 2.0  # seconds in which a client that was refused may read why


class Protocol(H11Protocol):
    """uvicorn's HTTP/1.1, with these differences: the app may cut a connection off (scope["state"]["abort"]), a header has to
    arrive in time, and what is no HTTP is refused in OpenAI's form."""

    header_timeout = 30.0
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The app gets a way to cut it off; the first request has to come in time."""
        super().connection_made(transport)
        self.app_state = {**self.app_state, "abort": transport.abort}
        self._deadline = self.loop.call_later(self.header_timeout, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more is expected."""
        self._deadline.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """The time for a header runs from its first byte to its end."""
        if self._refused:
            return
        super().data_received(data)
        waiting = self.cycle is None or self.cycle.response_complete
        if self._refused:
            return
        if not waiting:
            self._deadline.cancel()
        elif self._deadline.cancelled():
            self._deadline = self.loop.call_later(self.header_timeout, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, or a header beyond any limit."""
        with suppress(LocalProtocolError, RemoteProtocolError):
            body = ApiError(400, msg, None, "invalid_http").body()
            head = "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: "
            self.transport.write(f"{head}{len(body)}\r\n\r\n".encode() + body)
        self._refused = True
        if self.transport.can_write_eof():  # closed at once, with data that nobody has read, the answer would be lost
            self.transport.write_eof()
        self._deadline.cancel()
        self._deadline = self.loop.call_later(LINGER, self.transport.abort)


class Server(uvicorn.Server):
    """SIGTERM or Ctrl-C: no new requests, those that run have `drain` seconds and are then cancelled; a second signal cancels at
    once."""

    def __init__(self, config: uvicorn.Config, service: Service, told: Callable[[str], None]) -> None:
        super().__init__(config)
        self.service, self.told = service, told
        self.signals: list[int] = []

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """As uvicorn's, but a signal that was obeyed is not raised again."""
        with super().capture_signals():
            yield
            self._captured_signals.clear()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first begins to drain, the second ends it."""
        self.signals.append(sig)
        self.drain()

    def drain(self) -> None:
        """From any thread, or below a signal handler."""
        if self.service.draining:
            self.service.drain_seconds = 0.0
        self.service.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to end."""
        if self.service.thread.error is not None:
            return True
        if self.service.draining and not self.should_exit:
            await self._drained()
            self.should_exit = True
        return await super().on_tick(counter)

    async def _drained(self) -> None:
        """Until nothing runs, or the time is over."""
        service = self.service
        clock = asyncio.get_running_loop().time
        begin = clock()
        if service.thread.jobs:
            self.told(f"{len(service.thread.jobs)} requests are under way; they have {service.drain_seconds:g} s")
        while service.thread.jobs and clock() - begin < service.drain_seconds:
            await asyncio.sleep(0.05)
        if service.thread.jobs:
            self.told(f"{len(service.thread.jobs)} requests are cancelled")
            service.stop_jobs(ApiError(503, "the server is shutting down", None, "unavailable", {"connection": "close"}))
            while service.thread.jobs and clock() - begin < service.drain_seconds + 5:
                await asyncio.sleep(0.05)


def make_server(app: FastAPI, host: str = "127.0.0.1", port: int = 8000, told: Callable[[str], None] = lambda line: None) -> Server:
    """A server for an app of create_app(); run() it, or serve() it in an event loop. drain() ends it from outside."""
    service: Service = app.state.service
    Protocol.header_timeout = service.limits.read_timeout
    config = uvicorn.Config(
        app, host=host, port=port, http=Protocol, ws="none", lifespan="on", log_level="warning", access_log=False,
        server_header=False, timeout_keep_alive=KEEP_ALIVE, timeout_graceful_shutdown=5, backlog=2048,
        h11_max_incomplete_event_size=2 * service.limits.max_header,
    )
    return Server(config, service, told)


def run(app: FastAPI, host: str = "127.0.0.1", port: int = 8000, told: Callable[[str], None] = lambda line: None) -> None:
    """Serves until SIGTERM or Ctrl-C. `told` gets lines for the user. Raises gptfast.Error where the port cannot be had, or what
    opening the model raised."""
    service: Service = app.state.service
    bound = listen(host, port)
    server = make_server(app, host, bound.getsockname()[1], told)
    told(f"http://{_shown(host)}:{bound.getsockname()[1]} (Ctrl-C ends it)")
    try:
        server.run(sockets=[bound])
    finally:
        bound.close()
    if service.thread.error is not None:
        raise service.thread.error
    if signal.SIGINT in server.signals:
        raise KeyboardInterrupt


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises gptfast.Error."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, number)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            return bound
        except OSError:
            bound.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise Error(f"--host {host} --port {port} cannot be listened on: {reason}") from None


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_keys(file: str | None, variable: str | None) -> list[str]:
    """API keys: one a line of a file (empty lines and those that begin with # are left out), or in a variable of the environment,
    separated by commas. Raises gptfast.Error where a source that is named has none."""
    keys: list[str] = []
    if file is not None:
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise LoadError(f"API key file {file}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
        keys += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not keys:
            raise LoadError(f"API key file {file} holds no key")
    if variable is not None:
        found = [key.strip() for key in os.environ.get(variable, "").split(",") if key.strip()]
        if not found:
            raise Error(f"--api-key-env is {variable}, and that variable holds no key")
        keys += found
    return keys
