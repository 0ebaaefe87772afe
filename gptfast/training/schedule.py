"""The learning rate as a function of the step alone."""

from __future__ import annotations

import math

from gptfast.config import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of step 0 .. config.steps - 1: a line up from lr / warmup to lr, then by config.schedule

    cosine    half a cosine down to min_lr * lr (Loshchilov and Hutter 2017, arXiv:1608.03983)
    wsd       lr, and in the last decay * steps steps a line down to min_lr * lr (Hu et al. 2024, arXiv:2404.06395; the line:
              Haegele et al. 2024, arXiv:2405.18392); a longer run has the same rates up to its own decay
    constant  lr

    The last step of cosine and wsd has exactly min_lr * lr, if the warm-up leaves it a step.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    last = config.steps - 1
    if config.schedule == "cosine":
        progress = min((step - config.warmup) / max(last - config.warmup, 1), 1.0)
        left = 0.5 * (1 + math.cos(math.pi * progress))
    elif config.schedule == "wsd":
        falling = max(min(round(config.decay * config.steps), config.steps - config.warmup), 0)
        left = min((last - step) / falling, 1.0) if falling else 1.0
    else:
        return config.lr
    return config.lr * (config.min_lr + (1 - config.min_lr) * left)
