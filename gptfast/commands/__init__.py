"""What the commands share: the app, the common options, the decorator that makes a command of a function, and where text goes.

The bodies are in start.py (demo, prepare, train), run.py (generate, score, evaluate), chat.py and machine.py (convert, backends,
doctor): in one file they would be past what can be read at once. Torch and everything heavy is imported inside them.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from gptfast import options
from gptfast._environment import parse_backend
from gptfast.config import option
from gptfast.errors import Error
from gptfast.options import Key, keys

GROUPS = START, TRAIN, RUN, FILES, MACHINE = "Start here", "Train", "Run a model", "Files", "This machine"
app = typer.Typer(
    name="gptfast", add_completion=True, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Trains, fine-tunes and runs GPT-2-family models fast on whatever hardware is there.",
)


@dataclass
class Common:
    """Options that mean the same in every command that has them."""

    device: str = option("auto", "where to run; auto is cuda where there is a GPU", choices=("auto", "cpu", "cuda"))
    dtype: str | None = option(
        None, "number format of the weights (default: fp32; a packed file's own)", choices=("fp32", "bf16", "fp16", "int8", "int4")
    )
    threads: int | None = option(None, "CPU threads (none: PyTorch's choice)", low=1, high=4096)
    backend: str | None = option(None, "backend for every op that has it, and/or op=name to force one (as GPTFAST_BACKEND)")
    seed: int = option(0, "seed of everything random", low=0, high=2**63 - 1)
    json: bool = option(False, "print one JSON object on standard output, and nothing else there")
    debug: bool = option(False, "show the traceback of an error inside gptfast")


COMMON = keys(Common)
Model = Annotated[str, typer.Argument(metavar="MODEL", help="model folder, packed file, or an id on the hub", show_default=False)]
Config = Annotated[str | None, typer.Option("--config", metavar="FILE", help="YAML file with options", show_default="none")]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="print the YAML that would run, and stop", show_default="off")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="skip bad lines, and count them", show_default="off")]


def command(group: str, common: str = "", **panels: Mapping[str, Key]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator for a command's body(common, given, its own parameters) -> the result that --json prints.

    `common` names the Common options it takes beside --json and --debug; `panels` are further options by help panel. A result's
    "exit_code" becomes the process's.
    """

    def decorate(body: Callable[..., Any]) -> Callable[..., Any]:
        chosen = {name: COMMON[name] for name in (*common.split(), "json", "debug")}

        def run(*, given: dict[str, Any], **own: Any) -> int:
            shared = Common(**{name: given.pop(name) for name in chosen if name in given})
            # whatever a library prints must not get between the caller and the one JSON object
            with contextlib.redirect_stdout(sys.stderr) if shared.json else contextlib.nullcontext():
                result = dict(body(common=shared, given=given, **own) or {})
            code = int(result.pop("exit_code", 0))
            if shared.json:
                print(json.dumps(_finite(result), default=str))
            sys.stdout.flush()
            return code

        parameters = [p for p in inspect.signature(body, eval_str=True).parameters.values() if p.name not in ("common", "given")]
        run.__name__, run.__doc__, run.__module__ = body.__name__, body.__doc__, body.__module__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        titled = {title.replace("_", " "): panel for title, panel in panels.items()}
        wrapped = options.accept({**titled, "Common options": chosen}, switches=("json", "debug"))(run)
        app.command(name=body.__name__.rstrip("_"), rich_help_panel=group)(wrapped)
        return body

    return decorate


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null takes their place."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def note(text: str) -> None:
    """A line on stderr: progress, or a fact beside the result."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def running(common: Common, show: bool = True) -> Iterator[str]:
    """Applies --device, --threads and --backend, says on stderr what runs unless the command's own code does (`show`), and gives
    the device. Raises gptfast.Error for a device or a forced backend that is not there."""
    asked, forced = parse_backend(common.backend or "")
    import torch

    from gptfast.backend import summary, supports, use

    if common.device == "cuda" and not torch.cuda.is_available():
        raise Error("--device is cuda, and torch finds no CUDA device; allowed here: auto, cpu")
    for op, name in forced.items():
        reason = supports(op, name)
        if reason is not None:
            raise Error(f"--backend {op}={name} cannot run: {reason}")
    device = common.device if common.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    threads = torch.get_num_threads()
    if common.threads is not None:
        torch.set_num_threads(common.threads)
    try:
        with use(asked, **forced):
            if show:
                note(f"{device}, {torch.get_num_threads()} threads, {summary(device)}")
            yield device
    finally:
        torch.set_num_threads(threads)
