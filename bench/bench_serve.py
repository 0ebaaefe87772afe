"""The server on the CPU: what HTTP costs over the engine, for one client and for 32, beside llama.cpp's and transformers' servers.

    python bench/peers/make_models.py MODELS                                  once: random GPT-2 124M in everybody's form
    pytest bench/bench_serve.py --models MODELS -s                            both tables and the goals
    pytest bench/bench_serve.py --models MODELS -s -k one_client --candidates gptfast

Servers and the bare engine are processes that are stopped while another one is timed; the clients of a round are one process, this
one, whose share of a CPU is printed. One client: (seconds of 128 tokens - seconds of 1) / 127, and what that is above the engine's
own in the same round. 32 clients: all send one request at once; tokens over the seconds until the last one has its answer, as a
part of what the engine makes of the same prompts in one call. Time to first token counts from sending, between tokens from event to
event: tokens that the engine made in one call arrive together. peers/README.md says what the peers are.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from gptfast import benchmark as bench
from gptfast.errors import Error
from gptfast.testing.client import Connection
from gptfast.testing.live import LiveServer, free_port
from gptfast.tokenizer import GPT2Tokenizer

cases = sys.modules.get("gptfast_bench_generate_cases")
if cases is None:  # bench/ is no package: the file beside this one
    spec = importlib.util.spec_from_file_location("gptfast_bench_generate_cases", Path(__file__).parent / "generate_cases.py")
    cases = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = cases
    spec.loader.exec_module(cases)

PROMPT, CLIENTS = 64, 32
NEW = {1: 128, CLIENTS: 64}  # tokens of an answer, by the number of clients
# candidate -> form, and the model's file below the folder
SERVERS = {"gptfast": ("int8", "int8.packed"), "llama.cpp": ("q8_0", "q8_0.gguf"), "transformers": ("bf16", "hf")}
# (clients, streamed) -> what is demanded: most microseconds a token above the engine and most of its time; least part of its rate
OVERHEAD = {False: (60.0, 0.0), True: (250.0, 0.08)}
RATE = {False: 0.90, True: 0.70}


@cache
def texts(folder: Path, count: int, turn: int) -> list[list[int]]:
    """Prompts of PROMPT tokens, no two alike: words that the tokenizer reads back as the ids they came from."""
    tokenizer = GPT2Tokenizer.from_pretrained(folder / "hf")
    words = [id for id in range(1000, 40000) if (b := tokenizer.token_bytes(id))[:1] == b" " and b[1:].isalpha() and b.islower()]
    generator = torch.Generator().manual_seed(1000 * turn + count)
    drawn = torch.randint(0, len(words), (count, PROMPT), generator=generator).tolist()
    return [[words[i] for i in row] for row in drawn]


def decoded(folder: Path, ids: list[int]) -> str:
    return GPT2Tokenizer.from_pretrained(folder / "hf").decode(ids)


# ---------------------------------------------------------------------------------------------------------------------- servers


class Peer:
    """A server nobody here wrote, on a port of its own. Raises gptfast.Error where it does not answer."""

    def __init__(self, command: list[str], port: int, seconds: float = 120) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(cases.THREADS), "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
        self.port, end = port, time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                assert self.process.stderr is not None
                last = (self.process.stderr.read().strip().splitlines() or ["no word"])[-1]
                raise Error(f"{' '.join(command[1:4])} ended: {last[:200]}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/openapi.json", timeout=5):
                return
            time.sleep(0.2)
        self.close()
        raise Error(f"{' '.join(command[1:4])} did not answer within {seconds:.0f} s")

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def launch(name: str, folder: Path) -> Any:
    """The candidate's server; it has `port`, `process` and close(). Raises gptfast.Error where it cannot run."""
    form, file = SERVERS[name]
    path, threads = folder / file, str(cases.THREADS)
    if not path.exists():
        raise Error(f"{path} is not there; bench/peers/make_models.py makes it")
    if name == "gptfast":
        return LiveServer(path, "--threads", threads)
    port = free_port()
    if name == "llama.cpp":
        options = {"model": path, "n_ctx": 1024, "n_threads": threads, "n_threads_batch": threads, "port": port, "verbose": False}
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        return Peer([sys.executable, "-P", "-m", "llama_cpp.server", *words], port)
    script = Path(__file__).parent / "peers/server_transformers.py"
    return Peer([sys.executable, "-P", str(script), str(path), form, str(port), threads], port)


@contextlib.contextmanager
def awake(process: subprocess.Popen[Any]) -> Iterator[None]:
    """A server runs only while it is timed: what its threads do afterwards takes nothing from others."""
    os.kill(process.pid, signal.SIGCONT)
    try:
        yield
    finally:
        os.kill(process.pid, signal.SIGSTOP)


