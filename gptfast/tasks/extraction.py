"""Answers that are picked from a context: greedy decoding in which every token has to go on with some place of the context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from gptfast.errors import Error
from gptfast.generation.loop import evaluating, prefill

if TYPE_CHECKING:
    from gptfast.model import GPT2LMHeadModel


@torch.no_grad()
def extract(
    model: GPT2LMHeadModel, prompts: Sequence[tuple[Sequence[int], Sequence[int]]], longest: int
) -> list[tuple[list[int], float]]:
    """The answer to each (prompt, context), both ids: at most `longest` ids that stand side by side in the context, without the
    <|endoftext|> that ends them, and the model's log-probability of both. An answer has at least one token.
    Raises gptfast.Error for a model without an end."""
    end, room = model.config.eos_token_id, model.config.n_positions
    if end is None:
        raise Error("the model has no eos_token_id, which ends an answer")
    answers: list[list[int]] = [[] for _ in prompts]
    totals = [0.0] * len(prompts)
    places = [list(range(len(context))) for _, context in prompts]  # where in its context each answer may go on
    with evaluating(model):
        logits, cache = prefill(model, [prompt for prompt, _ in prompts], None)
        alive = list(range(len(prompts)))
        while True:
            logprobs = torch.log_softmax(logits.float(), dim=1)
            going = []
            for row, number in enumerate(alive):
                prompt, context = prompts[number]
                allowed = sorted({context[place] for place in places[number]} | ({end} if answers[number] else set()))
                token = allowed[int(logprobs[row, allowed].argmax())]
                totals[number] += float(logprobs[row, token])
                if token == end:
                    continue
                answers[number].append(token)
                places[number] = [place + 1 for place in places[number] if context[place] == token and place + 1 < len(context)]
                if len(answers[number]) < min(longest, room - len(prompt)):
                    going.append(row)
            if not going:
                return list(zip(answers, totals, strict=True))
            alive = [alive[row] for row in going]
            cache.reorder_(going)
            tokens = torch.tensor([[answers[number][-1]] for number in alive], device=logits.device)
            logits = model(tokens, past_key_values=cache, use_cache=True).logits[:, -1]
