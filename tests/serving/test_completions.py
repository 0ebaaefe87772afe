"""/v1/completions through OpenAI's client: texts, log-probabilities, stopping, seeds, streams; and as lm-eval asks."""

from __future__ import annotations

import asyncio
import queue
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from gptfast import SamplingParams

SAMPLED: dict[str, Any] = {"model": "tiny", "max_tokens": 24, "seed": 5, "extra_body": {"ignore_eos": True}}


def test_a_text_is_the_engines(live) -> None:
    answer = live.client.completions.create(prompt="The quick", **SAMPLED)
    expected = _alone(live, "The quick", 5, 24)
    assert answer.choices[0].text == expected and answer.choices[0].finish_reason == "length"
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-") and answer.model == "tiny"
    prompt = len(live.engine.tokenizer.encode("The quick"))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (prompt, 24, prompt + 24)
    assert answer.system_fingerprint.startswith("fp_") and answer.choices[0].model_extra["seed"] == 5


def _alone(live, prompt: str, seed: int, tokens: int) -> str:
    from gptfast.generation.engine import completion_of

    params = SamplingParams(temperature=1.0, top_k=0, seed=seed, max_tokens=tokens, ignore_eos=True)
    texts: queue.SimpleQueue[str] = queue.SimpleQueue()
    live.engine.submit(prompt, params, lambda row: texts.put(completion_of(row).text) if row.finish_reason else None)
    live.service.thread._work.set()
    return texts.get(timeout=60)


def test_prompts_of_every_form_and_many_choices(live, tokenizer) -> None:
    texts = ["The quick", "fox", "dog"]
    ids = [tokenizer.encode(text) for text in texts]
    listed = live.client.completions.create(prompt=texts, n=2, **SAMPLED)
    assert [choice.index for choice in listed.choices] == list(range(6))
    as_ids = live.client.completions.create(prompt=ids, n=2, **SAMPLED)
    assert [c.text for c in as_ids.choices] == [c.text for c in listed.choices]
    single = live.client.completions.create(prompt=ids[1], n=2, **SAMPLED)
    assert [c.text for c in single.choices] == [c.text for c in listed.choices[2:4]]
    assert len({c.text for c in listed.choices}) == 6
    nothing = live.client.completions.create(prompt="", **SAMPLED)
    assert nothing.choices[0].text and nothing.usage.completion_tokens == 24


def test_the_stream_is_the_answer(live) -> None:
    options: Any = {**SAMPLED, "logprobs": 2, "n": 2, "prompt": ["The quick", "naïve"]}
    whole = live.client.completions.create(**options)
    chunks = list(live.client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[-1].usage == whole.usage and chunks[-1].choices == []
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for choice in whole.choices:
        mine = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == choice.index]
        assert "".join(c.text for c in mine) == choice.text
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [v for c in mine for v in getattr(c.logprobs, name)] == getattr(choice.logprobs, name)


def test_asynchronous_and_streamed(live) -> None:
    async def ask() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="x", max_retries=0) as client:
            whole = await client.completions.create(prompt="fox", **SAMPLED)
            stream = await client.completions.create(prompt="fox", stream=True, **SAMPLED)
            return whole.choices[0].text, "".join([chunk.choices[0].text async for chunk in stream])

    whole, streamed = asyncio.run(ask())
    assert whole == streamed != ""


def test_same_seed_same_text_among_others_and_after_a_restart(live, own) -> None:
    def text(client: Any, prompt: str, seed: int, stream: bool) -> str:
        options: Any = {**SAMPLED, "seed": seed}
        if stream:
            return "".join(c.choices[0].text for c in client.completions.create(prompt=prompt, stream=True, **options))
        return client.completions.create(prompt=prompt, **options).choices[0].text

    alone = text(live.client, "The quick", 7, False)
    with ThreadPoolExecutor(33) as pool:
        others = [pool.submit(text, live.client, f"dog {i}" * (1 + i % 5), i, i % 2 == 0) for i in range(32)]
        both = [pool.submit(text, live.client, "The quick", 7, stream) for stream in (False, True)]
        assert [future.result() for future in both] == [alone, alone]
        crowd = [future.result() for future in others]
    assert len(set(crowd)) == 32
    again = own(backend="eager" if "eager" in live.engine.describe() else "")
    assert text(again.client, "The quick", 7, True) == alone
    assert text(again.client, "dog 3" * 4, 3, False) == crowd[3]


