"""Across engines in fp32: the same choices teacher-forced on the eager engine's tokens, 64 prompts x 64 tokens."""

import os

import pytest
import torch

import gptfast.backend as backend
from gptfast import packed, testing
from gptfast.generation.cpp import CppRunner
from gptfast.generation.parameters import SamplingParams
from gptfast.testing.choices import GREEDY, SETTINGS, choose, compare, eager_logits, margins, runner_logits, spread, texts_of

PROMPTS, NEW = 64, 64
CONFIGS = {
    "plain": {"n_embd": 64, "n_head": 2, "n_layer": 2, "vocab_size": 1000},
    "odd": {"n_embd": 60, "n_head": 3, "n_layer": 3, "n_inner": 100, "vocab_size": 337, "activation_function": "gelu"},
    "untied": {"n_embd": 96, "n_head": 4, "n_layer": 1, "vocab_size": 513, "tie_word_embeddings": False},
}


@pytest.fixture(autouse=True)
def extension(request):
    if "backend_choice" in request.fixturenames:
        request.getfixturevalue("backend_choice")
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    if os.environ.get("GPTFAST_BACKEND") == "eager":
        pytest.skip("the engine calls no ops: once is enough")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sampled", [False, True])
def test_cpp_chooses_as_eager_does(name, sampled):
    model = spread(**CONFIGS[name])
    texts = texts_of(model, do_sample=sampled, seed=3 if sampled else None)
    assert len(texts) == PROMPTS and all(len(ids) == length + NEW for length, ids in texts)
    assert sum(len(set(ids[length:])) for length, ids in texts) > 16 * PROMPTS, "the texts vary"
    right = eager_logits(model, texts)
    assert [ids[length:] for length, ids in texts] == right.argmax(1).view(PROMPTS, NEW).tolist() or sampled
    found = runner_logits(CppRunner(packed.pack(model, "fp32"), 2, 2 * PROMPTS), texts)
    agreement = compare(right, found)
    assert agreement.places == len(SETTINGS) * PROMPTS * NEW


def test_gpt2_smalls_width_and_vocabulary():
    """One block of GPT-2 124M and two texts; all of it is a command (gptfast/testing/choices.py)."""
    model = spread(n_layer=1, initializer_range=0.1)
    texts = [(32, torch.randint(0, 50257, (32 + NEW,)).tolist()) for _ in range(2)]
    found = runner_logits(CppRunner(packed.pack(model, "fp32"), 2, 4), texts)
    compare(eager_logits(model, texts), found, (GREEDY, SamplingParams(temperature=0.8, top_k=50, top_p=0.95)))


# ---------------------------------------------------------------------------------------------------------------- the rule itself


def test_other_weights_are_noticed():
    model = spread(**CONFIGS["plain"])
    texts = texts_of(model)[:8]
    right = eager_logits(model, texts)
    for format in ("bf16", "int8"):
        with pytest.raises(AssertionError, match="logits differ by"):
            compare(right, runner_logits(CppRunner(packed.pack(model, format), 2, 16), texts))


def test_another_choice_is_noticed_unless_it_was_close():
    torch.manual_seed(0)
    right = torch.randn(500, 50) * 3
    compare(right, right)
    small = 2e-6 * float(right.abs().max())
    compare(right, right + small * torch.randn_like(right).clamp(-3, 3))
    forged = right.clone()
    forged[7, int(right[7].argmax())] -= 9e-6 * float(right.abs().max())
    compare(right, forged)  # small enough that nothing changes
    tied = right.clone()
    tied[7] = right[7].sort(descending=True).values.roll(1)
    tied[7, 0], tied[7, 1] = tied[7, 1] + 1e-6, tied[7, 1]
    swapped = tied.clone()
    swapped[7, [0, 1]] = tied[7, [1, 0]]
    assert compare(tied, swapped, (GREEDY,)).different == 1
    many = right.clone()
    many[:, 1] = right.amax(1) + 2e-6
    many[:, 0] = right.amax(1) + 1e-6
    flipped = many.clone()
    flipped[:, [0, 1]] = many[:, [1, 0]]
    with pytest.raises(AssertionError, match="choices differ"):
        compare(many, flipped, (GREEDY,))


@pytest.mark.parametrize("params", SETTINGS, ids=str)
def test_margins_are_those_at_which_choices_change(params):
    """Moved by less than half the margin no choice changes; moved by several times as much, some do. Large moves are left out: what
    top_p's boundary does is known to the first order."""
    torch.manual_seed(0)
    logits, position = torch.randn(400, 60) * 2, torch.arange(400)
    leads = margins(logits, params, 0, position)
    assert bool((leads >= 0).all()) and float(leads.median()) > 1e-3
    before = choose(logits, params, 0, position)
    step = torch.empty_like(logits).uniform_(-1, 1).sign()
    assert torch.equal(choose(logits + 0.49 * leads[:, None].clamp(max=0.05) * step, params, 0, position), before)
    assert not torch.equal(choose(logits + 50 * leads[:, None].clamp(max=0.2) * step, params, 0, position), before)
