"""What is refused, and how: every error in OpenAI's form and as its exception; sizes, counts, keys, the queue, strange bytes."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from gptfast import Error
from gptfast.serving import Limits
from gptfast.serving.server import is_loopback, read_keys

GOOD: dict[str, Any] = {"model": "tiny", "prompt": "dog", "max_tokens": 2}


def error_of(answer: tuple[int, Any, Any]) -> tuple[int, str | None, str | None]:
    """Status, param and code of an answer that must be in OpenAI's form."""
    status, body, headers = answer
    assert headers["content-type"] == "application/json" and set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"} and body["error"]["message"] and body["error"]["type"]
    return status, body["error"]["param"], body["error"]["code"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": -1}, "n"), ({"n": 0}, "n"), ({"n": 17}, "n"), ({"n": True}, "n"), ({"n": "2"}, "n"), ({"n": 2.5}, "n"),
        ({"max_tokens": 1e9}, "max_tokens"), ({"max_tokens": -1}, "max_tokens"), ({"max_tokens": 10**400}, "max_tokens"),
        ({"best_of": 1, "n": 2}, "best_of"), ({"best_of": 2, "stream": True}, "best_of"), ({"best_of": 17}, "best_of"),
        ({"logprobs": 21}, "logprobs"), ({"logprobs": True}, "logprobs"), ({"temperature": 2.1}, "temperature"),
        ({"temperature": -1}, "temperature"), ({"top_p": 1.5}, "top_p"), ({"min_p": -0.1}, "min_p"), ({"top_k": -2}, "top_k"),
        ({"repetition_penalty": 0}, "repetition_penalty"), ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"), ({"seed": 2**64}, "seed"), ({"seed": "x"}, "seed"),
        ({"stop": [""]}, "stop"), ({"stop": ["x"] * 65}, "stop"), ({"stop": "x" * 257}, "stop"), ({"stop": ["\ud800"]}, "stop"),
        ({"stop": 5}, "stop"), ({"logit_bias": {"a": 1}}, "logit_bias"), ({"logit_bias": {"300": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"), ({"logit_bias": {str(i): 0 for i in range(1025)}}, "logit_bias"),
        ({"suffix": "end"}, "suffix"), ({"prompt": 5}, "prompt"), ({"prompt": [1, "a"]}, "prompt"), ({"prompt": [[]]}, "prompt"),
        ({"prompt": [300]}, "prompt"), ({"prompt": [-1]}, "prompt"), ({"prompt": [True]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [["a"]]}, "prompt"), ({"prompt": ["a"] * 257}, "prompt"), ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": ["a"] * 40, "n": 16}, "n"), ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stop_token_ids": [300]}, "stop_token_ids"), ({"min_tokens": 257}, "min_tokens"), ({"stream": "yes"}, "stream"),
    ],
)  # fmt: skip
def test_what_is_not_allowed_is_named(one, change: dict[str, Any], param: str) -> None:
    assert error_of(one.ask("/v1/completions", {**GOOD, **change}))[:2] == (400, param)


def test_unknown_names_are_refused_as_openai_does(one) -> None:
    status, body, headers = one.ask("/v1/completions", {**GOOD, "temprature": 1})
    assert error_of((status, body, headers)) == (400, "temprature", "unknown_parameter")
    assert body["error"]["message"] == "Unrecognized request argument supplied: temprature"
    fine = {"user": "u", "store": False, "metadata": {"a": "b"}, "service_tier": "auto", "safety_identifier": "s"}
    assert one.ask("/v1/completions", {**GOOD, **fine, "prompt_cache_key": "k"})[0] == 200
    assert error_of(one.ask("/v1/completions", {**GOOD, "\ud800": 1}))[0] == 400


def test_null_is_a_field_that_was_not_given_and_whole_floats_are_whole(one) -> None:
    names = "stop seed n logprobs echo best_of suffix logit_bias temperature top_p stream stream_options user model"
    nothing = one.ask("/v1/completions", {**GOOD, **dict.fromkeys(names.split())})
    assert nothing[0] == 200
    assert one.ask("/v1/completions", {**GOOD, "n": 2.0, "max_tokens": 2.0})[1]["usage"]["completion_tokens"] <= 4


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"5", b"null", b'{"prompt": "\xff\xfe"}', b'{"temperature": NaN}', b'{"temperature": -Infinity}',
        b"[" * 200_000, b'{"n": ' + b"9" * 5000 + b"}", b'{"prompt": "a"', b"\x00" * 100, "{}".encode("utf-16-be") + b"x",
    ],
)
def test_bodies_that_are_no_json(one, body: bytes) -> None:
    assert error_of(one.ask("/v1/completions", body)) == (400, None, "invalid_json")
    assert error_of(one.ask("/v1/chat/completions", body))[0] == 400


