"""When two engines with the same weights choose alike: the same token everywhere, but where the choice hung by less than what
their logits differ by.

Both are given the same texts (teacher-forced), so their logits can be compared place by place. d is the largest difference of two
logits over all places. What is chosen may differ only where the reference's winner, or the boundary of one of its filters, leads by
less than 2 d: each of two logits may have moved by d, towards each other. Such places are counted.

    python -P -m gptfast.testing.choices [--layers 12] [--width 768] [--heads 12] [--prompts 64] [--new 64]

compares the C++ engine with eager in GPT-2 124M's shape, greedy and sampled texts (10 to 20 minutes on two cores).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import gptfast.backend as backend
from gptfast import ops, packed, philox
from gptfast.cache import PAGE
from gptfast.config import GPT2Config
from gptfast.generation.cpp import CppRunner
from gptfast.generation.parameters import SamplingParams
from gptfast.generation.runner import Batch, Runner
from gptfast.model import GPT2LMHeadModel
from gptfast.ops.sample import filtered

LARGEST, RATE = 1e-5, 1e-4  # d as a part of the largest |logit|; places where another token was chosen
GREEDY = SamplingParams(temperature=0.0)
SETTINGS = (
    GREEDY, SamplingParams(temperature=1.0, top_k=0), SamplingParams(temperature=0.8, top_k=20),
    SamplingParams(temperature=1.0, top_k=0, top_p=0.9), SamplingParams(temperature=0.7, top_k=40, top_p=0.95, min_p=0.02),
)  # fmt: skip


@dataclass
class Agreement:
    """places: how many choices were compared; different: how many of them differ; difference: d / largest |logit|."""

    places: int
    different: int
    difference: float


def compare(right: Tensor, found: Tensor, settings: tuple[SamplingParams, ...] = SETTINGS) -> Agreement:
    """right, found: logits fp32 [places, V] of the reference and of another engine. Raises AssertionError for a difference above
    LARGEST, for another choice where nothing was close, and for more than RATE other choices in all (one is always allowed)."""
    apart = float((right - found).abs().max())
    difference = apart / float(right.abs().max())
    assert difference <= LARGEST, f"logits differ by {difference:.3g} of the largest; allowed: {LARGEST}"
    places, different = 0, 0
    for number, params in enumerate(settings):
        position = torch.arange(len(right)) % 1000
        ours, theirs = (choose(logits, params, number, position) for logits in (found, right))
        wrong = (ours != theirs).nonzero()[:, 0]
        places, different = places + len(right), different + len(wrong)
        if len(wrong):
            leads = margins(right[wrong], params, number, position[wrong])
            lead = float(leads.max())
            assert lead < 2 * apart, f"{params}: another token at a lead of {lead:.3g}, d is {apart:.3g}"
    assert different <= max(1, RATE * places), f"{different} of {places} choices differ"
    return Agreement(places, different, difference)


def _columns(params: SamplingParams, rows: int) -> dict[str, Any]:
    numbers = {name: torch.full((rows,), float(getattr(params, name))) for name in ("temperature", "top_p", "min_p", "typical_p")}
    return {**numbers, "top_k": torch.full((rows,), params.top_k)}


def choose(logits: Tensor, params: SamplingParams, seed: int, position: Tensor) -> Tensor:
    """Ids [B] drawn from logits [B, V]."""
    key: dict[str, Any] = {"seed": torch.full_like(position, seed), "position": position, "choice": torch.zeros_like(position)}
    return ops.sample(logits, **_columns(params, len(logits)), **key).token


def margins(logits: Tensor, params: SamplingParams, seed: int, position: Tensor) -> Tensor:
    """How far, in logits, each row [B, V] is from another choice: the least of the winner's lead and of the distances of the
    boundaries of top_k, top_p and min_p. typical_p is not known here."""
    if params.greedy:
        best = logits.topk(2, dim=1).values
        return best[:, 0] - best[:, 1]
    assert params.typical_p == 1
    columns = _columns(params, len(logits))
    given = [columns[name] for name in ("temperature", "top_k", "top_p", "min_p")]
    kept, ids = filtered(logits, given[0], given[1], given[2], given[3], None, params.order)
    places = torch.arange(logits.shape[1]).expand_as(logits) if ids is None else ids
    score = kept + philox.gumbel(torch.full((len(logits), 1), seed), places, position[:, None], torch.zeros(len(logits), 1).long())
    best = score.topk(min(2, score.shape[1]), dim=1).values
    result = (best[:, 0] - best[:, -1]) * params.temperature if best.shape[1] == 2 else torch.full((len(logits),), float("inf"))
    ordered = logits.double().sort(dim=1, descending=True).values
    if 0 < params.top_k < logits.shape[1]:
        result = torch.minimum(result, (ordered[:, params.top_k - 1] - ordered[:, params.top_k]).float())
        ordered = ordered[:, : params.top_k]
    scaled = ordered / params.temperature
    if params.top_p < 1:
        mass = scaled.softmax(1).cumsum(1)
        slack = (mass - params.top_p).abs().amin(1) / (params.top_p * (1 - params.top_p))  # d moves log(p / (1 - p)) by up to 2 d
        result = torch.minimum(result, (slack * params.temperature).float())
    if params.min_p > 0:
        edge = ordered[:, :1] + params.temperature * torch.tensor(params.min_p).log()
        result = torch.minimum(result, (ordered - edge).abs().amin(1).float())
    return result


# ------------------------------------------------------------------------------------------------------------------------- texts

Text = tuple[int, list[int]]  # tokens of the prompt, and all ids


def spread(**changes: Any) -> GPT2LMHeadModel:
    """A model with weights so large that greedy text does not repeat itself."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**{"n_positions": 128, "initializer_range": 0.3, **changes})).eval()


