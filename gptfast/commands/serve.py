"""`gptfast serve`: a model behind OpenAI's HTTP interface."""

from __future__ import annotations

import dataclasses
from typing import Any

from gptfast.commands import RUN, Common, Model, command, note, running
from gptfast.commands.run import dtype_of
from gptfast.config import option
from gptfast.errors import Error
from gptfast.options import keys
from gptfast.serving.limits import Limits


@dataclasses.dataclass
class Listening:
    """Where the server listens, under which name it serves, and who may come."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 is every one that this machine has")
    port: int = option(8000, "port to listen on; 0 takes a free one and says which", low=0, high=65535)
    name: str | None = option(None, "the model's name in requests (default: the last part of MODEL)")
    template: str | None = option(None, "how conversations are written down (default: as recorded in MODEL, else plain)")
    batch: int = option(32, "answers that are made at once; others wait", low=1, high=4096)
    pages: int | None = option(None, "cache pages of 64 tokens (default: a whole context for each answer of a batch)", low=1)
    api_key_file: str | None = option(None, "file with API keys, one a line")
    api_key_env: str | None = option(None, "name of the environment variable that holds API keys, separated by commas")


@command(RUN, "device dtype threads backend", Server=keys(Listening), Limits=keys(Limits))
def serve(model: Model, common: Common, given: dict[str, Any]) -> dict[str, Any]:
    """Serve a model over HTTP as OpenAI's API: completions, chat completions, and what lm-eval asks for.

    SIGTERM and Ctrl-C finish what is under way (--drain seconds) and take nothing new; a second one ends it at once.
    """
    from gptfast import serving
    from gptfast.generation import Engine
    from gptfast.tasks import dialogue

    create_app, run = serving.create_app, serving.run
    from gptfast.serving.server import is_loopback, read_keys

    names = {field.name for field in dataclasses.fields(Listening)}
    place = Listening(**{name: value for name, value in given.items() if name in names})
    limits = Limits(**{name: value for name, value in given.items() if name not in names})
    if place.template is not None and place.template not in dialogue.TEMPLATES:
        raise Error(f"--template is {place.template!r}; allowed: {', '.join(dialogue.TEMPLATES)}")
    api_keys = read_keys(place.api_key_file, place.api_key_env)
    if not api_keys and not is_loopback(place.host):
        note(f"gptfast: warning: --host is {place.host} and there is no API key: whoever reaches it may use it")
    with running(common) as device:

        def opened() -> Engine:
            engine = Engine(
                model, dtype_of(model, common), common.threads, device=device, batch=place.batch, pages=place.pages
            )
            note(f"engine: {engine.describe()}")
            return engine

        app = create_app(
            opened, name=place.name or model.rstrip("/").rpartition("/")[2], template=place.template or _recorded(model),
            limits=limits, api_keys=api_keys, backend=common.backend or "",
        )
        run(app, place.host, place.port, note)
    note("gptfast: served to the end")
    return {"model": model, "name": app.state.service.name}


def _recorded(model: str) -> str | None:
    from pathlib import Path

    from gptfast.tasks import dialogue

    return dialogue.recorded(model) if Path(model).is_dir() else None
