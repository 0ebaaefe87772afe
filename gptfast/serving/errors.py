"""Every error in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from gptfast.errors import shown

_TYPES = {401: "authentication_error", 403: "permission_error", 408: "timeout_error", 429: "rate_limit_error", 504: "timeout_error"}
FIELDS = ("message", "type", "param", "code")


class ApiError(Exception):
    """What the client is told, and with which status."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, dict(headers or {})

    def body(self) -> bytes:
        """The JSON object, in ASCII: also half a surrogate pair in a message is legal there."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()


def busy(message: str, seconds: int = 1) -> ApiError:
    """429: the same request may be sent again later."""
    return ApiError(429, message, None, "rate_limit_exceeded", {"retry-after": str(seconds), "retry-after-ms": str(1000 * seconds)})


def unavailable(message: str, seconds: int = 1) -> ApiError:
    """503: loading or draining."""
    return ApiError(503, message, None, "unavailable", {"retry-after": str(seconds)})


def no_model(name: str, served: str) -> ApiError:
    """404: another model is served."""
    return ApiError(404, f"model is {shown(name)}, which is not served here; allowed: {served}", "model", "model_not_found")


def of_status(status: int, detail: Any) -> ApiError:
    """What the framework itself refuses: an unknown path, another method."""
    text = str(detail) if detail else HTTPStatus(status).phrase
    return ApiError(status, text, None, {404: "not_found", 405: "method_not_allowed"}.get(status))


def engine_failed() -> ApiError:
    """500 for what a step that raised was making."""
    return ApiError(500, "the engine failed; the request may be sent again", None, "engine_error")
