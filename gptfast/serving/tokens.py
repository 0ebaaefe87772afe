"""/tokenize, /detokenize and /tokenizer_info: vLLM's shapes, which lm-eval's remote tokenizer reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from gptfast.errors import Error, shown
from gptfast.serving.calls import Served, encode
from gptfast.serving.chat import written
from gptfast.serving.errors import ApiError
from gptfast.serving.logprobs import token_text
from gptfast.serving.response import read_body
from gptfast.serving.schemas import DetokenizeRequest, TokenizeRequest, read
from gptfast.serving.service import Service


async def respond(service: Service, request: Request, kind: Callable[[Served, bytes], dict[str, Any]]) -> Response:
    """Reads the body and answers it, on a worker."""
    with service.request(request.scope["state"]["key"]):
        try:
            body = await read_body(request, service)
        except ClientDisconnect:
            return Response()
        data = await service.offload(lambda: encode(kind(service.ready(), body)))
        return Response(data, media_type="application/json")


def tokenize(served: Served, body: bytes) -> dict[str, Any]:
    """A text may be longer than the context here. GPT-2 adds no special tokens, whatever add_special_tokens says. A prompt that is
    nothing but the token that a text begins or ends with is that token: lm-eval's remote tokenizer asks for its id so."""
    request = read(TokenizeRequest, body)
    if (request.prompt is None) == (request.messages is None):
        raise ApiError(400, "give prompt or messages, one of them", "prompt", "invalid_value")
    if request.prompt is None:
        ids = written(served, request.messages or [], request.add_generation_prompt is not False)
    else:
        tokenizer = served.tokenizer
        named = {tokenizer.bos_token: tokenizer.bos_token_id, tokenizer.eos_token: tokenizer.eos_token_id}
        special = named.get(request.prompt)
        try:
            ids = tokenizer.encode(request.prompt) if special is None else [special]
        except Error as error:
            raise ApiError(400, f"prompt: {error}", "prompt", "invalid_value") from None
    texts = [token_text(served.tokenizer.token_bytes(token)) for token in ids] if request.return_token_strs else None
    return {"count": len(ids), "max_model_len": served.config.n_positions, "tokens": ids, "token_strs": texts}


def detokenize(served: Served, body: bytes) -> dict[str, Any]:
    """Bytes that are no UTF-8 become U+FFFD."""
    ids = read(DetokenizeRequest, body).tokens
    wrong = next((token for token in ids if token >= served.config.real_vocabulary), None)
    if wrong is not None:
        text = f"tokens holds {shown(wrong)}; allowed: token ids of 0 to {served.config.real_vocabulary - 1}"
        raise ApiError(400, text, "tokens", "invalid_value")
    return {"prompt": served.tokenizer.decode(ids)}


def info(served: Served) -> dict[str, Any]:
    """No chat_template: a template here is a name, not a program."""
    tokenizer = served.tokenizer
    return {
        "tokenizer_class": "GPT2Tokenizer", "bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token, "vocab_size": len(tokenizer), "model_max_length": served.config.n_positions,
        "add_bos_token": False, "template": served.template,
    }
