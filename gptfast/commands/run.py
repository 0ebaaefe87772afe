"""Commands that run a model: generate, score, evaluate (chat is in chat.py)."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptfast.commands import RUN, Common, Model, SkipBad, command, note, running, speed
from gptfast.config import option
from gptfast.errors import Error, LoadError
from gptfast.generation.parameters import SamplingParams
from gptfast.options import keys
from gptfast.tasks.options import TASK

if TYPE_CHECKING:
    from gptfast.generation.engine import Completion, Engine
    from gptfast.generation.score import Score


@dataclasses.dataclass
class Windows:
    """How a text longer than the context is scored."""

    stride: int | None = option(None, "tokens between two windows of a long text (default: half the context)", low=1)


@dataclasses.dataclass
class Speculative:
    """Speculation: proposals that one step of the model checks."""

    speculation: str | None = option(
        None, "lookup (proposes what followed the same words before) or a smaller MODEL that proposes: the text stays the same"
    )


@dataclasses.dataclass
class Beams:
    """Beam search, which draws nothing."""

    num_beams: int = option(1, "with more than 1 the most probable answers found by beam search, --n of them", low=1, high=1024)
    length_penalty: float = option(1.0, "beams are compared by log P / length to this power")
    early_stopping: str = option(
        "false", "true: end with as many answers as beams; false: when none can be beaten now, never: at any length",
        choices=("false", "true", "never"),
    )


WINDOWS, SPECULATIVE, BEAMS = keys(Windows), keys(Speculative), keys(Beams)
# what no beam looks at
DRAWING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "seed", "order", "logprobs_mode", "logprobs", "stop")


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


def with_seed(params: SamplingParams) -> SamplingParams:
    """The parameters with a seed to print: the given one, or a fresh one."""
    if params.seed is not None:
        return params
    from gptfast.generation.generate import fresh_seeds

    return dataclasses.replace(params, seed=fresh_seeds(1)[0])


def dtype_of(model: str, common: Common) -> str:
    """--dtype, by default that of a packed file, else fp32."""
    from gptfast import packed

    return common.dtype or (packed.open(model).dtype if packed.is_packed(model) else "fp32")


def open_engine(model: str, common: Common, device: str, speculation: str | None = None) -> Engine:
    """The engine that --dtype and --threads ask for, on the device that running() gave; says which it is."""
    from gptfast.generation import Engine

    engine = Engine(model, dtype_of(model, common), common.threads, device=device, speculation=speculation)
    note(f"engine: {engine.describe()}")
    return engine


@command(RUN, "device dtype threads backend", Sampling=keys(SamplingParams), Speculation=SPECULATIVE, Beam_search=BEAMS)
def generate(
    model: Model,
    common: Common,
    given: dict[str, Any],
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT|-]", help="text to continue; - reads standard input", show_default="none")
    ] = None,
) -> dict[str, Any]:
    """Continue a text; the answer is streamed as it is made. Without a prompt it starts from <|endoftext|>.

    At the end it says on standard error how fast it was, and what part of the memory's speed that is.
    """
    beams, speculation = _beams(given), given.pop("speculation", None)
    params = with_seed(SamplingParams(**given))
    text = _standard_input() if prompt == "-" else prompt or ""
    streaming = params.n == 1 and beams is None and not common.json
    if beams is not None and speculation is not None:
        raise Error("--speculation proposes what may be drawn, and --num-beams draws nothing; use one of them")
    with running(common) as device:
        with open_engine(model, common, device, speculation) as engine:
            clock = speed.Clock()
            if beams is None:
                note(f"seed {params.seed}")
                answers = _stream(engine, text, params, clock, streaming)
            else:
                answers = engine.beam_search([text], params=params, **beams)
            if not common.json and not all(answer.error for answer in answers):
                _print_answers(answers, engine, streaming, params.logprobs is not None)
        facts = clock.pace()
        alone = facts["ms_per_token"] if params.n == 1 else None  # several answers share a read of the weights
        facts |= speed.memory_limit(model, dtype_of(model, common), device, alone)
    ends = ", ".join(str(answer.finish_reason) for answer in answers)
    note(speed.line(sum(len(answer.token_ids) for answer in answers), ends, facts))
    if all(answer.error for answer in answers):
        raise Error(f"model {model}: {answers[0].error}")
    completions = [dataclasses.asdict(answer) for answer in answers]
    return {"model": model, "prompt": text, "seed": params.seed, "completions": completions, "speed": facts}


def _beams(given: dict[str, Any]) -> dict[str, Any] | None:
    """Engine.beam_search's arguments, taken out of what was given; None where there is one beam. Raises gptfast.Error for an option
    that would then do nothing."""
    own = {name: given.pop(name) for name in BEAMS if name in given}
    if own.get("num_beams", 1) == 1:
        for name in own.keys() - {"num_beams"}:
            raise Error(f"--{name.replace('_', '-')} is for beam search; it goes with --num-beams of 2 or more")
        return None
    for name in DRAWING:
        if name in given:
            raise Error(f"--{name.replace('_', '-')} does nothing with --num-beams {own['num_beams']}; leave one of them out")
    stopping = {"true": True, "false": False}
    chosen = own.get("early_stopping", "false")
    return {**own, "early_stopping": stopping.get(chosen, chosen)}


def _print_answers(answers: list[Completion], engine: Engine, streamed: bool, logprobs: bool) -> None:
    """The answers' texts, but for one that was streamed, and with --logprobs a line for each token."""
    for answer in answers:
        if not streamed:
            facts = f" score {answer.score:.4f}" if answer.score is not None else ""
            print(f"--- {answer.index}{facts}{f': {answer.error}' if answer.error else ''}\n{answer.text}")
        if not logprobs:
            continue
        print("      log P  token")
        for i, (token, value) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
            others = (answer.top_logprobs[i] if answer.top_logprobs else {}).items()
            beside = "  ".join(f"{_shown(engine, other)} {least:.4f}" for other, least in others)
            print(f"{value:11.4f}  {_shown(engine, token)}{f'   of {beside}' if beside else ''}")


