"""The requests that lm-eval's `local-completions` sends, word for word, and what it reads out of the answers: the same scores as in
process. tests/oracles/run_lm_eval.py runs lm-eval itself."""

from __future__ import annotations

import json
import random
import urllib.request
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch

import gptfast
from gptfast.testing.live import LiveServer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lm_eval") / "small"
    texts = ["The cat sat on the mat, and the dog. ", "Über die Straße 🙂 läuft er. "]
    tokenizer = gptfast.GPT2Tokenizer.train([text * 20 for text in texts], 300)
    torch.manual_seed(0)
    config = gptfast.GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=2)
    gptfast.GPT2LMHeadModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[LiveServer]:
    with LiveServer(folder) as running:
        yield running


def ask(server: LiveServer, path: str, body: dict[str, Any] | None = None) -> Any:
    """As its session does: JSON with an authorization header, whether a key is needed or not."""
    headers = {"content-type": "application/json", "authorization": "Bearer "}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(server.url + path, data, headers), timeout=30) as answer:
        return json.load(answer)


def parsed(answer: dict[str, Any], contexts: list[int]) -> list[tuple[float, bool]]:
    """Sum of log P of each continuation, and whether it is what greedy decoding gives: lm-eval's way of reading the answer."""
    found = []
    for choice, context in zip(sorted(answer["choices"], key=itemgetter("index")), contexts, strict=True):
        values = choice["logprobs"]["token_logprobs"][context:-1]
        tops = choice["logprobs"]["top_logprobs"][context:-1]
        found.append((sum(values), all(value == max(top.values()) for value, top in zip(values, tops, strict=True))))
    return found


def payload(prompts: list[list[int]]) -> dict[str, Any]:
    return {"model": "small", "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}


def test_loglikelihood_requests_score_as_in_process(server: LiveServer, folder: Path) -> None:
    """Batches of token ids of unequal lengths, the longest as long as lm-eval makes them for this context (one token less)."""
    draw = random.Random(0)
    with gptfast.Engine(folder) as engine:
        greedy = engine.generate([[5, 6, 7]], gptfast.SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))[0].token_ids
        cases = [([draw.randrange(290) for _ in range(size)], draw.randint(1, size - 1)) for size in (63, 63, 40, 2, 17, 9, 33)]
        cases.append(([5, 6, 7, *greedy], 3))
        for first in range(0, len(cases), 4):
            batch = cases[first : first + 4]
            answer = ask(server, "/v1/completions", payload([ids for ids, _ in batch]))
            assert [len(c["logprobs"]["token_logprobs"]) for c in answer["choices"]] == [len(ids) + 1 for ids, _ in batch]
            firsts = [c["logprobs"][name][0] for c in answer["choices"] for name in ("token_logprobs", "top_logprobs")]
            assert firsts == [None] * len(firsts)
            for (ids, context), (score, is_greedy) in zip(batch, parsed(answer, [c for _, c in batch]), strict=True):
                assert score == pytest.approx(float(engine.token_logprobs(ids)[context - 1 :].double().sum()), abs=1e-4)
                assert is_greedy == (ids == [5, 6, 7, *greedy]) or context == len(ids) - 1
    assert parsed(ask(server, "/v1/completions", payload([[5, 6, 7, *greedy]])), [3])[0][1] is True


def test_prompt_logprobs_without_a_new_token(server: LiveServer) -> None:
    """Older versions asked for max_tokens 0."""
    answer = ask(server, "/v1/completions", {**payload([[5, 6, 7]]), "max_tokens": 0})
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == 3 and answer["usage"]["completion_tokens"] == 0


def test_generate_until_requests(server: LiveServer) -> None:
    """Text or ids, stops beyond OpenAI's four, a seed; what is stopped at is not in the text."""
    body = {"model": "small", "max_tokens": 24, "temperature": 0, "seed": 1234}
    free = ask(server, "/v1/completions", {**body, "prompt": ["The cat"], "stop": []})["choices"][0]["text"]
    end = next(free[i : i + 2] for i in range(2, len(free)) if free[i : i + 2].isascii())  # what is no UTF-8 ends nothing
    stops = ["\n\n\n", "Question:", "</s>", "<|im_end|>", "###", end]
    stopped = ask(server, "/v1/completions", {**body, "prompt": ["The cat"], "stop": stops})["choices"][0]
    assert stopped["finish_reason"] == "stop" and stopped["text"] == free[: free.index(end)]


def test_remote_tokenizer(server: LiveServer, folder: Path) -> None:
    info = ask(server, "/tokenizer_info")
    tokenizer = gptfast.GPT2Tokenizer.from_pretrained(folder)
    assert info["eos_token"] == info["bos_token"] == "<|endoftext|>" and "chat_template" not in info
    for text in ("The cat sat", "Über 🙂", "", "<|endoftext|>The"):
        ids = ask(server, "/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]
        assert ids == tokenizer.encode(text)
    for name in ("bos_token", "eos_token"):
        assert ask(server, "/tokenize", {"prompt": info[name], "add_special_tokens": False})["tokens"] == [tokenizer.eos_token_id]
        assert ask(server, "/detokenize", {"tokens": ids})["prompt"] == text