def test_log_probabilities(live, tokenizer) -> None:
    answer = live.client.completions.create(prompt="The quick", logprobs=3, **SAMPLED).choices[0]
    block = answer.logprobs
    assert len(block.tokens) == len(block.token_logprobs) == len(block.top_logprobs) == len(block.text_offset) == 24
    for token, value, top in zip(block.tokens, block.token_logprobs, block.top_logprobs, strict=True):
        assert top[token] == value <= 0 and 3 <= len(top) <= 4
    check_offsets(block, answer.text)
    only = live.client.completions.create(prompt="The quick", logprobs=0, **SAMPLED).choices[0].logprobs
    assert only.token_logprobs == block.token_logprobs
    assert [list(top) for top in only.top_logprobs] == [[token] for token in only.tokens]


def check_offsets(block: Any, text: str) -> None:
    """A token that is whole characters stands where its offset says."""
    assert block.text_offset == sorted(block.text_offset)
    seen = 0
    for token, offset in zip(block.tokens, block.text_offset, strict=True):
        if not token.startswith("bytes:") and token != "<|endoftext|>" and offset + len(token) <= len(text):
            assert text[offset : offset + len(token)] == token
            seen += 1
    assert seen >= 5


@pytest.mark.parametrize("stream", [False, True])
def test_echo_scores_the_prompt(live, stream) -> None:
    """What lm-eval sends, and the scores that it reads: equal to the engine's own."""
    prompts = ["The quick brown fox", "naïve 😀 dog, and", "a"]
    ids = [live.engine.tokenizer.encode(prompt) for prompt in prompts]
    options: Any = {"model": "tiny", "prompt": ids, "temperature": 0, "max_tokens": 1, "logprobs": 2, "seed": 1234, "echo": True}
    if stream:
        choices = [[], [], []]
        for chunk in live.client.completions.create(**options, stream=True):
            choices[chunk.choices[0].index].append(chunk.choices[0])
        blocks = [{name: [v for c in part for v in getattr(c.logprobs, name)] for name in FIELDS} for part in choices]
        texts = ["".join(c.text for c in part) for part in choices]
    else:
        found = live.client.completions.create(**options).choices
        blocks = [{name: getattr(c.logprobs, name) for name in FIELDS} for c in found]
        texts = [c.text for c in found]
        for choice in found:
            check_offsets(choice.logprobs, choice.text) if len(choice.logprobs.tokens) > 8 else None
    for prompt, tokens, block, text in zip(prompts, ids, blocks, texts, strict=True):
        assert text.startswith(prompt) and len(block["token_logprobs"]) == len(tokens) + 1
        assert block["token_logprobs"][0] is None and block["top_logprobs"][0] is None
        expected = live.engine.token_logprobs(tokens) if "eager" in live.engine.describe() else None
        if expected is not None and len(tokens) > 1:
            assert max(abs(a - b) for a, b in zip(block["token_logprobs"][1:-1], expected.tolist(), strict=True)) < 1e-5
        for token, value, top in list(zip(block["tokens"], block["token_logprobs"], block["top_logprobs"], strict=True))[1:]:
            assert top[token] == value <= max(top.values()) and 2 <= len(top) <= 3


FIELDS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def test_scores_of_both_engines_are_equal(servers) -> None:
    options: Any = {"model": "tiny", "prompt": "The quick brown fox " * 9, "max_tokens": 0, "logprobs": 1, "echo": True}
    cpp, eager = (servers(name).client.completions.create(**options) for name in ("cpp", "eager"))
    values = cpp.choices[0].logprobs.token_logprobs, eager.choices[0].logprobs.token_logprobs
    assert cpp.choices[0].text == options["prompt"] and cpp.choices[0].finish_reason == "length"
    assert len(values[0]) == cpp.usage.prompt_tokens > 64 and cpp.usage.completion_tokens == 0
    assert max(abs(a - b) for a, b in zip(values[0][1:], values[1][1:], strict=True)) < 1e-4


