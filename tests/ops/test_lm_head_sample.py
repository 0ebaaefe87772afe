"""lm_head_sample: the definition against its three parts, the order of a kernel's arguments."""

import pytest
import torch

from gptfast import Error, backend, ops
from gptfast.ops.sample import Sampled

pytestmark = pytest.mark.usefixtures("eager")


def case(rows=4):
    parts = {"temperature": torch.full((rows,), 0.9), "top_k": torch.full((rows,), 6), "top_p": torch.full((rows,), 0.95)}
    parts |= {"seed": torch.arange(rows) + 7, "position": torch.arange(rows) * 3, "choice": torch.zeros(rows, dtype=torch.int64)}
    return [torch.randn(rows, 8), torch.randn(8), torch.randn(8), torch.randn(13, 8)], parts


def same(a, b):
    assert len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("vocab", [None, 11])
@pytest.mark.parametrize("modes", [{}, {"order": "hf", "logprobs_mode": "processed"}])
def test_parts(vocab, modes):
    tensors, parts = case()
    x, ln_weight, ln_bias, weight = tensors
    drawn = ops.lm_head_sample(*tensors, **parts, top_n=3, vocab=vocab, eps=1e-3, **modes)
    logits = torch.nn.functional.layer_norm(x, (8,), ln_weight, ln_bias, 1e-3) @ weight[:vocab].t()
    same(drawn, ops.sample(logits, **parts, top_n=3, **modes))
    assert int(drawn.token.max()) < (vocab or 13) and not drawn.logprob.requires_grad


def test_counts_are_updated():
    tensors, parts = case()
    counts = torch.zeros(4, 13, dtype=torch.int32)
    drawn = ops.lm_head_sample(*tensors, **parts, counts=counts)
    assert torch.equal(counts.nonzero()[:, 1], drawn.token) and int(counts.sum()) == 4


def test_order_of_a_kernels_arguments(formula):
    tensors, parts = case()

    def leaf(
        x, ln_weight, ln_bias, weight, eps, temperature, top_k, top_p, min_p, typical_p, repetition, frequency, presence, bias,
        mask, prompt, counts, seed, position, choice, top_n,
    ):
        assert (min_p, typical_p, repetition, frequency, presence, bias, mask, prompt, counts) == (None,) * 9
        logits = ops.linear(ops.layer_norm(x, ln_weight, ln_bias, eps), weight)
        return ops.sample(logits, temperature, top_k, top_p, seed=seed, position=position, choice=choice, top_n=top_n)

    wanted = ops.lm_head_sample(*tensors, **parts, top_n=2, vocab=11)
    with formula("lm_head_sample", leaf):
        drawn = ops.lm_head_sample(*tensors, **parts, top_n=2, vocab=11)
    assert isinstance(drawn, Sampled)
    same(drawn, wanted)


def test_limits_of_kernels(monkeypatch):
    monkeypatch.setitem(backend._missing, ("lm_head_sample", "cpp"), None)
    tensors, _ = case()
    assert backend.supports("lm_head_sample", "cpp", (*tensors, "gptfast", "raw")) is None
    assert "order hf with raw" in backend.supports("lm_head_sample", "cpp", (*tensors, "hf", "raw"))
    assert "33 rows" in backend.supports("lm_head_sample", "cpp", (torch.randn(33, 8), *tensors[1:], "gptfast", "raw"))


def test_bad_input():
    tensors, parts = case()
    with pytest.raises(Error, match=r"weight has shape \(13, 8\), x \(4, 7\)"):
        ops.lm_head_sample(tensors[0][:, :7], *tensors[1:], **parts)
    with pytest.raises(Error, match="vocab is 14; allowed: 1 to 13"):
        ops.lm_head_sample(*tensors, **parts, vocab=14)
