"""Commands around a training run: estimate before it, plot after it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gptfast.commands import TRAIN, Common, Config, command, running
from gptfast.commands.start import MODEL_KEYS, TRAIN_KEYS
from gptfast.config import GPT2Config, TrainConfig
from gptfast.errors import Error
from gptfast.options import layers


@command(TRAIN, "backend", Training=TRAIN_KEYS, Model=MODEL_KEYS)
def estimate(
    common: Common,
    given: dict[str, Any],
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="whose shape to take: folder, file, hub id", show_default="the options'")
    ] = None,
    config: Config = None,
) -> dict[str, Any]:
    """Say what `gptfast train` with these options will need: parameters, memory, and after two seconds of it speed and time."""
    sources = layers(given, config, None, {**TRAIN_KEYS, **MODEL_KEYS})
    settings, shape = sources.build(TrainConfig), sources.build(GPT2Config)
    model = model or settings.init
    named = sorted((set(sources.command_line) | set(sources.config_file)) & set(MODEL_KEYS))
    if model and named:
        raise Error(f"--{named[0].replace('_', '-')} describes a new model, but {model} brings its own shape")
    with running(Common(device=settings.device, threads=settings.threads, backend=common.backend)):
        from gptfast.estimate import estimate as measure
        from gptfast.estimate import text

        found = measure(shape, settings, model=model)
    if not common.json:
        print(text(found))
    return found


@command(TRAIN)
def plot(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="folders of training runs", show_default=False)],
    common: Common,
    given: dict[str, Any],
    out: Annotated[
        str | None, typer.Option(metavar="FILE", help="picture to write (.png, .svg, .pdf)", show_default="drawn in the terminal")
    ] = None,
) -> dict[str, Any]:
    """Draw the loss and the throughput of runs, in the terminal or as a picture."""
    from gptfast import plot as drawing

    found = drawing.named(runs)
    last = {
        name: {"steps": len(run.loss), "tokens": run.loss[-1][0], "loss": run.loss[-1][1],
               "val_loss": run.held_out[-1][1] if run.held_out else None}
        for name, run in found.items()
    }  # fmt: skip
    if out is None:
        if not common.json:
            print(drawing.text(found))
        return {"runs": last, "picture": None}
    if Path(out).is_dir():
        raise Error(f"--out {out} is a folder; the name of a picture is needed, as {Path(out) / 'loss.png'}")
    if not drawing.plot(runs, out).is_file:
        raise Error("a picture needs matplotlib: pip install 'gptfast-torch[plot]'; without --out the terminal will do")
    if not common.json:
        print(f"{out}: {', '.join(found)}")
    return {"runs": last, "picture": out}