def test_duplicate_keys_are_the_last(one) -> None:
    data = b'{"model": "tiny", "prompt": "dog", "max_tokens": 9, "max_tokens": 1}'
    assert one.ask("/v1/completions", data)[1]["usage"]["completion_tokens"] == 1


def test_a_body_of_the_limit_and_one_beyond(one) -> None:
    def body(size: int) -> bytes:
        start = b'{"model": "tiny", "max_tokens": 1, "prompt": "dog", "user": "'
        return start + b"u" * (size - len(start) - 2) + b'"}'

    assert one.ask("/v1/completions", body(4 << 20))[0] == 200
    assert error_of(one.ask("/v1/completions", body((4 << 20) + 1))) == (413, None, "body_too_large")
    assert error_of(one.ask("/tokenize", body(8 << 20)))[0] == 413


def test_a_million_times_one_letter(one) -> None:
    text = "a" * 1_000_000
    assert error_of(one.ask("/v1/completions", {**GOOD, "prompt": text})) == (400, "prompt", "context_length_exceeded")
    status, body, _ = one.ask("/tokenize", {"prompt": text})
    assert status == 200 and body["count"] == 1_000_000
    assert one.ask("/health")[0] == 200


def test_prompts_that_are_too_long_name_both_lengths(one) -> None:
    for prompt in ([5] * 257, "z" * 400):
        status, body, headers = one.ask("/v1/completions", {**GOOD, "prompt": prompt})
        assert error_of((status, body, headers)) == (400, "prompt", "context_length_exceeded")
        assert "the model's context is 256" in body["error"]["message"]


def test_paths_methods_and_content_types(one) -> None:
    assert error_of(one.ask("/v1/embeddings", GOOD)) == (404, None, "not_found")
    assert error_of(one.ask("/v1/completions", method="GET")) == (405, None, "method_not_allowed")
    assert error_of(one.ask("/health", method="DELETE"))[0] == 405
    assert one.ask("/v1/completions", method="HEAD")[0] == 405
    asking = {"origin": "http://evil", "access-control-request-method": "POST"}
    assert error_of(one.ask("/v1/completions", method="OPTIONS", headers=asking))[0] == 405
    assert error_of(one.ask("/v1/completions", json.dumps(GOOD).encode(), {"content-type": "text/plain"}))[0] == 415
    assert one.ask("/v1/completions/", GOOD)[0] == 200 and one.ask("/v1/models/")[0] == 200
    _, _, headers = one.ask("/v1/completions", GOOD, {"origin": "http://evil"})
    assert not [name for name in headers if name.startswith("access-control")]


def test_headers_that_are_too_large(one) -> None:
    assert error_of(one.ask("/v1/models", headers={"x-long": "x" * 33_000})) == (431, None, "header_too_large")
    for data in (b"GET /health HTTP/1.1\r\nhost: a\r\nx: " + b"x" * 200_000, b"\x16\x03\x01 hello\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", one.port), timeout=10) as raw:
            raw.sendall(data)
            answer = b""
            while part := raw.recv(65536):
                answer += part
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400") and json.loads(body)["error"]["code"] == "invalid_http"


def test_keep_alive_and_pipelining(one) -> None:
    body = json.dumps(GOOD).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: "
    head += f"{len(body)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", one.port), timeout=10) as raw:
        raw.sendall((head + body) * 3)
        answer = b""
        while answer.count(b'"usage"') < 3:
            answer += raw.recv(65536)
        assert answer.count(b"HTTP/1.1 200") == 3


# -------------------------------------------------------------------------------------------------------- OpenAI's exceptions, keys