def texts_of(model: GPT2LMHeadModel, prompts: int = 64, new: int = 64, **more: Any) -> list[Text]:
    """Prompts of 1 to 60 random tokens, and `new` more that the eager model chose; `more` goes to model.generate."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 61, (prompts,), generator=generator).tolist()
    ids, mask = torch.zeros(prompts, 60, dtype=torch.int64), torch.zeros(prompts, 60, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, 60 - length :] = 1
        ids[row, 60 - length :] = torch.randint(0, model.config.vocab_size, (length,), generator=generator)
    with backend.use("eager"):
        out = model.generate(ids, attention_mask=mask, max_new_tokens=new, eos_token_id=-1, **more)
    assert isinstance(out, Tensor)
    return [(length, out[row, 60 - length :].tolist()) for row, length in enumerate(lengths)]


@torch.no_grad()
def eager_logits(model: GPT2LMHeadModel, texts: Iterable[Text]) -> Tensor:
    """fp32 [new tokens of all texts, V] from which each new token is chosen, by PyTorch alone."""
    with backend.use("eager"):
        return torch.cat([model(torch.tensor([ids])).logits[0, length - 1 : -1] for length, ids in texts])


def runner_logits(runner: Runner, texts: Sequence[Text]) -> Tensor:
    """The same from a runner, all texts in one step; it needs pages for all of them."""
    batch, first = Batch(), 0
    for length, ids in texts:
        count = -(-len(ids) // PAGE)
        batch.add(ids[:-1], 0, list(range(first, first + count)), len(ids) - length, None)
        first += count
    return runner.logits(batch)


def main() -> None:
    """The long form: a model's shape, greedy and sampled texts, a line each."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    for name, default in (("layers", 12), ("width", 768), ("heads", 12), ("prompts", 64), ("new", 64), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    model = spread(n_layer=given.layers, n_embd=given.width, n_head=given.heads, initializer_range=0.1)
    runner = CppRunner(packed.pack(model, "fp32"), given.threads, 4 * PAGE)
    for seed in (None, 3):
        texts = texts_of(model, given.prompts, given.new, do_sample=seed is not None, seed=seed)
        places = different = 0
        largest = 0.0
        for begin in range(0, len(texts), 4):  # logits of four texts at a time are in memory
            part = texts[begin : begin + 4]
            found = compare(eager_logits(model, part), runner_logits(runner, part))
            places, different = places + found.places, different + found.different
            largest = max(largest, found.difference)
        kind = "greedy" if seed is None else "sampled"
        print(f"{kind}: {different} of {places:,} choices differ (allowed: {RATE} of them),", end=" ")
        print(f"logits by {largest:.2g} of the largest (allowed: {LARGEST})")
        if different > max(1, RATE * places):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
