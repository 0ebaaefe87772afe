"""A small HTTP/1.1 client to load the server with: one coroutine a connection, and nothing between the socket and the clock.

    connection = await Connection.open("127.0.0.1", 8000)
    status, answer = await connection.post("/v1/completions", body)
    async for when, data in connection.stream("/v1/completions", body): ...

Clients made for people take 0.1 ms and more for each event, which a load generator would measure instead of the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, Self


class Refused(Exception):
    """An answer that is no success, where a stream was asked for: its status and body."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"{status}: {body[:300].decode(errors='replace')}")
        self.status, self.body = status, body


class Connection:
    """One connection, kept between requests."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, headers: Mapping[str, str]) -> None:
        self.reader, self.writer = reader, writer
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in headers.items())

    @classmethod
    async def open(cls, host: str, port: int, headers: Mapping[str, str] | None = None) -> Self:
        """Connects; `headers` go with every request."""
        reader, writer = await asyncio.open_connection(host, port, limit=1 << 26)
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return cls(reader, writer, {"host": f"{host}:{port}", **(headers or {})})

    def request(self, method: str, path: str, body: bytes | Mapping[str, Any] = b"") -> bytes:
        """The bytes of a request; a mapping goes as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = "content-type: application/json\r\n" if data else ""
        return f"{method} {path} HTTP/1.1\r\n{self._headers}{kind}content-length: {len(data)}\r\n\r\n".encode() + data

    async def _head(self) -> tuple[int, dict[str, str]]:
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = (line.split(":", 1) for line in lines[1:] if ":" in line)
        return int(lines[0].split(" ", 2)[1]), {name.strip().lower(): value.strip() for name, value in pairs}

    async def _chunks(self, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
        """The body in pieces, as they come."""
        if "content-length" in headers:
            yield await self.reader.readexactly(int(headers["content-length"]))
            return
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            yield (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readuntil(b"\r\n")

    async def _send(self, method: str, path: str, body: bytes | Mapping[str, Any]) -> tuple[int, dict[str, str]]:
        self.writer.write(self.request(method, path, body))
        await self.writer.drain()
        return await self._head()

    async def ask(self, method: str, path: str, body: bytes | Mapping[str, Any] = b"") -> tuple[int, bytes]:
        """Status and whole body of the answer."""
        status, headers = await self._send(method, path, body)
        return status, b"".join([chunk async for chunk in self._chunks(headers)])

    async def post(self, path: str, body: bytes | Mapping[str, Any]) -> tuple[int, Any]:
        """Status and the object that the answer holds."""
        status, data = await self.ask("POST", path, body)
        return status, json.loads(data)

    async def stream(self, path: str, body: bytes | Mapping[str, Any]) -> AsyncIterator[tuple[float, bytes]]:
        """The data of each server-sent event with the time.perf_counter() at which it was read, [DONE] excluded. Raises Refused."""
        status, headers = await self._send("POST", path, body)
        chunks = self._chunks(headers)
        if status != 200:
            raise Refused(status, b"".join([chunk async for chunk in chunks]))
        rest = b""
        async for chunk in chunks:
            when = time.perf_counter()
            *events, rest = (rest + chunk).split(b"\n\n")
            for event in events:
                if event.startswith(b"data: ") and event != b"data: [DONE]":
                    yield when, event[6:]

    def abort(self) -> None:
        """Goes away without a word: the other side gets a reset."""
        with contextlib.suppress(OSError):
            self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def close(self) -> None:
        """Closes as a client that has what it wanted."""
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()
