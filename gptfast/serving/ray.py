"""The server as a Ray Serve application (the `ray` extra): replicas on the machines of a cluster, behind Ray's own proxy.

    from ray import serve
    from gptfast.serving.ray import application

    serve.run(application("runs/small", dtype="int8", replicas=4, threads=2))

Each replica opens the model by itself: it is a path that every machine has, or a hub id. A text depends on the request and its seed
alone, so any replica gives the same answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptfast.errors import Error
from gptfast.serving import Limits

if TYPE_CHECKING:
    from fastapi import FastAPI


def application(
    model: str | Path, *, dtype: str | None = None, threads: int = 1, batch: int = 32, replicas: int = 1, name: str | None = None,
    template: str | None = None, limits: Limits | None = None, api_keys: Sequence[str] = (),
) -> Any:
    """What `serve.run` takes: `replicas` servers of one model, with `threads` CPUs each.

    The other arguments are Engine's and create_app's. Raises gptfast.Error where ray is missing or a number is none.
    """
    for label, value in (("replicas", replicas), ("threads", threads), ("batch", batch)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise Error(f"{label} is {value!r}; allowed: a whole number of at least 1")
    try:
        from ray import serve
    except ModuleNotFoundError as missing:
        raise Error("Ray Serve is not installed: pip install 'gptfast-torch[ray]'") from missing
    path, served = str(model), name or Path(model).name
    bounds, keys = limits or Limits(), tuple(api_keys)

    def build() -> FastAPI:  # called in each replica: what it makes is never sent from one process to another
        from gptfast.generation import Engine
        from gptfast.serving import create_app

        def opened() -> Engine:
            return Engine(path, dtype, threads, batch=batch)

        return create_app(opened, name=served, template=template, limits=bounds, api_keys=keys)

    options = {"num_replicas": replicas, "max_ongoing_requests": bounds.max_queue, "ray_actor_options": {"num_cpus": threads}}
    return serve.deployment(serve.ingress(build)(), name="gptfast", **options).bind()
