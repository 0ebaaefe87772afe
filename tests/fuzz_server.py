"""Requests that schemathesis makes up from the server's own OpenAPI document: `make fuzz`, or

    python -P tests/fuzz_server.py --count 10000 --seed 0

A server of its own, with a small model. Two thirds of the requests follow the document, one third breaks it in a place. Every
answer comes within seconds, is no 5xx and has the form that the document describes; a refusal has OpenAI's. What the document does
not say would have most of them refused (keys of logit_bias, empty messages, a suffix); half of the requests that follow it are
mended there. At least a fifth of all must be answered 200. Afterwards the server is at rest. Ends with 1 where anything is not so,
with the request as a curl command. Results: tests/campaigns.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis
import requests
import schemathesis
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

import gptfast
from gptfast.testing import campaigns
from gptfast.testing.live import LiveServer

ROOT = campaigns.ROOT
SECONDS = 20  # an answer that takes longer hangs
LEAST = 0.2  # part of the requests that is answered 200
BROKEN = 3  # one request of so many breaks the document
CHECKS = [not_a_server_error, content_type_conformance]
WEIGHTS = {"/v1/completions": 6, "/v1/chat/completions": 4}  # how often, where the others are asked once


def make_model(folder: Path) -> tuple[Path, int]:
    """A tiny model that answers at once, and the size of its vocabulary."""
    tokenizer = gptfast.GPT2Tokenizer.train(["the cat sat on the mat, and the dog. " * 20], 270)
    config = gptfast.GPT2Config(vocab_size=len(tokenizer), n_positions=256, n_embd=16, n_layer=1, n_head=1)
    gptfast.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, len(tokenizer)


def mended(body: Any, vocabulary: int) -> Any:
    """A request with token ids as keys of logit_bias, words in messages, a prompt or messages, nothing behind the answer."""
    if not isinstance(body, dict):
        return body
    body = {key: value for key, value in body.items() if key != "suffix"}
    if isinstance(body.get("logit_bias"), dict):
        body["logit_bias"] = {str(i % vocabulary): bias for i, bias in enumerate(body["logit_bias"].values())}
    for message in body.get("messages") or ():
        message["content"] = message["content"] or "the cat"
    return {key: value for key, value in body.items() if key != "messages" or body.get("prompt") is None}


class Campaign:
    """One run against a live server; `counts` holds the answers by status, and by operation those that were 200."""

    def __init__(self, server: LiveServer, vocabulary: int) -> None:
        self.server, self.vocabulary, self.session = server, vocabulary, requests.Session()
        self.schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        self.schema.config.max_stream_events = 10**6  # a stream is read to its end
        self.counts: Counter[str] = Counter()
        self.slowest = 0.0

    def cases(self, mode: GenerationMode) -> list[st.SearchStrategy[Any]]:
        """Requests to each operation, as often as it is asked for."""
        found = []
        for result in self.schema.get_all_operations():
            operation = result.ok()
            if mode is GenerationMode.NEGATIVE and not operation.body:
                continue  # there is nothing in it that could be broken
            found += [operation.as_strategy(generation_mode=mode)] * WEIGHTS.get(operation.path, 1)
        return found

    def send(self, case: Any, mode: GenerationMode) -> None:
        """One request and its checks. Raises AssertionError, or the failures that schemathesis found."""
        start = time.monotonic()
        try:
            response = case.call(session=self.session, timeout=SECONDS)
        except requests.RequestException as error:
            raise AssertionError(f"no answer ({error}): {case.as_curl_command()}") from error
        self.slowest = max(self.slowest, time.monotonic() - start)
        status = response.status_code
        self.counts[f"{mode.value} {status}"] += 1
        if status == 200:
            self.counts[f"{case.operation.method.upper()} {case.operation.path} 200"] += 1
        streamed = response.headers["content-type"][0].startswith("text/event-stream")
        case.validate_response(response, checks=CHECKS if streamed else [*CHECKS, response_schema_conformance])
        if status >= 400 and case.operation.method != "head":
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"} and error["message"], error
        if streamed:
            *events, last, rest = response.content.split(b"\n\n")
            assert rest == b"" and (last == b"data: [DONE]" or "error" in json.loads(last.removeprefix(b"data: "))), last
            assert all("choices" in json.loads(event.removeprefix(b"data: ")) for event in events if event != b": ping")

    def run(self, count: int, seed: int) -> None:
        """So many requests."""
        proper, broken = self.cases(GenerationMode.POSITIVE), self.cases(GenerationMode.NEGATIVE)
        quiet = list(hypothesis.HealthCheck)
        phases = [hypothesis.Phase.generate]

        @hypothesis.seed(seed)
        @hypothesis.settings(max_examples=count, deadline=None, database=None, phases=phases, suppress_health_check=quiet)
        @hypothesis.given(st.data(), st.integers(0, BROKEN - 1), st.booleans())
        def one(data: Any, turn: int, guess: bool) -> None:
            mode = GenerationMode.NEGATIVE if turn == BROKEN - 1 else GenerationMode.POSITIVE
            case = data.draw(data.draw(st.sampled_from(broken if mode is GenerationMode.NEGATIVE else proper)))
            if mode is GenerationMode.POSITIVE and not guess:
                case.body = mended(case.body, self.vocabulary)
            self.send(case, mode)

        one()


def fuzz(count: int, seed: int) -> dict[str, Any]:
    """The counts of a run. Raises AssertionError where an answer is wrong, or too few are 200."""
    with tempfile.TemporaryDirectory(prefix="gptfast-fuzz-") as folder:
        path, vocabulary = make_model(Path(folder, "model"))
        with LiveServer(path) as server:
            campaign = Campaign(server, vocabulary)
            campaign.run(count, seed)
            end = time.monotonic() + 10
            while server.metric("gptfast:num_requests_running") + server.metric("gptfast:num_requests_waiting"):
                assert time.monotonic() < end, "answers are still in the making"
                time.sleep(0.05)
            assert campaign.session.get(f"{server.url}/ready", timeout=SECONDS).status_code == 200
    counts = campaign.counts
    total = sum(number for name, number in counts.items() if name.split()[0] in ("positive", "negative"))
    answered = counts["positive 200"] + counts["negative 200"]
    assert total >= count, f"{total} requests of {count}"
    assert answered >= LEAST * total, f"{answered} of {total} requests were answered 200: {json.dumps(counts)}"
    facts = {"requests": total, "answered": answered, "slowest_s": round(campaign.slowest, 2)}
    return {"seed": seed, **facts, **dict(sorted(counts.items()))}


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -P tests/fuzz_server.py", description="Requests from the OpenAPI document.")
    parser.add_argument("--count", type=int, default=10_000, help="requests (default: 10,000)")
    parser.add_argument("--seed", type=int, default=0, help="draws them (default: 0)")
    parser.add_argument("--output", type=Path, default=campaigns.FILE, help="where the record goes (default: tests/campaigns.json)")
    options = parser.parse_args(words)
    print(f"fuzz: {options.count:,} requests, about {options.count / 1500:.0f} min", flush=True)
    facts = fuzz(options.count, options.seed)
    print("fuzz: " + ", ".join(f"{name} {value}" for name, value in facts.items()))
    command = f"python -P tests/fuzz_server.py --count {options.count} --seed {options.seed}"
    sources = [path.relative_to(ROOT).as_posix() for path in (ROOT / "gptfast/serving").glob("*.py")]
    campaigns.write("fuzz server", {"command": command, **facts}, sources, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
