"""The thread that makes tokens, and who waits for it: clients that go away, are slow or too late; failures; loading and the end."""

from __future__ import annotations

import http.client
import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from gptfast import Engine, Error
from gptfast.serving import Limits, create_app
from gptfast.serving.engine import EngineThread

LONG: dict[str, Any] = {"model": "tiny", "prompt": "The quick", "max_tokens": 240, "seed": 1, "ignore_eos": True}


def eventually(condition: Callable[[], Any], what: str, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"after {seconds} s not yet: {what}"
        time.sleep(0.002)


def connect(live, body: dict[str, Any]) -> socket.socket:
    """A request that is sent on a connection of one's own."""
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    raw = socket.create_connection(("127.0.0.1", live.port), timeout=10)
    raw.sendall(head.encode() + data)
    return raw


@pytest.mark.parametrize("engine", ["cpp", "eager"])
@pytest.mark.parametrize("more", [{}, {"stream": True}, {"n": 3}, {"prompt": ["fox"] * 3, "stream": True}], ids=str)
def test_a_client_that_goes_away_frees_its_place_within_one_step(servers, engine: str, more: dict[str, Any]) -> None:
    live = servers(engine)
    live.idle()
    thread, before = live.service.thread, live.service.metrics.disconnects._value.get()
    live.steps.hold()
    try:
        raw = connect(live, {**LONG, **more})
        eventually(lambda: thread.jobs, "the request is there")
        (job,) = thread.jobs
        eventually(lambda: job.requests, "its answers are queued")
        for _ in range(3):
            live.steps.tick()
        load = live.engine.load()
        assert load.running >= 1 and load.held >= 1
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)) if more else None
        raw.close()
        eventually(lambda: all(request.cancelled for request in job.requests), "the client's absence is noticed")
        live.steps.tick()  # the step that was waiting
        load = live.engine.load()
        assert (load.running, load.waiting, load.held) == (0, 0, 0)
    finally:
        live.steps.go()
    live.idle()
    assert live.service.metrics.disconnects._value.get() == before + 1
    live.engine._scheduler.check()


def test_a_client_that_leaves_before_its_scores_are_there(one) -> None:
    one.steps.hold()
    try:
        raw = connect(one, {**LONG, "prompt": "the lazy dog " * 15, "echo": True, "logprobs": 1})
        eventually(lambda: one.service.thread.jobs, "the request is there")
        (job,) = one.service.thread.jobs
        eventually(lambda: job.scores, "its scores are queued")
        one.steps.tick()
        raw.close()
        eventually(lambda: job.scores[0].cancelled or job.scores[0].done, "the client's absence is noticed")
    finally:
        one.steps.go()
    one.idle()


def test_a_client_that_sends_half_a_request(own) -> None:
    live = own(limits={"read_timeout": 0.2})
    with socket.create_connection(("127.0.0.1", live.port), timeout=10) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n{")
        assert raw.recv(65536).startswith(b"HTTP/1.1 408")
    for sent in (b"", b"GET /health HTTP/1.1\r\nho"):
        with socket.create_connection(("127.0.0.1", live.port), timeout=10) as raw:
            raw.sendall(sent)
            with pytest.raises(ConnectionResetError):
                assert raw.recv(65536) == b""
                raise ConnectionResetError
    live.idle()


def test_a_client_that_reads_nothing_is_cut_off_and_nobody_waits_for_it(own) -> None:
    live = own(limits={"send_timeout": 0.3})
    data = json.dumps({**LONG, "stream": True, "n": 16, "logprobs": 20, "prompt": ["fox"] * 2}).encode()
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect(("127.0.0.1", live.port))
    head = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    raw.sendall(head.encode() + data)
    eventually(lambda: live.service.answers, "the request is there")
    assert live.client.completions.create(model="tiny", prompt="dog", max_tokens=3).usage.completion_tokens <= 3
    eventually(lambda: not live.service.answers, "the slow client is cut off", 20)
    assert 'gptfast:rejected_total{reason="slow reader"} 1.0' in live.ask("/metrics")[1]
    raw.close()
    live.idle()


@pytest.mark.parametrize("engine", ["cpp", "eager"])
def test_a_row_of_nan_fails_alone(own, broken_folder, engine: str) -> None:
    live = own(broken_folder, backend="eager" if engine == "eager" else "")
    good: dict[str, Any] = {"model": "tiny", "prompt": "fox", "max_tokens": 150, "seed": 3, "extra_body": {"ignore_eos": True}}
    expected = live.client.completions.create(**good).choices[0].text
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(live.client.completions.create, **good) for _ in range(3)]
        bad = pool.submit(live.client.completions.create, **{**good, "prompt": [5] * 190, "max_tokens": 60})
        with pytest.raises(openai.InternalServerError) as failed:
            bad.result()
        assert [other.result().choices[0].text for other in others] == [expected] * 3
    assert failed.value.code == "numerical_error" and "NaN" in failed.value.message
    assert failed.value.response.headers["x-should-retry"] == "false"
    with pytest.raises(openai.APIError, match="NaN"):  # as a status, or in the stream, if it has begun
        list(live.client.completions.create(**{**good, "prompt": [5] * 190, "max_tokens": 60}, stream=True))
    with pytest.raises(openai.InternalServerError, match="NaN"):
        live.client.completions.create(model="tiny", prompt=[5] * 220, max_tokens=0, logprobs=1, echo=True)
    live.idle()
    assert live.ask("/health")[0] == 200 and "gptfast:numerical_errors_total 3.0" in live.ask("/metrics")[1]