def _shown(engine: Engine, token: int) -> str:
    return repr(engine.tokenizer.token_bytes(token).decode("utf-8", "backslashreplace"))


def _stream(engine: Engine, text: str, params: SamplingParams, clock: speed.Clock, show: bool) -> list[Completion]:
    """The answers joined from their pieces; with `show` they are printed as they come, and stay where Ctrl-C ends it."""
    pieces: dict[int, list[Completion]] = {}
    try:
        for piece in engine.stream(text, params):
            clock.mark(piece.index, len(piece.token_ids))
            pieces.setdefault(piece.index, []).append(piece)
            if show:
                sys.stdout.write(piece.text)
                sys.stdout.flush()
    finally:
        if show and pieces:
            print(flush=True)
    return [_joined(pieces[index]) for index in sorted(pieces)]


def _joined(pieces: list[Completion]) -> Completion:
    ids = [token for piece in pieces for token in piece.token_ids]
    logprobs = [value for piece in pieces for value in piece.logprobs]
    top = None if pieces[-1].top_logprobs is None else [item for piece in pieces for item in piece.top_logprobs or []]
    whole = "".join(piece.text for piece in pieces)
    return dataclasses.replace(pieces[-1], text=whole, token_ids=ids, logprobs=logprobs, top_logprobs=top)


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
    with running(common) as device, open_engine(model, common, device) as engine:
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


@command(RUN, "device dtype threads backend", Windows=WINDOWS, Task=TASK)
def evaluate(
    model: Model,
    common: Common,
    given: dict[str, Any],
    data: Annotated[
        str, typer.Option("--data", metavar="FILE", help="examples; for lm a text, .jsonl or data folder", show_default="required")
    ],
    task: Annotated[str | None, typer.Option(metavar="NAME", help="what to measure", show_default="the model's, else lm")] = None,
    skip_bad: SkipBad = False,
) -> dict[str, Any]:
    """Measure a model on data it was not trained on, by the task it was fine-tuned for.

    Of a model without one: perplexity and bits per byte, of a smaller number format beside fp32's.
    """
    from gptfast import tasks

    found = tasks.recorded(model) if task is None else None
    name = tasks.find(task).name if task is not None else "lm" if found is None else found.name
    with running(common) as device:
        if name != "lm":
            from gptfast.tasks.run import evaluate as measure_task

            dtype = common.dtype or "fp32"
            result = measure_task(model, data, name, given, skip_bad=skip_bad, dtype=dtype, device=device)
        else:
            from gptfast.tasks.language_modelling import evaluate as measure

            _only(given, "stride")
            result = measure(model, data, given.get("stride"), dtype_of(model, common), device, common.threads)
            note(f"engine: {result['engine']}")
    if not common.json:
        if name == "lm":
            _print_evaluation(result)
        else:
            for key, value in result.items():
                print(f"{key:14s} {f'{value:.4f}' if isinstance(value, float) else value}")
    return result


def _only(given: dict[str, Any], *names: str) -> None:
    wrong = next((name for name in given if name not in names), None)
    if wrong is not None:
        raise Error(f"--{wrong.replace('_', '-')} is no option of the task lm")


def _print_evaluation(result: dict[str, Any]) -> None:
    whole = result.get("fp32")
    for title, key in (("perplexity   ", "perplexity"), ("bits per byte", "bits_per_byte")):
        beside = f" in {result['dtype']}, {whole[key]:.4f} in fp32" if whole else ""
        change = f": {result['difference_percent']:+.3f} %" if whole and key == "perplexity" else ""
        print(f"{title} {result[key]:.4f}{beside}{change}")
    print(f"over {result['tokens']:,} tokens, {result['bytes']:,} bytes, stride {result['stride']}")
    if result["dtype"] != "fp32" and not whole:
        note(f"no fp32 beside it: the file holds {result['dtype']} alone; for that evaluate the folder it was made from")
