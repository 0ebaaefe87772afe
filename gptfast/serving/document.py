"""/openapi.json: the requests' models with this server's limits in them, and the errors that every endpoint may answer with."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from gptfast.serving.errors import FIELDS
from gptfast.serving.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from gptfast.serving.service import Service

BODIES: tuple[type[BaseModel], ...] = (CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)
_REF = "#/components/schemas/"
_ERRORS = {
    "400": "what is asked for is not allowed", "401": "an API key is needed", "404": "unknown path or model",
    "405": "another method", "408": "the request did not arrive in time", "413": "the body is too large", "415": "no JSON",
    "429": "too much at once",
    "431": "the header is too large", "500": "a defect, or logits that hold NaN", "503": "loading or draining",
    "504": "the deadline is over",
}  # fmt: skip


def document(app: FastAPI, service: Service) -> dict[str, Any]:
    """The OpenAPI document; made anew until the model is known."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    whole = get_openapi(title=app.title, version=app.version, routes=app.routes)
    _, definitions = models_json_schema([(model, "validation") for model in BODIES], ref_template=_REF + "{model}")
    schemas: dict[str, Any] = definitions["$defs"]
    nullable = {"anyOf": [{"type": "string"}, {"type": "null"}]}
    fields = {name: {"type": "string"} if name in ("message", "type") else nullable for name in FIELDS}
    error = {"type": "object", "properties": fields, "required": list(FIELDS)}
    schemas["Error"] = {"type": "object", "properties": {"error": error}, "required": ["error"]}
    _bound(schemas, service)
    whole.setdefault("components", {})["schemas"] = schemas
    form = {"application/json": {"schema": {"$ref": f"{_REF}Error"}}}
    for path, operations in whole["paths"].items():
        for operation in operations.values():
            kind = operation.pop("x-body", None)
            if kind is not None:
                body = {"application/json": {"schema": {"$ref": _REF + kind}}}
                operation["requestBody"] = {"required": True, "content": body}
            operation["responses"] = {"200": {"description": "the answer", "content": _answers(path)}}
            operation["responses"] |= {status: {"description": text, "content": form} for status, text in _ERRORS.items()}
    if service.served is not None:
        app.openapi_schema = whole
    return whole


def _answers(path: str) -> dict[str, Any]:
    if path == "/metrics":
        return {"text/plain": {"schema": {"type": "string"}}}
    answer: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    return {**answer, "text/event-stream": {"schema": {"type": "string"}}} if path.endswith("completions") else answer


def _bound(schemas: dict[str, Any], service: Service) -> None:
    limits = service.limits
    most = {"n": limits.max_n, "best_of": limits.max_n, "logprobs": limits.max_logprobs, "top_logprobs": limits.max_logprobs}
    if service.served is not None:
        context = service.served.config.n_positions
        most |= {"max_tokens": context, "min_tokens": context, "max_completion_tokens": context}
    for name, schema in schemas.items():
        properties = schema.get("properties", {})
        for field, high in most.items():
            for part in properties.get(field, {}).get("anyOf", []):
                if part.get("type") == "integer":
                    part |= {"minimum": int(field in ("n", "best_of")), "maximum": high}
        if "model" in properties and name != "Error":
            properties["model"] = {"enum": [service.name, None], "title": "Model"}
        if service.served is not None:
            _bound_ids(properties, service.served.config.real_vocabulary - 1)


def _bound_ids(schema: Any, highest: int) -> None:
    """Every list of whole numbers in a request is one of token ids."""
    if isinstance(schema, dict):
        if isinstance(items := schema.get("items"), dict) and items.get("type") == "integer":
            schema["items"] = {"type": "integer", "minimum": 0, "maximum": highest}
        for part in schema.values():
            _bound_ids(part, highest)
    elif isinstance(schema, list):
        for part in schema:
            _bound_ids(part, highest)
