"""The orders "vllm" and "llama.cpp": kept set and probabilities, against vLLM's steps written out in float64 by sorting, and
against llama.cpp's own samplers where its library is installed."""

import ctypes
import random

import pytest
import torch

from gptfast.ops.sample import filtered, pack_bits, penalised


def case(seed):
    """Logits [200] and settings under which every filter has something to do."""
    draw = random.Random(seed)
    logits = torch.randn(200, generator=torch.Generator().manual_seed(seed)) * draw.choice([1.5, 3.0])
    return logits, {
        "temperature": draw.choice([0.5, 0.8, 1.0, 1.7]), "top_k": draw.choice([0, 5, 40, 150]),
        "top_p": draw.choice([0.5, 0.9, 1.0]), "min_p": draw.choice([0.0, 0.02, 0.1]), "typical_p": draw.choice([0.4, 0.8, 1.0]),
    }


def ours(logits, order, temperature, top_k, top_p, min_p, typical_p):
    """Log-probabilities [200] of the filtered distribution, -inf for what was dropped."""
    numbers = [torch.tensor([value]) for value in (temperature, top_k, top_p, min_p, typical_p)]
    y, ids = filtered(logits[None], *numbers, order)
    full = y if ids is None else torch.full_like(logits[None], -float("inf")).scatter_(1, ids, y)
    return full[0].log_softmax(0)


def same(found, expected):
    assert torch.equal(found > -float("inf"), expected > -float("inf"))
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-5)


def vllm(logits, temperature, top_k, top_p, min_p):
    """vLLM's sampler: logits / T; min_p on the probabilities; then values below the k-th largest go, then, in rising order, those
    whose cumulative probability is at most 1 - p, but never the last."""
    x = logits.double() / temperature
    if min_p > 0:
        p = x.softmax(0)
        x = x.masked_fill(p < min_p * p.max(), -float("inf"))
    values, index = x.sort()
    if 0 < top_k < len(x):
        values = values.masked_fill(values < values[len(x) - top_k], -float("inf"))
    if top_p < 1:
        gone = values.softmax(0).cumsum(0) <= 1 - top_p
        gone[-1] = False
        values = values.masked_fill(gone, -float("inf"))
    return torch.empty_like(x).scatter_(0, index, values).log_softmax(0)


@pytest.mark.parametrize("seed", range(40))
def test_filters_of_order_vllm(seed):
    logits, settings = case(seed)
    settings["typical_p"] = 1.0  # vLLM has none
    found = ours(logits, "vllm", **settings)
    del settings["typical_p"]
    same(found, vllm(logits, **settings))


@pytest.mark.parametrize("seed", range(10))
def test_penalties_of_order_vllm(seed):
    """repetition over prompt and output, then frequency and presence over the output."""
    draw = torch.Generator().manual_seed(seed)
    logits, prompt = torch.randn(1, 50, generator=draw) * 3, torch.rand(1, 50, generator=draw) < 0.2
    counts = torch.randint(0, 3, (1, 50), generator=draw, dtype=torch.int32)
    numbers = [torch.tensor([value]) for value in (1.3, 0.4, 0.7)]
    x = logits.clone()
    seen = prompt | (counts > 0)
    x[seen] = torch.where(x[seen] > 0, x[seen] / 1.3, x[seen] * 1.3)
    x -= 0.4 * counts + 0.7 * (counts > 0)
    torch.testing.assert_close(penalised(logits, *numbers, None, None, pack_bits(prompt), counts), x)


@pytest.fixture(scope="module")
def llama():
    return pytest.importorskip("llama_cpp.llama_cpp", reason="llama-cpp-python is not installed (bench/peers/README.md)")


def through(llama, samplers, logits, accepted=()):
    """Logits [V] after llama.cpp's samplers, which have seen the tokens `accepted`; -inf for what they dropped."""
    chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
    for sampler in samplers:
        llama.llama_sampler_chain_add(chain, sampler)
    for token in accepted:
        llama.llama_sampler_accept(chain, token)
    data = (llama.llama_token_data * len(logits))()
    for token, value in enumerate(logits.tolist()):
        data[token].id, data[token].logit, data[token].p = token, value, 0.0
    array = llama.llama_token_data_array(data, len(logits), -1, False)
    llama.llama_sampler_apply(chain, ctypes.byref(array))
    left = torch.full_like(logits, -float("inf"))
    for i in range(array.size):
        left[array.data[i].id] = array.data[i].logit
    llama.llama_sampler_free(chain)
    return left


@pytest.mark.parametrize("seed", range(40))
def test_filters_of_order_llama_cpp(llama, seed):
    logits, settings = case(seed)
    samplers = [
        llama.llama_sampler_init_top_k(settings["top_k"]), llama.llama_sampler_init_typical(settings["typical_p"], 1),
        llama.llama_sampler_init_top_p(settings["top_p"], 1), llama.llama_sampler_init_min_p(settings["min_p"], 1),
        llama.llama_sampler_init_temp(settings["temperature"]),
    ]  # fmt: skip
    same(ours(logits, "llama.cpp", **settings), through(llama, samplers, logits).log_softmax(0))


@pytest.mark.parametrize("seed", range(10))
def test_penalties_of_order_llama_cpp(llama, seed):
    """All three over the last 64 tokens of prompt and output."""
    draw = random.Random(seed)
    logits, last = torch.randn(50) * 3, [draw.randrange(50) for _ in range(40)]
    expected = through(llama, [llama.llama_sampler_init_penalties(64, 1.3, 0.4, 0.7)], logits, last)
    counts = torch.bincount(torch.tensor(last), minlength=50).int()[None]
    numbers = [torch.tensor([value]) for value in (1.3, 0.4, 0.7)]
    torch.testing.assert_close(penalised(logits[None], *numbers, None, None, None, counts)[0], expected)
