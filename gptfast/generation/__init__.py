"""Generation: sampling parameters, the loop that makes tokens, stopping, streaming, beam search, scoring, the engine.

`SamplingParams` is read by the command line's help, so nothing here imports torch before it is needed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gptfast.generation.parameters import SamplingParams

if TYPE_CHECKING:
    from gptfast.generation.engine import Completion, Engine

__all__ = ["Completion", "Engine", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name in ("Completion", "Engine"):
        return getattr(import_module("gptfast.generation.engine"), name)
    raise AttributeError(f"module 'gptfast.generation' has no attribute {name!r}")
