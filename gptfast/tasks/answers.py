"""What the tasks with a language model's head share: continuations of prompts, and the loss of targets, in batches by length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from gptfast.tasks.task import Encoded

if TYPE_CHECKING:
    from gptfast.tokenizer import GPT2Tokenizer

BATCH = 64  # rows computed at once


def by_length(lengths: Sequence[int], size: int = BATCH) -> Iterator[list[int]]:
    """Numbers 0 .. len(lengths) - 1 in groups of `size`, of like lengths together."""
    order = sorted(range(len(lengths)), key=lambda number: lengths[number])
    yield from (order[first : first + size] for first in range(0, len(order), size))


def continuations(
    model: Any, prompts: Sequence[Sequence[int]], longest: int, beams: int = 1, length_penalty: float = 1.0, batch: int = BATCH
) -> list[list[int]]:
    """The most likely continuation of each prompt of ids, greedily or by beam search: at most `longest` ids, without the
    <|endoftext|> that ends it. Raises gptfast.Error for a prompt that fills the context."""
    import torch

    end = model.config.eos_token_id
    answers: list[list[int]] = [[] for _ in prompts]
    for group in by_length([len(prompt) for prompt in prompts], max(batch // beams, 1)):
        width = max(len(prompts[number]) for number in group)
        ids, mask = torch.zeros(len(group), width, dtype=torch.int64), torch.zeros(len(group), width, dtype=torch.int64)
        for row, number in enumerate(group):
            ids[row, width - len(prompts[number]) :] = torch.tensor(prompts[number])
            mask[row, width - len(prompts[number]) :] = 1
        made = model.generate(
            ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=longest, do_sample=False, num_beams=beams,
            length_penalty=length_penalty, early_stopping=False,
        )  # fmt: skip
        for row, number in enumerate(group):
            new = made[row, width:].tolist()
            answers[number] = new[: new.index(end)] if end in new else new
    return answers


def texts(tokenizer: GPT2Tokenizer, rows: Sequence[Sequence[int]], stops: Sequence[str] = ()) -> list[str]:
    """The texts of rows of ids, stripped, each up to the first of `stops` in it."""
    found = []
    for row in rows:
        text = tokenizer.decode(list(row))
        ends = [place for stop in stops if (place := text.find(stop)) >= 0]
        found.append(text[: min(ends, default=len(text))].strip())
    return found


def target_loss(model: Any, encoded: Sequence[Encoded], batch: int = BATCH) -> tuple[float, int]:
    """-log P of all targets in nats, summed, and their number."""
    import torch

    from gptfast.generation.loop import evaluating
    from gptfast.tasks.rows import ExampleRows

    rows = ExampleRows(encoded)
    total, count = 0.0, 0
    with torch.no_grad(), evaluating(model):
        for group in by_length([len(example.ids) for example in encoded], batch):
            loss, targets = model.loss_sum(*rows.rows(group).to(model.device).inputs)
            total, count = total + float(loss), count + int(targets)
    return total, count
