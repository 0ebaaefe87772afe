"""What a request may hold, as pydantic models: OpenAI's names, beside them those of this engine that vLLM has too.

As with OpenAI, a name that is not known is refused, and null means that the field was not given. Names that change nothing here
(user, store, metadata, ...) are accepted. Numbers must be numbers ("3" and true are refused, 3.0 is a whole number); what depends
on the server's limits or on the model is checked in calls.py.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from gptfast.errors import shown
from gptfast.serving.errors import ApiError


def _whole(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, float) or not value.is_integer():
        return value
    return int(value)


Whole = Annotated[int, BeforeValidator(_whole)]
Ids = list[Annotated[int, BeforeValidator(_whole), Field(ge=0, lt=2**31)]]
_TEXTS: list[dict[str, Any]] = [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]
_IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
Prompt = Annotated[Any, WithJsonSchema({"anyOf": [*_TEXTS, _IDS, {"type": "array", "items": _IDS, "minItems": 1}]})]
Stop = Annotated[Any, WithJsonSchema({"anyOf": [*_TEXTS, {"type": "null"}]})]


class Strict(BaseModel):
    """No unknown names, no conversions."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    """Of a streamed answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Sampled(Strict):
    """What both kinds of requests share."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[Whole, Field(ge=0)] | None = None
    min_tokens: Annotated[Whole, Field(ge=0)] | None = None
    n: Annotated[Whole, Field(ge=1)] | None = None
    seed: Annotated[Whole, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Stop = None
    stop_token_ids: Ids | None = None
    ignore_eos: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    logprobs_mode: Literal["raw", "processed"] | None = None
    user: str | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class CompletionRequest(Sampled):
    """POST /v1/completions."""

    prompt: Prompt = None
    echo: bool | None = None
    logprobs: Annotated[Whole, Field(ge=0)] | None = None
    best_of: Annotated[Whole, Field(ge=1)] | None = None
    suffix: str | None = None


class Part(Strict):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One turn."""

    role: Literal["system", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """Role and content as a template takes them."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ResponseFormat(Strict):
    """Text is the only form."""

    type: Literal["text"]


class ChatRequest(Sampled):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[Whole, Field(ge=0)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0)] | None = None
    response_format: ResponseFormat | None = None


class TokenizeRequest(Strict):
    """POST /tokenize: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: Ids


Kind = TypeVar("Kind", bound=Strict)


def read(kind: type[Kind], body: bytes) -> Kind:
    """The request in a body. Raises ApiError 400 that names the field, its value and what is allowed."""
    try:
        values = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:  # not UTF-8, no JSON, NaN, too deep, a number of 5,000 digits
        text = "the body is nested too deeply" if isinstance(error, RecursionError) else f"the body is no JSON: {error}"
        raise ApiError(400, text, None, "invalid_json") from None
    if not isinstance(values, dict):
        raise ApiError(400, f"the body is {shown(values)}; a JSON object is needed", None, "invalid_json")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _refused(error) from None


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _refused(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False)[0]
    param = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        param = shown(param)[1:-1]
        return ApiError(400, f"Unrecognized request argument supplied: {param}", param, "unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{param} is missing", param, "missing_required_parameter")
    return ApiError(400, f"{param} is {shown(first['input'])}: {first['msg']}", param, "invalid_value")
