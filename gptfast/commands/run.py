"""Commands that run a model: generate, score, evaluate."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptfast.commands import RUN, Common, Model, command, note, running
from gptfast.config import option
from gptfast.errors import Error, LoadError
from gptfast.generation.parameters import SamplingParams
from gptfast.options import keys

if TYPE_CHECKING:
    from gptfast.generation.engine import Completion, Engine
    from gptfast.generation.score import Score


@dataclasses.dataclass
class Windows:
    """How a text longer than the context is scored."""

    stride: int | None = option(None, "tokens between two windows of a long text (default: half the context)", low=1)


WINDOWS = keys(Windows)


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise Error(f"standard input is not UTF-8 (byte {error.start})") from None


def _text_file(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LoadError(f"file {path} is not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise LoadError(f"file {path}: {error.strerror or error}") from None


@command(RUN, "device dtype threads backend", Sampling=keys(SamplingParams))
def generate(
    model: Model,
    common: Common,
    given: dict[str, Any],
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT|-]", help="text to continue; - reads standard input", show_default="none")
    ] = None,
) -> dict[str, Any]:
    """Continue a text; the answer is streamed as it is made. Without a prompt it starts from <|endoftext|>."""
    params = SamplingParams(**given)
    if params.seed is None:
        from gptfast.generation.generate import fresh_seeds

        params = dataclasses.replace(params, seed=fresh_seeds(1)[0])
    text = _standard_input() if prompt == "-" else prompt or ""
    with running(common) as device:
        from gptfast.generation import Engine

        with Engine(model, common.dtype, device=device) as engine:
            note(f"seed {params.seed}")
            start = time.perf_counter()
            streaming = params.n == 1 and not common.json
            answers = [_stream(engine, text, params)] if streaming else engine.generate(text, params)
            seconds = time.perf_counter() - start
    count = sum(len(answer.token_ids) for answer in answers)
    ends = ", ".join(str(answer.finish_reason) for answer in answers)
    note(f"{count} tokens in {seconds:.2f} s, {count / max(seconds, 1e-9):.1f} tokens/s, ended by {ends}")
    if all(answer.error for answer in answers):
        raise Error(f"model {model}: {answers[0].error}")
    if not common.json and not streaming:
        for answer in answers:
            print(f"--- {answer.index}{f': {answer.error}' if answer.error else ''}\n{answer.text}")
    return {"model": model, "prompt": text, "seed": params.seed, "completions": [dataclasses.asdict(answer) for answer in answers]}


def _stream(engine: Engine, text: str, params: SamplingParams) -> Completion:
    """Prints the pieces as they come, and returns them joined; what was printed stays where Ctrl-C ends it."""
    pieces = []
    try:
        for piece in engine.stream(text, params):
            pieces.append(piece)
            sys.stdout.write(piece.text)
            sys.stdout.flush()
    finally:
        if pieces:
            print(flush=True)
    ids = [token for piece in pieces for token in piece.token_ids]
    logprobs = [value for piece in pieces for value in piece.logprobs]
    return dataclasses.replace(pieces[-1], text="".join(piece.text for piece in pieces), token_ids=ids, logprobs=logprobs)


@command(RUN, "device dtype threads backend", Windows=WINDOWS)
def score(
    model: Model,
    common: Common,
    given: dict[str, Any],
    text: Annotated[
        str | None, typer.Argument(metavar="[TEXT|-]", help="text to score; - reads standard input", show_default="none")
    ] = None,
    file: Annotated[str | None, typer.Option("--file", metavar="FILE", help="text file to score", show_default="none")] = None,
    bos: Annotated[bool, typer.Option("--bos/--no-bos", help="the first token is given <|endoftext|>", show_default="on")] = True,
) -> dict[str, Any]:
    """Print log P of a text by the chain rule: of every token, their sum, and bits per byte."""
    if (text is None) == (file is None):
        raise Error("score needs a text: either TEXT (- for standard input) or --file FILE")
    whole = _text_file(file) if file is not None else _standard_input() if text == "-" else str(text)
    with running(common) as device:
        from gptfast.generation import Engine

        with Engine(model, common.dtype, device=device) as engine:
            result = engine.score(whole, stride=given.get("stride"), bos=bos)
            tokens = [engine.tokenizer.token_bytes(token).decode("utf-8", "backslashreplace") for token in result.token_ids]
    if not common.json:
        _print_score(result, tokens)
    return {"model": model, "tokens": tokens, **dataclasses.asdict(result)}


def _print_score(result: Score, tokens: list[str]) -> None:
    print("      log P  token")
    for value, token in zip(result.logprobs, tokens, strict=True):
        print(f"{'-' if value is None else f'{value:.4f}':>11}  {token!r}")
    print(f"{result.total:11.4f}  sum: log P of {len(tokens)} tokens, {result.bytes} bytes")
    print(f"bits per byte {result.bits_per_byte:.4f}, perplexity {result.perplexity:.4f}, stride {result.stride}")


@command(RUN, "device dtype threads backend", Windows=WINDOWS)
def evaluate(
    model: Model,
    common: Common,
    given: dict[str, Any],
    data: Annotated[
        str, typer.Option("--data", metavar="FILE", help="text, .jsonl or a folder of `gptfast prepare`", show_default="required")
    ],
    task: Annotated[str, typer.Option("--task", metavar="lm", help="what to measure: lm is language modelling")] = "lm",
) -> dict[str, Any]:
    """Measure a model on data it was not trained on: perplexity and bits per byte."""
    if task != "lm":
        raise Error(f"--task is {task!r}; allowed: lm")
    with running(common) as device:
        from gptfast.tasks.language_modelling import evaluate as measure

        result = measure(model, data, stride=given.get("stride"), dtype=common.dtype, device=device)
    if not common.json:
        print(f"perplexity    {result['perplexity']:.4f}\nbits per byte {result['bits_per_byte']:.4f}")
        print(f"over {result['tokens']:,} tokens, {result['bytes']:,} bytes, stride {result['stride']}")
    return result
