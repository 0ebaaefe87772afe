"""The loop that makes tokens: one pass over the prompts, then one token a step for every answer that has not ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gptfast.errors import Error
from gptfast.generation.rows import Row, Sampler

if TYPE_CHECKING:
    from gptfast.cache import KVCache
    from gptfast.model import GPT2LMHeadModel


def check_prompt(length: int, context: int) -> None:
    """Raises gptfast.Error where a prompt of `length` tokens is longer than the context."""
    if length > context:
        raise Error(f"prompt has {length:,} tokens, the model's context is {context:,}")


@contextmanager
def evaluating(model: GPT2LMHeadModel) -> Iterator[None]:
    """Evaluation mode, put back afterwards: dropout is no part of generation."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@torch.no_grad()
def prefill(model: GPT2LMHeadModel, prompts: Sequence[Sequence[int]], embeds: Sequence[Tensor] | None) -> tuple[Tensor, KVCache]:
    """Runs the prompts (or their vectors [T, C]) of any lengths: logits [B, V] of each one's last token, and the cache."""
    given: Sequence[Any] = prompts if embeds is None else embeds
    width = max(len(prompt) for prompt in given)
    mask = torch.zeros(len(given), width, dtype=torch.int64)
    ids = torch.zeros(len(given), width, dtype=torch.int64)
    for row, prompt in enumerate(given):  # left-padded: every row's last token is in the last column
        mask[row, width - len(prompt) :] = 1
        if embeds is None:
            ids[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
    arguments: dict[str, Any] = {"attention_mask": mask.to(model.device), "use_cache": True, "logits_to_keep": 1}
    if embeds is None:
        output = model(ids.to(model.device), **arguments)
    else:
        padded = [torch.nn.functional.pad(e, (0, 0, width - len(e), 0)) for e in embeds]
        output = model(inputs_embeds=torch.stack(padded).to(model.device), **arguments)
    return output.logits[:, -1], output.past_key_values


def decode(
    model: GPT2LMHeadModel, groups: Sequence[Sequence[Row]], embeds: Sequence[Tensor] | None = None
) -> Iterator[list[Row]]:
    """Completes the rows of `groups`; the rows of a group share one prompt, which is run once. Yields after every step the rows
    that it concerned; each has its new token, text piece or finish_reason in it."""
    for row in (row for group in groups for row in group if row.limit <= 0):
        row.finish_reason = "length"
    ended = [row for group in groups for row in group if row.finish_reason]
    if ended:
        yield ended
    alive = [i for i, group in enumerate(groups) if any(row.finish_reason is None for row in group)]
    if not alive:
        return
    rows = [row for i in alive for row in groups[i] if row.finish_reason is None]
    owner = [n for n, i in enumerate(alive) for row in groups[i] if row.finish_reason is None]
    vectors = None if embeds is None else [embeds[i] for i in alive]
    with evaluating(model):
        yield from _steps(model, rows, owner, [groups[i][0].prompt for i in alive], vectors)


def _steps(
    model: GPT2LMHeadModel, rows: list[Row], owner: list[int], prompts: list[Sequence[int]], embeds: list[Tensor] | None
) -> Iterator[list[Row]]:
    logits, cache = prefill(model, prompts, embeds)
    if owner != list(range(len(prompts))):
        logits = logits[torch.tensor(owner, device=logits.device)]
        cache.reorder_(owner)
    sampler = Sampler(rows, logits.shape[1], logits.device)
    while True:
        tokens = sampler.step(logits)
        yield rows
        keep = [i for i, row in enumerate(rows) if row.finish_reason is None]
        if not keep:
            return
        if len(keep) < len(rows):
            rows = [rows[i] for i in keep]
            cache.reorder_(keep)
            tokens = tokens[torch.tensor(keep, device=tokens.device)]
            sampler = Sampler(rows, logits.shape[1], logits.device)
        with torch.no_grad():
            logits = model(tokens[:, None], past_key_values=cache, use_cache=True).logits[:, -1]
