"""Does anything stay behind when clients go away? Random disconnects, then memory and cache at the baseline: `make soak`, or

    python -P tests/soak.py --seconds 600 --rate 50 --seed 0

A server of its own, with a small model. At random times, on average `rate` a second, a client connects, asks for something
(streamed or not, one or several prompts and answers, scores) and goes away: before the body is sent, while it waits, in the middle
of the stream, with a reset or in good order, or when it has the whole answer. A quarter as long is warm-up; what the server then
holds when it rests is the baseline. At the end, at rest: no answer in the making, pages, open files and threads at the baseline,
memory within 16 MiB of it; and one request's text is the same before, during and after. Ends with 1 where anything is not. Results:
tests/campaigns.json.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import gptfast
from gptfast.testing import campaigns
from gptfast.testing.client import Connection, Refused
from gptfast.testing.live import LiveServer

ROOT = campaigns.ROOT
ALLOWED = 16 << 20  # bytes of memory above the baseline
WAYS = ("body", "wait", "reset", "close", "stay", "pipelined")
FIXED = {"prompt": "the cat", "max_tokens": 24, "temperature": 0.8, "seed": 7}


def make_model(folder: Path) -> Path:
    """A model that answers in a moment, with long enough answers to be left in the middle of."""
    tokenizer = gptfast.GPT2Tokenizer.train(["the cat sat on the mat, and the dog. " * 20], 270)
    config = gptfast.GPT2Config(vocab_size=len(tokenizer), n_positions=256, n_embd=32, n_layer=2, n_head=2)
    gptfast.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Held(NamedTuple):
    """What a server at rest holds."""

    memory: int
    files: int
    threads: int
    pages: float


def held(server: LiveServer, seconds: float = 30) -> Held:
    """Waits until nothing is in the making, then counts. Raises AssertionError where the server does not come to rest."""
    end, process = time.monotonic() + seconds, Path(f"/proc/{server.process.pid}")
    while True:
        busy = server.metric("gptfast:num_requests_running") + server.metric("gptfast:num_requests_waiting")
        if not busy:
            break
        assert time.monotonic() < end, f"{busy:.0f} answers are still in the making after {seconds:.0f} s without a client"
        time.sleep(0.05)
    time.sleep(0.3)  # connections that were closed are taken down
    files, threads = (len(list((process / part).iterdir())) for part in ("fd", "task"))
    return Held(server.resident(), files, threads, server.metric("gptfast:kv_cache_usage_perc"))


def drawn_request(draw: random.Random) -> dict[str, Any]:
    """Something to ask for."""
    prompt: Any = " ".join(draw.choices(["the", "cat", "sat", "dog", "mat", "ü", "🙂"], k=draw.randint(0, 60)))
    if draw.random() < 0.2:
        prompt = [prompt, "the dog", [5, 6, 7]][: draw.randint(1, 2)]
    body = {"prompt": prompt, "max_tokens": draw.choice([1, 8, 60, 150]), "stream": draw.random() < 0.6, "temperature": 1.0}
    if draw.random() < 0.2:
        body["n"] = draw.randint(2, 4)
    if draw.random() < 0.3:
        body["logprobs"] = draw.randint(0, 5)
    if not body["stream"] and draw.random() < 0.2:
        body |= {"echo": True, "max_tokens": 1, "logprobs": 1}
    return body


async def visit(port: int, draw: random.Random, counts: Counter[str]) -> None:
    """One client, from connecting to going away in one of WAYS."""
    body, way, patience = drawn_request(draw), draw.choice(WAYS), draw.expovariate(20)
    connection = await Connection.open("127.0.0.1", port)
    counts[way] += 1
    request = connection.request("POST", "/v1/completions", body)
    try:
        if way == "body":
            connection.writer.write(request[: draw.randrange(1, len(request))])
            await asyncio.sleep(patience)
            connection.abort()
        elif way == "pipelined":
            connection.writer.write(request + request)
            await asyncio.sleep(patience)
            connection.abort()
        elif way == "wait":
            connection.writer.write(request)
            await asyncio.sleep(patience)
            await connection.close()
        else:
            await answered(connection, body, None if way == "stay" else draw.randint(0, 40), counts)
            connection.abort() if way == "reset" else await connection.close()
    except (ConnectionError, asyncio.IncompleteReadError, TimeoutError) as error:
        counts[f"broken: {type(error).__name__}"] += 1


async def answered(connection: Connection, body: dict[str, Any], most: int | None, counts: Counter[str]) -> None:
    """Reads the answer, of a stream at most so many events."""
    if not body["stream"]:
        status, _ = await asyncio.wait_for(connection.post("/v1/completions", body), 60)
        counts[f"status {status}"] += 1
        return
    try:
        seen = 0
        async with asyncio.timeout(60):
            async for _ in connection.stream("/v1/completions", body):
                seen += 1
                if most is not None and seen > most:
                    return
        counts["status 200"] += 1
    except Refused as refusal:
        counts[f"status {refusal.status}"] += 1


async def fixed_text(port: int) -> str:
    """What the server answers to one request with a seed; waits its turn where the server is full."""
    connection = await Connection.open("127.0.0.1", port)
    status, answer = 429, None
    while status == 429:
        status, answer = await connection.post("/v1/completions", FIXED)
        await asyncio.sleep(0.05)
    await connection.close()
    assert status == 200, answer
    return str(answer["choices"][0]["text"])


async def crowd(port: int, seconds: float, rate: float, draw: random.Random, counts: Counter[str], expected: str) -> None:
    """Clients for so long, and now and then the fixed request between them."""
    visits: set[asyncio.Task[None]] = set()
    start = time.monotonic()
    due = start
    while due < start + seconds:
        due += draw.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        task = asyncio.create_task(visit(port, random.Random(draw.random()), counts))
        visits.add(task)
        task.add_done_callback(visits.discard)
        if draw.random() < 0.01:
            assert await fixed_text(port) == expected, "the same seed gave another text under load"
            counts["fixed"] += 1
    await asyncio.gather(*visits)


def soak(seconds: float, rate: float, seed: int) -> dict[str, Any]:
    """The counts of a run, and what was held before and after. Raises AssertionError where something stayed behind."""
    draw, counts = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="gptfast-soak-") as folder, LiveServer(make_model(Path(folder, "model"))) as server:
        expected = asyncio.run(fixed_text(server.port))
        asyncio.run(crowd(server.port, seconds / 4, rate, draw, Counter(), expected))
        before = held(server)
        asyncio.run(crowd(server.port, seconds, rate, draw, counts, expected))
        after = held(server)
        assert asyncio.run(fixed_text(server.port)) == expected, "the same seed gives another text afterwards"
        assert server.process.poll() is None
    unasked = [name for name in counts if name.startswith("status") and name not in ("status 200", "status 429")]
    assert not unasked and counts["status 200"], f"answers: {dict(counts)}"
    assert after.pages <= before.pages, f"{after.pages:.2%} of the pages are held, {before.pages:.2%} before"
    assert after.files <= before.files, f"{after.files} files are open, {before.files} before"
    assert after.threads <= before.threads, f"{after.threads} threads, {before.threads} before"
    grown = after.memory - before.memory
    assert grown <= ALLOWED, f"{grown / 2**20:.1f} MiB more in memory than after the warm-up"
    requests = sum(counts[way] for way in WAYS)
    facts = {"requests": requests, "memory_mib": round(before.memory / 2**20, 1), "grown_mib": round(grown / 2**20, 1)}
    return {"seed": seed, "seconds": seconds, "rate": rate, **facts, **{name: counts[name] for name in sorted(counts)}}


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -P tests/soak.py", description="Random disconnects.")
    parser.add_argument("--seconds", type=float, default=600, help="of load, after a quarter as long of warm-up (default: 600)")
    parser.add_argument("--rate", type=float, default=50, help="clients a second (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="draws what they do (default: 0)")
    parser.add_argument("--output", type=Path, default=campaigns.FILE, help="where the record goes (default: tests/campaigns.json)")
    options = parser.parse_args(words)
    print(f"soak: {options.seconds * 1.25 / 60:.1f} min at {options.rate:g} clients/s", flush=True)
    try:
        facts = soak(options.seconds, options.rate, options.seed)
    except AssertionError as failure:
        print(f"soak: {failure}", file=sys.stderr)
        return 1
    print("soak: " + ", ".join(f"{name} {value}" for name, value in facts.items()))
    command = f"python -P tests/soak.py --seconds {options.seconds:g} --rate {options.rate:g} --seed {options.seed}"
    files = [path for part in ("serving", "generation") for path in (ROOT / "gptfast" / part).glob("*.py")]
    sources = [path.relative_to(ROOT).as_posix() for path in files]
    campaigns.write("soak", {"command": command, **facts}, sources, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
