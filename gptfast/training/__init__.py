"""Training: one step function, the trainer around it, and what it needs."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptfast.training.optimizer import AdamW
    from gptfast.training.trainer import Trainer

__all__ = ["AdamW", "Trainer"]


def __getattr__(name: str) -> Any:  # lazy, so that gptfast.data can use this package's progress line and the trainer gptfast.data
    if name == "AdamW":
        from gptfast.training.optimizer import AdamW

        return AdamW
    if name == "Trainer":
        from gptfast.training.trainer import Trainer

        return Trainer
    raise AttributeError(f"module 'gptfast.training' has no attribute {name!r}")
