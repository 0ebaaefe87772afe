"""gptfast/serving/ray.py: without ray one line that says how to get it; with ray, two replicas that answer alike."""

from __future__ import annotations

import importlib.util
import json
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

import gptfast
from gptfast.serving.ray import application
from gptfast.testing.live import free_port

HAS_RAY = importlib.util.find_spec("ray") is not None


@pytest.mark.skipif(HAS_RAY, reason="ray is installed")
def test_without_ray_the_error_names_the_command() -> None:
    with pytest.raises(gptfast.Error, match=r"pip install 'gptfast-torch\[ray\]'"):
        application("anything")


@pytest.mark.parametrize("name", ["replicas", "threads", "batch"])
def test_numbers_are_checked(name: str) -> None:
    with pytest.raises(gptfast.Error, match=rf"{name} is 0; allowed: a whole number"):
        application("anything", **{name: 0})


@pytest.mark.skipif(not HAS_RAY, reason="ray is not installed (the extra ray)")
def test_two_replicas_answer_alike(tmp_path: Path) -> None:
    import ray
    from ray import serve

    tokenizer = gptfast.GPT2Tokenizer.train(["the cat sat on the mat, and the dog. " * 20], 270)
    config = gptfast.GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=2)
    gptfast.GPT2LMHeadModel(config).save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    port = free_port()
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(application(tmp_path / "small", replicas=2))
        url, texts = f"http://127.0.0.1:{port}/v1/completions", set()
        body = json.dumps({"prompt": "the cat", "max_tokens": 20, "seed": 5, "temperature": 1.0}).encode()
        end = time.monotonic() + 60
        while len(texts) == 0 or time.monotonic() < end - 50:
            request = urllib.request.Request(url, body, {"content-type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    texts.add(json.load(answer)["choices"][0]["text"])
            except urllib.error.HTTPError as error:
                assert error.code == 503 and time.monotonic() < end, error.read()  # a replica that still loads
                time.sleep(0.2)
        assert len(texts) == 1
    finally:
        serve.shutdown()
        ray.shutdown()
