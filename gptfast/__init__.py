"""gptfast: GPT-2-family models that train, fine-tune and generate fast on whatever hardware is there.

The public names are loaded on first use, so that `import gptfast` and the command line's help do not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gptfast import _environment
from gptfast.errors import Error, LoadError

if TYPE_CHECKING:
    from gptfast import ops
    from gptfast.backend import explain
    from gptfast.backend import use as backend
    from gptfast.config import GPT2Config, TrainConfig
    from gptfast.generation import Engine, SamplingParams
    from gptfast.model import GPT2ForSequenceClassification, GPT2LMHeadModel
    from gptfast.tokenizer import GPT2Tokenizer
    from gptfast.training import AdamW, Trainer

__version__ = "0.1.0"

_HOME = {
    "AdamW": "gptfast.training",
    "Engine": "gptfast.generation",
    "GPT2Config": "gptfast.config",
    "GPT2ForSequenceClassification": "gptfast.model",
    "GPT2LMHeadModel": "gptfast.model",
    "GPT2Tokenizer": "gptfast.tokenizer",
    "SamplingParams": "gptfast.generation",
    "TrainConfig": "gptfast.config",
    "Trainer": "gptfast.training",
    "explain": "gptfast.backend",
}
_MODULES = ("backend", "ops")
__all__ = [  # noqa: RUF022 - the order of the interface's own list
    "GPT2Config", "GPT2LMHeadModel", "GPT2ForSequenceClassification", "GPT2Tokenizer", "AdamW", "TrainConfig", "Trainer",
    "SamplingParams", "Engine", "backend", "ops", "explain", "Error", "LoadError", "__version__",
]

_environment.check_at_import()  # an unknown GPTFAST_ name or backend is an error here, before anything runs


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"gptfast.{name}")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'gptfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