# ------------------------------------------------------------------------------------------------------------------------- load


@dataclass
class Seen:
    """What the clients of a candidate saw, over all rounds: seconds to the first token, seconds between events, CPU share."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    share: list[float] = field(default_factory=list)

    def facts(self) -> dict[str, float]:
        found = {"client_cpu": round(statistics.median(self.share), 3)}
        for name, values in (("first_token", self.first), ("between", self.between)):
            if len(values) > 1:
                cuts = statistics.quantiles(values, n=100, method="inclusive")
                found |= {f"{name}_p50_ms": round(1e3 * cuts[49], 3), f"{name}_p99_ms": round(1e3 * cuts[98], 3)}
        return found


async def one(port: int, prompt: str, new: int, stream: bool, start: asyncio.Event, seen: Seen) -> None:
    """One client: connects, waits for the start, asks once. Raises gptfast.Error for an answer of another length."""
    connection = await Connection.open("127.0.0.1", port)
    request: dict[str, Any] = {"prompt": prompt, "max_tokens": new, "temperature": 0, "stream": stream}
    await start.wait()
    begin = time.perf_counter()
    if stream:
        times = [when async for when, _ in connection.stream("/v1/completions", request)]
        if len(times) < new / 2:  # bytes that wait for the rest of a character have no event of their own
            raise Error(f"benchmark refused: a stream of {len(times)} events where {new} tokens were asked for")
        seen.first.append(times[0] - begin)
        seen.between += [later - earlier for earlier, later in pairwise(times)]
    else:
        status, answer = await connection.post("/v1/completions", request)
        if status != 200 or answer["usage"]["completion_tokens"] != new:
            raise Error(f"benchmark refused: {status}, {str(answer)[:300]}")
    await connection.close()


async def crowd(port: int, prompts: list[str], new: int, stream: bool, seen: Seen) -> float:
    """Seconds until all of the clients have their answers."""
    start = asyncio.Event()
    clients = [asyncio.create_task(one(port, prompt, new, stream, start, seen)) for prompt in prompts]
    await asyncio.sleep(0.05)  # all are connected
    cpu, begin = time.process_time(), time.perf_counter()
    start.set()
    await asyncio.gather(*clients)
    seconds = time.perf_counter() - begin
    seen.share.append((time.process_time() - cpu) / seconds)
    return seconds


class Load:
    """A candidate's server with so many clients; a call is a round."""

    def __init__(self, server: Any, folder: Path, clients: int, stream: bool) -> None:
        self.server, self.folder, self.clients, self.stream = server, folder, clients, stream
        self.turn, self.new = 0, NEW[clients]
        self._run(8, Seen())
        self.seen = Seen()

    def _run(self, new: int, seen: Seen) -> float:
        self.turn += 1
        rows = texts(self.folder, self.clients, 2 * self.turn + self.stream)
        prompts = [decoded(self.folder, row) for row in rows]
        with awake(self.server.process):
            return asyncio.run(crowd(self.server.port, prompts, new, self.stream, seen))

    def __call__(self) -> float:
        """Seconds a token of one client; seconds of a whole round of many."""
        if self.clients > 1:
            return self._run(self.new, self.seen)
        first = self._run(1, Seen())
        return (self._run(self.new, self.seen) - first) / (self.new - 1)


def engine_round(process: Any, folder: Path, turns: Iterator[int]) -> float:
    """The bare engine on CLIENTS prompts in one call: seconds."""
    rows = texts(folder, CLIENTS, next(turns))
    return float(process.ask("run", prompts=rows, new=NEW[CLIENTS], mode="greedy", seed=1)["seconds"])


# ----------------------------------------------------------------------------------------------------------------------- tables


