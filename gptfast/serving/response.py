"""From a body that arrives to an answer that is sent, whole or as a stream, or to a client that has gone: one request, one task."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gptfast.errors import Error
from gptfast.serving.calls import Call, Served
from gptfast.serving.errors import ApiError
from gptfast.serving.job import Job
from gptfast.serving.service import Service

PING = 10.0  # seconds of silence after which a stream sends a comment
DISCARDED = 4  # a body that is too large is read up to so many times the limit, so that its sender reads the answer
_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"),
]  # fmt: skip
_JSON = [(b"content-type", b"application/json")]


class SlowReader(Exception):
    """The client takes no data."""


async def read_body(request: Request, service: Service) -> bytes:
    """The body. Raises ApiError 413, 408 or 415."""
    limit, parts, size = service.limits.max_body, [], 0
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # also: a page from elsewhere cannot send this without asking, and is not answered
        raise ApiError(415, f"the content type is {kind or 'not given'}; allowed: application/json")
    try:
        async with asyncio.timeout(service.limits.read_timeout):
            async for part in request.stream():
                size += len(part)
                if size <= limit:
                    parts.append(part)
                elif size > DISCARDED * limit:
                    break
    except TimeoutError:
        headers = {"connection": "close", "x-should-retry": "false"}
        raise ApiError(408, f"no whole request after {service.limits.read_timeout:g} s", None, None, headers) from None
    if size > limit:
        text = f"the body has more than {limit:,} bytes, which is what is allowed"
        raise ApiError(413, text, None, "body_too_large", {"connection": "close"})
    return b"".join(parts)


class Generating(Response):
    """The response of an endpoint that makes tokens; `kind` reads the body."""

    def __init__(self, service: Service, kind: Callable[[Served, bytes], Call]) -> None:
        super().__init__()
        self.service, self.kind = service, kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. Raises ApiError as long as nothing was sent."""
        service = self.service
        with service.request(scope["state"]["key"]):
            try:
                body = await read_body(Request(scope, receive), service)
            except ClientDisconnect:
                service.metrics.disconnects.inc()
                return
            call = await service.offload(self.kind, service.ready(), body)
            with service.queue(call.answers):
                writer = _Writer(service, scope, send)
                async with self._job(call, receive) as job:
                    try:
                        await self._answer(call, job, writer)
                    except ApiError as error:
                        if not writer.begun:
                            raise
                        await writer.write(b"data: " + error.body() + b"\n\n", last=True)
                    except SlowReader:
                        service.metrics.rejected.labels("slow reader").inc()
                        writer.abort()

    @contextlib.asynccontextmanager
    async def _job(self, call: Call, receive: Receive) -> AsyncIterator[Job]:
        """A job that ends with the block, with its client or at the deadline, whichever is first."""
        service, loop = self.service, asyncio.get_running_loop()
        job = Job(loop, call.stream, service.metrics, service.thread.touch)

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            job.gone = True
            service.thread.cancel(job)
            job.wake()

        def late() -> None:
            headers = {"x-should-retry": "false"}
            job.stopped = ApiError(504, f"no answer after {service.limits.deadline:g} s", None, "deadline", headers)
            service.thread.cancel(job)
            job.wake()

        watcher = asyncio.create_task(watch())
        alarm = loop.call_later(service.limits.deadline, late)
        service.thread.jobs.add(job)
        try:
            yield job
        finally:
            alarm.cancel()
            watcher.cancel()
            service.thread.jobs.discard(job)
            service.thread.cancel(job)
            if job.gone:
                service.metrics.disconnects.inc()
            service.metrics.end_to_end.observe(time.perf_counter() - job.arrived)

    async def _answer(self, call: Call, job: Job, writer: _Writer) -> None:
        service = self.service
        service.metrics.prompt_tokens.inc(sum(map(len, call.prompts)))
        if call.scored is not None:
            await service.offload(service.thread.score, job, call)
            await self._wait(job, writer, call, lambda: job.scored)
        if job.gone:
            return
        try:
            await service.offload(service.thread.submit, job, call)
        except Error as error:
            raise ApiError(400, str(error), None, "invalid_value") from None
        if call.stream:
            await self._stream(call, job, writer)
        else:
            await self._wait(job, writer, call, lambda: job.done)
            if not job.gone:
                await writer.whole(await service.offload(call.whole, job.answers(), job.scores))

    async def _wait(self, job: Job, writer: _Writer, call: Call, done: Callable[[], bool]) -> None:
        """Until it is done or the client is gone; a stream says meanwhile that it lives."""
        while not job.gone:
            job.check()
            if done():
                return
            if not await job.news(PING) and call.stream:
                await writer.write(b": ping\n\n")

    async def _stream(self, call: Call, job: Job, writer: _Writer) -> None:
        opening, total = call.opening(job.scores), 0
        while not job.gone:
            parts = [opening] if job.pieces else []
            finished = job.done  # looked at before the pieces: all of them are there then
            while job.pieces:
                prompt, piece = job.pieces.popleft()
                if piece.finish_reason in ("error", "cancelled"):
                    continue  # check() says why
                total += len(piece.token_ids)
                parts.append(call.chunk(prompt, piece))
            job.check()
            if parts:
                opening = b""
            if finished:
                usage = call.event([], call.totals(total)) if call.usage else b""
                await writer.write(b"".join((*parts, opening, usage, b"data: [DONE]\n\n")), last=True)
                return
            if any(parts):
                await writer.write(b"".join(parts))
            elif not await job.news(PING):
                await writer.write(b": ping\n\n")


class _Writer:
    """Sends, and gives up on a client that takes nothing for too long."""

    def __init__(self, service: Service, scope: Scope, send: Send) -> None:
        self.service, self.scope, self.send, self.begun = service, scope, send, False

    async def _send(self, message: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(self.service.limits.send_timeout):
                await self.send(message)
        except TimeoutError:
            raise SlowReader from None

    async def write(self, data: bytes, last: bool = False) -> None:
        """A piece of a stream. Raises SlowReader."""
        if not self.begun:
            self.begun = True
            await self._send({"type": "http.response.start", "status": 200, "headers": _STREAM})
        await self._send({"type": "http.response.body", "body": data, "more_body": not last})

    async def whole(self, data: bytes) -> None:
        """A whole answer. Raises SlowReader."""
        self.begun = True
        length = (b"content-length", str(len(data)).encode())
        await self._send({"type": "http.response.start", "status": 200, "headers": [*_JSON, length]})
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    def abort(self) -> None:
        """Cuts the connection off, with what is still in its buffer, where the server can (server.py)."""
        abort = self.scope.get("state", {}).get("abort")
        if abort is not None:
            abort()
