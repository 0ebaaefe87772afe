"""The HTTP server that OpenAI's clients and lm-eval talk to (the `serve` extra): `create_app` and `run`.

engine.py is the thread that makes tokens, job.py one request's part in it; schemas.py says what a request may hold, calls.py turns
it into prompts and answers into OpenAI's objects (logprobs.py), response.py sends them; guard.py stands before all of it; app.py
puts it together and server.py runs it.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from gptfast.errors import Error
from gptfast.serving.limits import Limits

if TYPE_CHECKING:
    from gptfast.serving.app import create_app
    from gptfast.serving.server import run

__all__ = ["Limits", "create_app", "run"]
NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def __getattr__(name: str) -> Any:
    if name not in ("create_app", "run"):
        raise AttributeError(f"module 'gptfast.serving' has no attribute {name!r}")
    for package in NEEDED:
        if find_spec(package) is None:
            raise Error(f"the server needs {package}, which is not installed: pip install 'gptfast-torch[serve]'")
    return getattr(import_module("gptfast.serving.app" if name == "create_app" else "gptfast.serving.server"), name)