def test_a_step_that_raises_ends_what_was_being_made_and_nothing_else(own, monkeypatch: pytest.MonkeyPatch) -> None:
    live = own(backend="eager")
    runner = live.engine._scheduler.runner
    monkeypatch.setattr(runner, "step", lambda batch: 1 // 0)
    monkeypatch.setattr(runner, "logits", lambda batch: 1 // 0)
    for more in ({}, {"echo": True, "logprobs": 1}):
        with pytest.raises(openai.InternalServerError) as failed:
            live.client.completions.create(model="tiny", prompt="The quick", max_tokens=3, **more)
        assert failed.value.code == "engine_error" and "division" not in failed.value.message
        assert live.ask("/health")[0] == 503
    monkeypatch.undo()
    assert live.client.completions.create(model="tiny", prompt="dog", max_tokens=3).usage.completion_tokens <= 3
    assert live.ask("/health")[0] == 200
    live.idle()


def test_503_while_loading_and_what_could_not_be_loaded(folder) -> None:
    gate = threading.Event()

    def slowly() -> Engine:
        gate.wait()
        return Engine(folder, device="cpu", threads=1)

    from fastapi.testclient import TestClient

    with TestClient(create_app(slowly, name="tiny")) as client:
        for path in ("/ready", "/v1/models"):
            answer = client.get(path)
            assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["code"] == "unavailable"
        assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 503 and client.get("/health").status_code == 200
        assert client.get("/openapi.json").status_code == 200 and "gptfast:num_requests_running 0.0" in client.get("/metrics").text
        gate.set()
        eventually(lambda: client.get("/ready").status_code == 200, "the model is loaded", 30)
        answer = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2, "ignore_eos": True})
        assert answer.json()["usage"]["total_tokens"] == 3

    def never() -> Engine:
        raise Error("no such model")

    with TestClient(create_app(never)) as client:
        eventually(lambda: client.get("/ready").status_code == 500, "the failure")
        assert client.get("/health").status_code == 503 and client.get("/v1/models").json()["error"]["code"] == "load_error"


def test_an_engine_of_the_callers_stays_open(folder) -> None:
    from fastapi.testclient import TestClient

    with Engine(folder, device="cpu", threads=1) as engine:
        with TestClient(create_app(engine)) as client:
            eventually(lambda: client.get("/ready").status_code == 200, "the model is loaded", 30)
            assert client.get("/v1/models").json()["data"][0]["id"] == "gptfast"
        assert engine.generate("dog")[0].finish_reason


@pytest.mark.parametrize("seconds", [20.0, 0.2])
def test_the_end_finishes_what_runs_or_cancels_it(own, seconds: float) -> None:
    live = own(limits={"drain": seconds})
    live.steps.hold()
    with ThreadPoolExecutor(2) as pool:
        extra = {"ignore_eos": True}
        running = pool.submit(live.client.completions.create, model="tiny", prompt="dog", max_tokens=40, extra_body=extra)
        stream = pool.submit(lambda: list(live.client.completions.create(model="tiny", prompt="fox", max_tokens=40, stream=True)))
        eventually(lambda: len(live.service.thread.jobs) == 2, "both are there")
        live.server.drain()
        assert live.ask("/v1/models")[0] == 503 and live.thread.is_alive()
        if seconds > 1:
            live.steps.go()
            assert running.result().usage.completion_tokens == 40 and stream.result()[-1].choices[0].finish_reason
        else:
            for future in (running, stream):
                with pytest.raises(openai.InternalServerError) as ended:
                    future.result()
                assert ended.value.status_code == 503
            live.steps.go()
    live.thread.join(10)
    assert not live.thread.is_alive() and not live.service.thread.is_alive()


def test_a_newcomer_ends_a_long_call_and_not_a_prompts_pass(folder) -> None:
    with Engine(folder, device="cpu", threads=1) as engine:
        interrupted = []
        engine._loaded.runner.interrupt = lambda: interrupted.append(True)  # type: ignore[union-attr,method-assign]
        from gptfast import SamplingParams

        engine.submit([5] * 100, SamplingParams(max_tokens=50, ignore_eos=True), lambda row: None)
        engine._scheduler.chunk = 60
        assert engine.step()
        engine.hurry()
        assert not interrupted  # 40 tokens of the prompt are still to be run
        engine.step()
        engine.hurry()
        assert interrupted


def test_a_thread_that_hangs_is_not_well(folder, monkeypatch: pytest.MonkeyPatch) -> None:
    thread = EngineThread(lambda: Engine(folder, device="cpu", threads=1), "", True, lambda engine: None)
    thread.start()
    eventually(lambda: thread.engine is not None, "the model is loaded", 30)
    assert thread.alive_and_well
    monkeypatch.setattr("gptfast.serving.engine.STALE", -1.0)
    assert not thread.alive_and_well
    thread.close()
    thread.join(10)
    assert not thread.is_alive() and not thread.alive_and_well


def test_pings_keep_a_stream_that_waits_alive(own, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptfast.serving.response.PING", 0.05)
    live = own()
    live.steps.hold()
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=10)
    connection.request("POST", "/v1/completions", json.dumps({**LONG, "stream": True}), {"content-type": "application/json"})
    answer = connection.getresponse()
    assert answer.getheader("content-type") == "text/event-stream; charset=utf-8" and answer.getheader("x-accel-buffering") == "no"
    assert answer.readline() == b": ping\n"
    live.steps.go()
    lines = [line for line in answer.read().decode().strip().split("\n\n") if not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    connection.close()


def test_limits_and_settings_of_an_app(folder) -> None:
    app = create_app(str(folder), limits=Limits(max_n=2))
    assert app.state.service.name == "tiny" and app.state.service.limits.max_n == 2 and app.state.service.template == "plain"
