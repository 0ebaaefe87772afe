"""Runners, random requests and what they are given alone: for the tests of the scheduler, of speculation and of engines."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch

import gptfast.backend as backend
from gptfast import packed
from gptfast.config import GPT2Config
from gptfast.generation.loading import cpp_reason
from gptfast.generation.parameters import SamplingParams
from gptfast.generation.rows import Drawn, Row
from gptfast.generation.runner import Batch, EagerRunner, Runner
from gptfast.generation.scheduler import Scheduler
from gptfast.model import GPT2LMHeadModel

VOCAB, CONTEXT = 97, 320


def tiny(layers: int = 2, seed: int = 0, context: int = CONTEXT) -> GPT2LMHeadModel:
    """A model of VOCAB tokens that has much to choose from."""
    torch.manual_seed(seed)
    config = GPT2Config(VOCAB, context, 32, layers, 4, initializer_range=0.3, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


class BurstingRunner(EagerRunner):
    """decode() as an engine does it that draws many tokens in a call."""

    stopped = False

    def decode(self, batch: Batch, steps: int) -> list[Drawn]:
        """Steps on copies of the rows."""
        rows = [replace(row, tokens=list(row.tokens), stream=None) for row in batch.rows if row is not None]
        now = Batch(list(batch.tokens), list(batch.starts), batch.tables, batch.draws, [*rows])
        results: list[Drawn] = []
        while len(results) < steps:
            results.append(drawn := self.step(now))
            if self.stopped or any(s or t in row.stop_ids for s, t, row in zip(drawn.status, drawn.tokens, rows, strict=True)):
                break
            for row, token in zip(rows, drawn.tokens, strict=True):
                row.tokens.append(token)
            now.tokens, now.starts = [[token] for token in drawn.tokens], [start + 1 for start in now.starts]
        self.stopped = False
        return results

    def interrupt(self) -> None:
        """Ends decode() after this step."""
        self.stopped = True


class OneByOne:
    """A runner that draws one token a call."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.vocab, self.context, self.pages = runner.vocab, runner.context, runner.pages
        self.step, self.logits, self.copy_pages = runner.step, runner.logits, runner.copy_pages
        self.interrupt, self.close = runner.interrupt, runner.close

    def decode(self, batch: Batch, steps: int) -> list[Drawn]:
        """One step."""
        return [self.step(batch)]


def _double(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """In float64 the logits, rounded to fp32, do not depend on the number of rows."""
    copy = GPT2LMHeadModel(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.double().eval()


# "double": eager and bursting in float64; the C++ engine by its weights' format
RUNNERS = ("double", "cpp-fp32", "cpp-bf16", "cpp-int8", "cpp-int4")


def runner_reason(name: str) -> str | None:
    """None if a runner of RUNNERS can be made with the backends that this thread asks for, else why not."""
    return None if name == "double" else cpp_reason(name.removeprefix("cpp-"), "cpu")


def make_runner(name: str, model: GPT2LMHeadModel, pages: int) -> Runner:
    """A runner of RUNNERS; "double" draws many tokens in a call where eager is not asked for."""
    if name != "double":
        runner: Runner = import_module("gptfast.generation.cpp").CppRunner(packed.pack(model, name.removeprefix("cpp-")), 1, pages)
        return runner
    kind = EagerRunner if backend.order("linear", "cpu")[0] == "eager" else BurstingRunner
    return kind(_double(model), pages)


def row(
    prompt: Sequence[int], limit: int, params: SamplingParams, choice: int = 0, stops: Sequence[int] = (), **more: Any
) -> Row:
    """One answer that is asked for."""
    return Row(list(prompt), params, params.seed or 0, limit, frozenset(stops), choice, len(prompt), **more)


def random_params(rng: random.Random) -> SamplingParams:
    """Any settings."""
    values: dict[str, Any] = {
        "seed": rng.randrange(1 << 40), "temperature": rng.choice([0.0, 0.7, 1.0, 2.0]), "top_k": rng.choice([0, 5, 40])
    }
    if rng.random() < 0.3:
        values["top_p"] = rng.choice([0.5, 0.9])
    if rng.random() < 0.3:
        values.update(rng.choice([{"frequency_penalty": 0.5}, {"presence_penalty": 1.0}, {"repetition_penalty": 1.3}]))
    if rng.random() < 0.2:
        values["order"] = rng.choice(["hf", "vllm", "llama.cpp"])
    if rng.random() < 0.2:
        values["min_tokens"] = rng.randrange(1, 12)
    if rng.random() < 0.2:
        values["banned_tokens"] = (1, 2, 3)
    if rng.random() < 0.3:
        values["logprobs"] = rng.randrange(0, 4)
    if rng.random() < 0.1:
        values["logprobs_mode"] = "processed"
    return SamplingParams(**values)


def random_request(rng: random.Random, prefixes: Sequence[Sequence[int]], longest: int = CONTEXT) -> list[Row]:
    """The rows of one request of at most `longest` tokens; often with a beginning that others share."""
    start = list(rng.choice(prefixes)) if rng.random() < 0.6 else []
    prompt = [*start, *(rng.randrange(VOCAB) for _ in range(rng.choice([1, 2, 5, 40, 63, 64, 65, 100])))]
    prompt = prompt[: longest - 2]
    params, limit = random_params(rng), min(rng.randrange(1, 40), longest - len(prompt))
    stops = rng.sample(range(VOCAB), rng.choice([0, 1, 3]))
    words = [[rng.randrange(VOCAB), rng.randrange(VOCAB)]] if rng.random() < 0.1 else []
    return [row(prompt, limit, params, choice, stops, bad_words=words) for choice in range(rng.choice([1, 1, 1, 2, 5]))]


def fresh(old: Row) -> Row:
    """The same question without its answer."""
    return Row(old.prompt, old.params, old.seed, old.limit, old.stop_ids, old.choice, old.start, old.bad_words)


def made(row: Row) -> tuple[Any, ...]:
    """The whole answer, to be compared."""
    return row.tokens, row.logprobs, row.top_logprobs, row.finish_reason, row.error


def alone(runner: Runner, old: Row) -> tuple[Any, ...]:
    """What the row is given when nothing else is there: the whole prompt at once, one token a step, nothing cached."""
    again = fresh(old)
    scheduler = Scheduler(OneByOne(runner), 1, runner.context, idle=0)
    scheduler.run([scheduler.submit([again])])
    return made(again)
