"""/v1/chat/completions through OpenAI's client, and the endpoints beside it."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

import gptfast
from gptfast.tasks import dialogue

ASKED: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "The quick?"}]}]
OPTIONS: Any = {"model": "tiny", "messages": ASKED, "max_completion_tokens": 20, "seed": 3}


def test_a_conversation_is_its_template(live) -> None:
    answer = live.client.chat.completions.create(**OPTIONS)
    text = dialogue.render([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The quick?"}], "plain")
    stops = dialogue.stop_strings("plain")
    same = live.client.completions.create(model="tiny", prompt=text, max_tokens=20, seed=3, stop=stops)
    assert answer.choices[0].message.content == same.choices[0].text.lstrip()
    assert answer.choices[0].message.role == "assistant" and answer.object == "chat.completion"
    assert answer.usage == same.usage and answer.choices[0].finish_reason == same.choices[0].finish_reason


def test_the_stream_is_the_answer(live) -> None:
    options = {**OPTIONS, "n": 2, "logprobs": True, "top_logprobs": 2}
    whole = live.client.chat.completions.create(**options)
    chunks = list(live.client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage and {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    for choice in whole.choices:
        mine = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == choice.index]
        assert mine[0].delta.role == "assistant" and mine[-1].finish_reason == choice.finish_reason
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert [e for c in mine if c.logprobs for e in c.logprobs.content] == choice.logprobs.content
    for entry in whole.choices[0].logprobs.content:
        assert len(entry.top_logprobs) == 2 and entry.logprob <= entry.top_logprobs[0].logprob
        assert bytes(entry.bytes).decode(errors="replace") == entry.token


def test_asynchronous(one) -> None:
    async def ask() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=f"{one.url}/v1", api_key="x", max_retries=0) as client:
            whole = await client.chat.completions.create(**OPTIONS)
            stream = await client.chat.completions.create(**OPTIONS, stream=True)
            return whole.choices[0].message.content or "", "".join([c.choices[0].delta.content or "" async for c in stream])

    whole, streamed = asyncio.run(ask())
    assert whole == streamed


def test_without_a_limit_an_answer_may_fill_the_context(one) -> None:
    extra = {"ignore_eos": True}
    answer = one.client.chat.completions.create(model="tiny", messages=ASKED, seed=3, extra_body=extra, temperature=0)
    assert answer.choices[0].finish_reason == "stop" or answer.usage.total_tokens == 256


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"), ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages"), ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"top_logprobs": 2}, "top_logprobs"), ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, None),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]}, None),
    ],
)
def test_what_is_not_allowed_is_named(one, change: dict[str, Any], param: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        one.client.chat.completions.create(**{**OPTIONS, **change})
    assert refused.value.type == "invalid_request_error" and (param is None or refused.value.param == param)


def test_templates_are_chosen_by_name(own, folder) -> None:
    live = own(template="markdown")
    messages = [{"role": "user", "content": "dog"}]
    status, body, _ = live.ask("/tokenize", {"messages": messages})
    assert status == 200 and live.engine.tokenizer.decode(body["tokens"]) == dialogue.render(messages, "markdown")
    with pytest.raises(gptfast.Error, match="template is 'jinja'; allowed: plain, markdown"):
        gptfast.serving.create_app(str(folder), template="jinja")


# ------------------------------------------------------------------------------------------------------------- beside the answers


def test_models(one) -> None:
    (model,) = one.client.models.list().data
    assert model.id == "tiny" and one.client.models.retrieve("tiny") == model and model.owned_by == "gptfast"
    with pytest.raises(openai.NotFoundError) as refused:
        one.client.models.retrieve("huge")
    assert refused.value.code == "model_not_found"


def test_remote_tokenizer(one, tokenizer) -> None:
    text = "naïve 😀 <|endoftext|>"
    status, body, _ = one.ask("/tokenize", {"prompt": text, "add_special_tokens": False, "return_token_strs": True})
    assert status == 200 and body["tokens"] == tokenizer.encode(text) and body["count"] == len(body["tokens"])
    assert len(body["token_strs"]) == body["count"] and body["max_model_len"] == 256
    assert one.ask("/detokenize", {"tokens": body["tokens"]})[:2] == (200, {"prompt": text})
    _, info, _ = one.ask("/tokenizer_info")
    assert info["eos_token"] == info["bos_token"] == info["pad_token"] == "<|endoftext|>" and "chat_template" not in info
    assert one.ask("/tokenize", {"prompt": "x" * 100_000})[1]["count"] > 256
    for body in ({}, {"prompt": "a", "messages": ASKED}, {"prompt": "\ud800"}, {"tokens": [1]}):
        assert one.ask("/tokenize", body)[0] == 400
    for tokens in ([300], [-1], [2**31], ["a"], "a", None):
        status, body, _ = one.ask("/detokenize", {"tokens": tokens})
        assert status == 400 and body["error"]["param"].startswith("tokens")


def test_health_ready_version_metrics(one) -> None:
    one.client.completions.create(model="tiny", prompt="dog", max_tokens=3)
    assert one.ask("/health")[:2] == (200, {"status": "ok"}) and one.ask("/ready")[:2] == (200, {"status": "ready"})
    assert one.ask("/version")[1] == {"version": gptfast.__version__}
    status, text, headers = one.ask("/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain")
    for name in ("generation_tokens_total", "time_to_first_token_seconds_bucket", "num_requests_running", "kv_cache_usage_perc"):
        assert f"gptfast:{name}" in text, name
    assert "dog" not in text


def test_the_document_names_every_endpoint_and_its_errors(one) -> None:
    status, document, _ = one.ask("/openapi.json")
    assert status == 200
    paths = {"/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize", "/detokenize", "/tokenizer_info", "/health"}
    assert paths <= set(document["paths"])
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert {"400", "401", "404", "413", "429", "503"} <= set(operation["responses"]), path
    completion = document["components"]["schemas"]["CompletionRequest"]["properties"]
    assert completion["n"]["anyOf"][0]["maximum"] == 16 and completion["max_tokens"]["anyOf"][0]["maximum"] == 256
    assert document["paths"]["/v1/completions"]["post"]["requestBody"]["required"] is True
