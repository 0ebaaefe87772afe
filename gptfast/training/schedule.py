"""The learning rate as a function of the step alone."""

from __future__ import annotations

import math

from gptfast.config import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of step 0 .. config.steps - 1: a line up from lr / warmup to lr, then half a cosine down to min_lr * lr (Loshchilov
    and Hutter 2017, arXiv:1608.03983), or lr throughout. The last step has exactly the last rate."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    left = max(config.steps - 1 - config.warmup, 1)
    progress = min((step - config.warmup) / left, 1.0)
    return config.lr * (config.min_lr + (1 - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress)))
