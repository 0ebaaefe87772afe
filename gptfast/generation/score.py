"""log P of a text by the chain rule: log P(w1..wn) = sum of log P(w_i | w_1..w_i-1), the first word given <|endoftext|>.

A text longer than the context is scored in windows of `context` tokens that begin `stride` apart (default context / 2): each token
once, in the first window that predicts it, with at least context - stride tokens before it. Bits per byte divide by all bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gptfast import ops
from gptfast.errors import Error
from gptfast.forward import Pass, check_ids
from gptfast.generation.loop import evaluating

if TYPE_CHECKING:
    from gptfast.generation.scheduler import Scheduler
    from gptfast.model import GPT2LMHeadModel

WINDOWS = 4  # computed at once


@dataclass(frozen=True)
class Score:
    """log P of each token (None for a first one without context), and of the whole.

    total: their sum in nats; bytes: length of the text in UTF-8; bits_per_byte: -total / (ln 2 bytes), 0 for an empty text;
    perplexity: exp of the mean of -logprobs, 1 for none.
    """

    token_ids: list[int]
    logprobs: list[float | None]
    total: float
    bytes: int
    bits_per_byte: float
    perplexity: float
    stride: int


def windows(count: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, scored) of each window over `count` tokens: tokens begin..end-1 go in, and predict begin+1..end; the last
    `scored` of these predictions count. The predicted token `count - 1` is the last one."""
    done = 0  # tokens up to this index are scored
    begin = 0
    while done < count - 1:
        end = min(begin + context, count - 1)
        yield begin, end, end - done
        done = end
        begin += stride


def _plan(context: int, vocab: int, ids: Sequence[int] | Tensor, stride: int | None) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """The ids, checked, and their windows."""
    stride = max(context // 2, 1) if stride is None else stride
    if isinstance(stride, bool) or not isinstance(stride, int) or not 1 <= stride <= context:
        raise Error(f"stride is {stride!r}; allowed: 1 to {context}, the model's context")
    tokens = torch.as_tensor(ids, dtype=torch.int64)
    check_ids("ids", tokens, vocab)
    return tokens, list(windows(len(tokens), context, stride))


@torch.no_grad()
def token_logprobs(model: GPT2LMHeadModel, ids: Sequence[int] | Tensor, stride: int | None = None) -> Tensor:
    """log P(ids[i] | what precedes it in its window) for i = 1..n-1, fp32 [n - 1] on the CPU.

    Raises gptfast.Error for a stride outside 1..context and for an id outside the vocabulary.
    """
    tokens, spans = _plan(model.config.n_positions, model.config.real_vocabulary, ids, stride)
    result = []
    with evaluating(model):
        for first in range(0, len(spans), WINDOWS):
            batch = spans[first : first + WINDOWS]
            width = max(end - begin for begin, end, _ in batch)
            inputs = torch.zeros(len(batch), width, dtype=torch.int64)
            targets = torch.full((len(batch), width), -100)
            for row, (begin, end, scored) in enumerate(batch):
                inputs[row, : end - begin] = tokens[begin:end]
                targets[row, end - begin - scored : end - begin] = tokens[end - scored + 1 : end + 1]
            result.append(_gather(model, inputs.to(model.device), targets.to(model.device)))
    return torch.cat(result).cpu() if result else torch.zeros(0)


def scheduled_logprobs(scheduler: Scheduler, ids: Sequence[int] | Tensor, stride: int | None = None) -> Tensor:
    """token_logprobs() of the model that a scheduler's runner runs."""
    tokens, spans = _plan(scheduler.runner.context, scheduler.runner.vocab, ids, stride)
    values = []
    for begin, end, scored in spans:
        values += scheduler.score(tokens[begin:end].tolist(), tokens[end - scored + 1 : end + 1].tolist())
    return torch.tensor(values, dtype=torch.float32)


def _gather(model: GPT2LMHeadModel, inputs: Tensor, targets: Tensor) -> Tensor:
    """log P of the targets that are not -100, in order; padding on the right changes nothing before it."""
    positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
    hidden = model.transformer(Pass(inputs, None, positions))[-1]
    wanted = targets != -100
    x, y = hidden[wanted], targets[wanted]
    return -ops.linear_cross_entropy(x, model.lm_head.weight, y, vocab=model.config.real_vocabulary, reduction="none").float()


def score_ids(
    model: GPT2LMHeadModel, ids: Sequence[int], size: int, bos: int | None = None, stride: int | None = None
) -> Score:
    """Score of `ids`, a text of `size` bytes. `bos` is put in front and not scored; None leaves the first token without a score."""
    values = token_logprobs(model, ids if bos is None else [bos, *ids], stride)
    return summed(values, ids, size, bos is not None, max(model.config.n_positions // 2, 1) if stride is None else stride)


def summed(values: Tensor, ids: Sequence[int], size: int, bos: bool, stride: int) -> Score:
    """The Score of `ids` from what token_logprobs() gave; `bos`: it was given a token in front of them."""
    logprobs: list[float | None] = [*([None] if not bos and len(ids) else []), *values.tolist()]
    total = float(values.double().sum())
    return Score(
        list(ids), logprobs, total, size, -total / (math.log(2) * size) if size else 0.0,
        math.exp(-total / len(values)) if len(values) else 1.0, stride,
    )
