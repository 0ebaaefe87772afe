"""Commands that make a model: demo, prepare, train."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from gptfast.commands import START, TRAIN, Common, Config, PrintConfig, command, running
from gptfast.config import GPT2Config, TrainConfig
from gptfast.errors import Error
from gptfast.options import keys, layers, to_yaml


@command(START, "threads seed")
def demo(
    common: Common,
    given: dict[str, Any],
    minutes: Annotated[float, typer.Option(metavar="NUMBER", help="about how long to train on two cores")] = 2.0,
    out: Annotated[str, typer.Option(metavar="DIR", help="folder for the model; an older one moves aside")] = "runs/demo",
) -> dict[str, Any]:
    """Train a small GPT on the Python standard library's source, compare it with gzip and xz, and let it write."""
    from gptfast.demo import run

    with running(common, show=False):
        return dict(run(minutes=minutes, out=out, seed=common.seed))


@command(TRAIN)
def prepare(
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT...", help=".txt, .jsonl, folders of them", show_default=False)],
    out: Annotated[str, typer.Option(metavar="DIR", help="new folder for the token shards", show_default="required")],
    common: Common,
    given: dict[str, Any],
    tokenizer: Annotated[str | None, typer.Option(metavar="MODEL", help="whose tokenizer to use", show_default="none")] = None,
    train_tokenizer: Annotated[int | None, typer.Option(metavar="INT", help="vocabulary of a new one", show_default="8192")] = None,
    val: Annotated[float, typer.Option(metavar="NUMBER", help="fraction of the documents held out")] = 0.05,
) -> dict[str, Any]:
    """Turn text into token shards for `gptfast train`."""
    from gptfast.data import prepare as build

    meta = build(inputs, out, tokenizer=tokenizer, train_tokenizer=train_tokenizer, val=val)
    if not common.json:
        counts = [meta[split]["tokens"] for split in ("train", "val")]
        print(f"{out}: {counts[0]:,} tokens to train on, {counts[1]:,} held out, vocabulary {meta['vocab_size']:,}")
    return meta


_DATA_DECIDES = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "num_labels")
TRAIN_KEYS = keys(TrainConfig)
MODEL_KEYS = {name: key for name, key in keys(GPT2Config).items() if name not in _DATA_DECIDES}


@command(TRAIN, "backend", Training=TRAIN_KEYS, Model=MODEL_KEYS)
def train(
    common: Common,
    given: dict[str, Any],
    config: Config = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest checkpoint in --out", show_default="off")] = False,
    print_config: PrintConfig = False,
) -> dict[str, Any]:
    """Train a model on shards from `gptfast prepare`; --out becomes a Hugging Face folder with its log.

    What runs: command line > --config file > with --resume what the run recorded > default.
    """
    known = {**TRAIN_KEYS, **MODEL_KEYS}
    sources = layers(given, config, None, known)
    if resume:
        from gptfast.training.run import recorded

        if not sources.merged().get("out"):
            raise Error("--resume needs --out, the folder of the run")
        old = {name: value for name, value in recorded(sources.merged()["out"]).items() if name in known}
        sources = layers(given, config, old, known)
    settings, model = sources.build(TrainConfig), sources.build(GPT2Config)
    named = sorted((set(sources.command_line) | set(sources.config_file)) & set(MODEL_KEYS))
    if settings.init and named:
        raise Error(f"--{named[0].replace('_', '-')} describes a new model, but --init {settings.init} brings its own")
    if print_config:
        text = to_yaml("Training", settings, TRAIN_KEYS) + ("" if settings.init else to_yaml("Model", model, MODEL_KEYS))
        if not common.json:
            print(text, end="")
        return {name: getattr(settings if name in TRAIN_KEYS else model, name) for name in known}
    for name in ("data", "out"):
        if not getattr(settings, name):
            raise Error(f"--{name} is needed: {TRAIN_KEYS[name].help}")
    from gptfast.training.distributed import processes
    from gptfast.training.run import train as fit

    shared = Common(device=settings.device, threads=settings.threads, backend=common.backend)
    with running(shared, show=False):
        result = fit(settings, model, resume=resume)
    if processes()[0]:
        raise typer.Exit()  # the first process prints
    if not common.json:
        held_out = f", held-out loss {result['val_loss']:.4f}" if "val_loss" in result else ""
        print(f"{settings.out}: step {result['step']:,}, loss {result['loss']:.4f}{held_out}, {result['tokens_per_s']:,} tokens/s")
    return result
