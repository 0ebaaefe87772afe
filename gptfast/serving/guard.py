"""What stands before every endpoint: sizes of headers, API keys, errors in OpenAI's form whatever happens behind it."""

from __future__ import annotations

import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptfast.serving.errors import ApiError
from gptfast.serving.service import Service

logger = logging.getLogger("gptfast.serving")
OPEN = ("/", "/health", "/ready")  # asked without a key: by load balancers, and by a browser that shows the page


async def send_error(error: ApiError, send: Send) -> None:
    """The whole response to a request that is refused."""
    body = error.body()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    pairs = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body, "more_body": False})


class Guard:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request in, or answers it."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        begun = False

        async def noting(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            self._admit(scope)
            await self.app(scope, receive, noting)
        except ApiError as error:
            self.service.metrics.rejected.labels(str(error.status)).inc()
            if not begun:
                await send_error(error, send)
        except Exception:
            logger.exception("a request failed: %s %s", scope["method"], scope["path"][:100])
            self.service.metrics.rejected.labels("500").inc()
            if begun:
                raise
            await send_error(ApiError(500, "the server failed; it has written down why", None, "internal_error"), send)

    def _admit(self, scope: Scope) -> None:
        headers = scope["headers"]
        size = len(scope.get("raw_path", b"")) + len(scope["query_string"]) + sum(len(name) + len(value) for name, value in headers)
        if size > self.service.limits.max_header:
            text = f"the header has {size:,} bytes; allowed: {self.service.limits.max_header:,}"
            raise ApiError(431, text, None, "header_too_large", {"connection": "close"})
        if len(scope["path"]) > 1:
            scope["path"] = scope["path"].rstrip("/") or "/"
        given = next((value for name, value in headers if name == b"authorization"), b"")
        opened = scope["path"] in OPEN
        scope.setdefault("state", {})["key"] = b"" if opened else self.service.who(given.decode("latin-1"))
