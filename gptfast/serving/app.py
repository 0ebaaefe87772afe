"""`create_app`: the endpoints, put together."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

import gptfast
from gptfast.errors import Error
from gptfast.generation.engine import Engine
from gptfast.serving import page, tokens
from gptfast.serving.calls import CompletionCall, encode
from gptfast.serving.chat import ChatCall
from gptfast.serving.document import document
from gptfast.serving.errors import no_model, of_status, unavailable
from gptfast.serving.guard import Guard
from gptfast.serving.limits import Limits
from gptfast.serving.response import Generating
from gptfast.serving.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from gptfast.serving.service import Service
from gptfast.tasks import dialogue


def create_app(
    engine: Engine | Callable[[], Engine] | str | Path,
    *,
    name: str | None = None,
    template: str | None = None,
    limits: Limits | None = None,
    api_keys: Sequence[str] = (),
    backend: str = "",
) -> FastAPI:
    """An ASGI app that serves one model: OpenAI's completions and chat completions, and what belongs to them.

    `engine`: an open Engine, which stays the caller's and is used by nobody else meanwhile; or what opens one, in the thread that
    will run it (a function, or whatever Engine takes as path), closed at the end. `name`: of the model in requests (default: the
    path's last part). `template`: of conversations (default: the one recorded in the folder, else "plain"). `api_keys`: none means
    that no key is asked for. `backend`: as GPTFAST_BACKEND. `app.state.service` is what it runs on. Raises gptfast.Error.
    """
    path = engine if isinstance(engine, (str, Path)) else getattr(engine, "path", None)
    if template is None:
        template = (dialogue.recorded(path) if path is not None and Path(path).is_dir() else None) or "plain"
    if template not in dialogue.TEMPLATES:
        raise Error(f"template is {template!r}; allowed: {', '.join(dialogue.TEMPLATES)}")
    opener: Callable[[], Engine] = (
        (lambda: Engine(engine)) if isinstance(engine, (str, Path)) else (lambda: engine) if isinstance(engine, Engine) else engine
    )
    named = name or (Path(path).name if path is not None else "") or "gptfast"
    service = Service(opener, named, template, limits or Limits(), api_keys, backend, not isinstance(engine, Engine))

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await service.close()

    app = FastAPI(
        title="gptfast", version=gptfast.__version__, lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.state.service = service
    _models(app, service)
    _health(app, service)
    _generating(app, service)
    _tokens(app, service)
    app.include_router(page.router())

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> None:
        raise of_status(error.status_code, error.detail)

    app.add_middleware(Guard, service=service)
    app.openapi = lambda: document(app, service)  # type: ignore[method-assign]
    return app


def _json(value: Any) -> Response:
    return Response(encode(value), media_type="application/json")


def _generating(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", openapi_extra={"x-body": CompletionRequest.__name__})
    async def completions(request: Request) -> Response:
        """Continues texts."""
        return Generating(service, CompletionCall)

    @app.post("/v1/chat/completions", openapi_extra={"x-body": ChatRequest.__name__})
    async def chat_completions(request: Request) -> Response:
        """Answers in a conversation."""
        return Generating(service, ChatCall)


def _tokens(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", openapi_extra={"x-body": TokenizeRequest.__name__})
    async def tokenize(request: Request) -> Response:
        """The ids of a text or a conversation."""
        return await tokens.respond(service, request, tokens.tokenize)

    @app.post("/detokenize", openapi_extra={"x-body": DetokenizeRequest.__name__})
    async def detokenize(request: Request) -> Response:
        """The text of ids."""
        return await tokens.respond(service, request, tokens.detokenize)

    @app.get("/tokenizer_info")
    async def tokenizer_info(request: Request) -> Response:
        """The special tokens."""
        return _json(tokens.info(service.ready()))


def _models(app: FastAPI, service: Service) -> None:
    def entry() -> dict[str, Any]:
        served = service.ready()
        return {
            "id": served.name, "object": "model", "created": service.created, "owned_by": "gptfast",
            "max_model_len": served.config.n_positions,
        }

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        """The one model."""
        return _json({"object": "list", "data": [entry()]})

    @app.get("/v1/models/{model:path}")
    async def model(request: Request, model: str) -> Response:
        """The one model, by name."""
        if model != service.name:
            raise no_model(model, service.name)
        return _json(entry())

    @app.get("/version")
    async def version(request: Request) -> Response:
        """Of gptfast."""
        return _json({"version": gptfast.__version__})


def _health(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health(request: Request) -> Response:
        """Whether the process and its engine's thread go on."""
        if not service.thread.alive_and_well:
            raise unavailable("the engine's thread has stopped")
        return _json({"status": "ok"})

    @app.get("/ready")
    async def ready(request: Request) -> Response:
        """Whether requests are taken: the model is loaded, and has made a token."""
        service.ready()
        return _json({"status": "ready"})

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        """In Prometheus's text form."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