def test_every_error_is_its_exception(own) -> None:
    live = own(limits={"max_queue": 1, "max_body": 2000, "deadline": 0.5}, api_keys=["right", "other"], key="right")
    ask = live.client.completions.create
    with pytest.raises(openai.BadRequestError) as error:
        ask(**{**GOOD, "n": -1})
    assert error.value.param == "n" and error.value.code == "invalid_value"
    with pytest.raises(openai.NotFoundError) as error:
        ask(**{**GOOD, "model": "gpt-4"})
    assert error.value.code == "model_not_found"
    wrong = live.client.with_options(api_key="wrong").completions
    with pytest.raises(openai.AuthenticationError) as error:
        wrong.create(**GOOD)
    assert error.value.code == "invalid_api_key"
    with pytest.raises(openai.APIStatusError) as error:
        ask(**{**GOOD, "prompt": "a" * 3000})
    assert error.value.status_code == 413
    live.steps.hold()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, **GOOD)
        while not live.service.answers:
            time.sleep(0.001)
        with pytest.raises(openai.RateLimitError) as error:
            ask(**GOOD)
        assert error.value.response.headers["retry-after"] == "1" and error.value.response.headers["retry-after-ms"] == "1000"
        with pytest.raises(openai.InternalServerError) as late:
            waiting.result()
    assert late.value.status_code == 504 and late.value.code == "deadline"
    live.steps.go()
    live.idle()
    live.service.draining = True
    with pytest.raises(openai.InternalServerError) as error:
        ask(**GOOD)
    assert error.value.status_code == 503 and error.value.response.headers["retry-after"]
    assert live.ask("/ready")[0] == 503 and live.ask("/health")[0] == 200


def test_every_path_but_three_asks_for_a_key(own) -> None:
    live = own(api_keys=["right"], key="right")
    for path in ("/v1/models", "/metrics", "/tokenizer_info", "/version", "/openapi.json"):
        assert live.ask(path)[0] == 200
        for header in ("Bearer wrong", "Bearer \u00fc", "right", "Basic right", "bearer", ""):
            answer = live.ask(path, headers={"authorization": header})
            assert error_of(answer) == (401, None, "invalid_api_key") and answer[2]["www-authenticate"] == "Bearer"
    assert live.ask("/v1/models", headers={"authorization": "bearer right"})[0] == 200
    assert live.ask("/v1/completions", GOOD, {"authorization": "Bearer no"})[0] == 401
    for path in ("/health", "/ready"):
        assert live.ask(path, headers={"authorization": ""})[0] == 200


def test_requests_of_one_key_at_once(own) -> None:
    live = own(api_keys=["a", "b"], limits={"max_per_key": 1}, key="a")
    live.steps.hold()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(live.ask, "/v1/completions", GOOD)
        while live.service._by_key.total() == 0:
            pass
        assert error_of(live.ask("/v1/completions", GOOD)) == (429, None, "rate_limit_exceeded")
        assert live.ask("/tokenize", {"prompt": "a"}, {"authorization": "Bearer b"})[0] == 200
        live.steps.go()
        assert first.result()[0] == 200
    assert live.ask("/v1/completions", GOOD)[0] == 200


def test_keys_from_a_file_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# two\nfirst\n\n second \n")
    monkeypatch.setenv("SERVER_KEYS", "third, fourth")
    assert read_keys(str(file), "SERVER_KEYS") == ["first", "second", "third", "fourth"] and read_keys(None, None) == []
    file.write_text("# none\n")
    for arguments, message in (
        ((str(file), None), "holds no key"), ((str(tmp_path / "absent"), None), "No such file"),
        ((None, "NO_SUCH_NAME"), "NO_SUCH_NAME"),
    ):
        with pytest.raises(Error, match=message):
            read_keys(*arguments)
    assert all(is_loopback(host) for host in ("127.0.0.1", "::1", "localhost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "example.org"))


def test_limits_are_those_of_the_server(own) -> None:
    live = own(limits={"max_prompts": 2, "max_n": 3, "max_prompt_tokens": 10, "max_answers": 4, "max_logprobs": 1, "max_stop": 1})
    assert Limits().max_n == 16
    for change, param in (
        ({"prompt": ["a"] * 3}, "prompt"), ({"n": 4}, "n"), ({"prompt": [[1] * 6] * 2}, "prompt"),
        ({"prompt": ["a"] * 2, "n": 3}, "n"), ({"logprobs": 2}, "logprobs"), ({"stop": ["a", "b"]}, "stop"),
    ):
        assert error_of(live.ask("/v1/completions", {**GOOD, **change})) == (400, param, "invalid_value")
    assert live.ask("/v1/completions", {**GOOD, "prompt": ["a"] * 2, "n": 2, "logprobs": 1, "stop": ["a"]})[0] == 200