def test_echo_without_scores_and_scores_of_long_prompts_beside_others(live) -> None:
    plain = live.client.completions.create(prompt="The quick", echo=True, **SAMPLED)
    assert plain.choices[0].text.startswith("The quick") and plain.choices[0].logprobs is None
    prompts = [f"{i} the lazy dog " * 14 for i in range(6)]
    options: Any = {"model": "tiny", "max_tokens": 0, "logprobs": 1, "echo": True}
    alone = [live.client.completions.create(prompt=prompt, **options).choices[0].logprobs.token_logprobs for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        busy = [pool.submit(live.client.completions.create, prompt="fox", n=4, **SAMPLED) for _ in range(3)]
        together = live.client.completions.create(prompt=prompts, **options).choices
        [future.result() for future in busy]
    for values, choice in zip(alone, together, strict=True):
        assert max(abs(a - b) for a, b in zip(values[1:], choice.logprobs.token_logprobs[1:], strict=True)) < 1e-5


def test_stops(live) -> None:
    options: Any = {**SAMPLED, "max_tokens": 60}
    free = live.client.completions.create(prompt="The quick", **options).choices[0].text
    stop = next(free[i : i + 2] for i in range(6, len(free) - 2) if free[i : i + 2].isascii() and free.index(free[i : i + 2]) >= 6)
    for stream in (False, True):
        answer = live.client.completions.create(prompt="The quick", stop=[stop, "never there"], stream=stream, **options)
        parts = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        assert "".join(part.text for part in parts) == free[: free.index(stop)] and parts[-1].finish_reason == "stop"
    end = live.engine.tokenizer.eos_token_id
    forced: Any = {"model": "tiny", "prompt": "dog", "max_tokens": 5, "logit_bias": {str(end): 100}, "logprobs": 1}
    ended = live.client.completions.create(**forced).choices[0]
    assert ended.text == "" and ended.finish_reason == "stop" and ended.logprobs.tokens == ["<|endoftext|>"]


def test_best_of_gives_the_most_probable(live) -> None:
    every = live.client.completions.create(prompt="The quick", n=5, logprobs=0, **SAMPLED).choices
    mean = [sum(c.logprobs.token_logprobs) / 24 for c in every]
    best = live.client.completions.create(prompt="The quick", n=2, best_of=5, **SAMPLED)
    order = sorted(range(5), key=lambda i: -mean[i])[:2]
    assert [c.text for c in best.choices] == [every[i].text for i in order] and [c.index for c in best.choices] == [0, 1]
    assert best.usage.completion_tokens == 5 * 24


def test_sampling_reaches_the_engine(live) -> None:
    def text(**more: Any) -> str:
        extra = {"ignore_eos": True, **more.pop("extra_body", {})}
        options: Any = {"model": "tiny", "prompt": "The quick", "max_tokens": 24, "seed": 5, "extra_body": extra, **more}
        return live.client.completions.create(**options).choices[0].text

    plain, greedy = text(), text(temperature=0)
    assert text(extra_body={"top_k": 1}) == text(top_p=0) == text(extra_body={"min_p": 1}) == greedy != plain
    assert text(temperature=0, presence_penalty=2, frequency_penalty=2) != greedy
    assert text(temperature=0, extra_body={"repetition_penalty": 50}) != greedy
    assert text(logit_bias={"33": 100}) == live.engine.tokenizer.decode([33] * 24) != plain
    assert text(temperature=1, extra_body={"logprobs_mode": "processed"}) == plain
    assert text(seed=6) != plain


def test_a_context_that_is_full_ends_with_length(live) -> None:
    answer = live.client.completions.create(model="tiny", prompt=[5] * 250, max_tokens=100, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 6 and answer.choices[0].finish_reason == "length"
    full = live.client.completions.create(model="tiny", prompt=[5] * 256, max_tokens=1, echo=True, logprobs=1)
    assert full.usage.completion_tokens == 0 and len(full.choices[0].logprobs.tokens) == 256