class Table:
    """All candidates with so many clients, streamed and not, and the bare engine, in turn."""

    def __init__(self, folder: Path, clients: int, rounds: int, only: str | None) -> None:
        wanted = [name for name in SERVERS if only is None or name in only.split(",")]
        own = next(c for c in cases.candidates("decode", "int8") if c.name == "gptfast")
        self.clients, self.reasons, self.loads = clients, dict[str, str](), dict[str, Load]()
        with contextlib.ExitStack() as stack:
            processes, reasons = stack.enter_context(cases.running([own], folder))
            if own not in processes:
                pytest.skip("; ".join(reasons.values()))
            for name in wanted:
                try:
                    server = launch(name, folder)
                    stack.callback(server.close)
                    for stream in (False, True):
                        self.loads[f"{name} streamed" if stream else name] = Load(server, folder, clients, stream)
                except Error as refusal:
                    self.reasons[name] = str(refusal)
            tasks: dict[str, Callable[[], float]] = {"engine": self._engine(processes[own], folder), **self.loads}
            self.timings = bench.alternate(tasks, rounds)
        self.rows = [self._row(name) for name in self.timings]
        command = " ".join(["pytest", *sys.argv[1:]])
        facts = {**bench.machine(), "command": command, "absent": self.reasons, "server_threads": cases.THREADS}
        bench.write(f"serve {clients} client{'s' * (clients > 1)}", self.rows, {}, facts)
        print(f"\n{self}")

    def _engine(self, process: Any, folder: Path) -> Callable[[], float]:
        if self.clients == 1:
            measure: Callable[[], float] = cases.Measure(process, cases.Regime(1, PROMPT, NEW[1]), "greedy")
            return measure
        process.ask("run", prompts=texts(folder, CLIENTS, 0), new=8, mode="greedy", seed=1)
        return partial(engine_round, process, folder, iter(range(10**6, 2 * 10**6)))

    def _row(self, name: str) -> dict[str, Any]:
        timing, engine = self.timings[name], self.timings["engine"]
        server = name.removesuffix(" streamed")
        form = SERVERS[server][0] if server in SERVERS else "int8"
        tokens = 1 if self.clients == 1 else self.clients * NEW[self.clients]
        pairs = list(zip(timing.samples, engine.samples, strict=True))
        row = {
            "candidate": name, "form": form, "clients": self.clients, "seconds": timing.median, "spread": round(timing.spread, 4),
            "rounds": len(timing.samples), "tokens_per_s": round(tokens / timing.median, 1),
            "of_engine": round(statistics.median(bare / own for own, bare in pairs), 4),
            "overhead_us": round(1e6 * statistics.median(own - bare for own, bare in pairs) / tokens, 1),
        }
        return {**row, **(self.loads[name].seen.facts() if name in self.loads else {})}

    def __str__(self) -> str:
        columns = ("tokens_per_s", "of_engine", "overhead_us", "first_token_p50_ms", "first_token_p99_ms", "between_p50_ms",
                   "between_p99_ms", "client_cpu", "spread")  # fmt: skip
        titles = ("tokens/s", "of engine", "us above", "first p50", "first p99", "between p50", "between p99", "client CPU",
                  "spread")  # fmt: skip
        lines = [f"{self.clients} client(s), prompt {PROMPT}, {NEW[self.clients]} tokens; milliseconds unless said otherwise"]
        lines.append(f"  {'':22} " + " ".join(f"{title:>11}" for title in titles))
        for row in self.rows:
            lines.append(f"  {row['candidate']:22} " + " ".join(f"{row.get(column, ''):>11}" for column in columns))
        return "\n".join(lines + [f"  absent: {name}: {reason}" for name, reason in self.reasons.items()])


@pytest.fixture
def table(request: pytest.FixtureRequest) -> Callable[[int], Table]:
    """Measures with so many clients; skips where the models are not made."""
    option = request.config.option
    torch.set_num_threads(cases.THREADS)
    folder = Path(option.models, "gpt2") if option.models else None
    if folder is None or not (folder / "hf/config.json").exists():
        pytest.skip("--models FOLDER has no gpt2: python bench/peers/make_models.py FOLDER")
    return lambda clients: Table(folder, clients, option.rounds, option.candidates)


def test_one_client(table: Callable[[int], Table]) -> None:
    """Overhead a token over the bare engine: at most 60 us; streamed at most 250 us or 8 %."""
    measured = table(1)
    bare = measured.timings["engine"].median
    for row in measured.rows:
        if row["candidate"].startswith("gptfast"):
            streamed = row["candidate"].endswith("streamed")
            most = max(OVERHEAD[streamed][0], OVERHEAD[streamed][1] * bare * 1e6)
            verdict = "reaches" if row["overhead_us"] <= most else "MISSES"
            print(f"{row['candidate']}: {row['overhead_us']} us a token above the engine {verdict} {most:.0f} us")


def test_many_clients(table: Callable[[int], Table]) -> None:
    """32 clients: at least 0.90 of the engine's batched rate, 0.70 streamed."""
    for row in table(CLIENTS).rows:
        if row["candidate"].startswith("gptfast"):
            least = RATE[row["candidate"].endswith("streamed")]
            verdict = "reaches" if row["of_engine"] >= least else "MISSES"
            print(f"{row['candidate']}: {row['of_engine']} of the engine's rate {verdict} {least}; client CPU {row['client_cpu']}")
