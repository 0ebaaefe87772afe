"""One pass as its caller sees it: padding, caches, documents and vectors in place of ids change nothing; bad input is named."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gptfast import Error, GPT2Config, GPT2LMHeadModel

TINY = {"vocab_size": 61, "n_positions": 40, "n_embd": 24, "n_layer": 3, "n_head": 3, "initializer_range": 0.3}
FLAGS = [
    {},
    {"n_inner": 20, "activation_function": "relu", "tie_word_embeddings": False},
    {"scale_attn_by_inverse_layer_idx": True, "activation_function": "silu"},
    {"scale_attn_weights": False, "activation_function": "gelu", "initializer_range": 0.1},
    {"reorder_and_upcast_attn": True, "activation_function": "tanh", "layer_norm_epsilon": 1e-2},
    {"activation_function": "gelu_pytorch_tanh", "n_head": 1},
]


def tiny(**changes: object) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**{**TINY, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases of 0 and gains of 1 would hide a forgotten one
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(TINY["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str, cached: bool) -> None:
    model, ids = tiny(), tokens(3, 12)
    lengths = (12, 7, 1)
    mask = torch.zeros(3, 12, dtype=torch.int64)
    for row, length in zip(mask, lengths, strict=True):
        row[slice(12 - length, 12) if side == "left" else slice(length)] = 1
    with torch.no_grad():
        batch = model(ids, attention_mask=mask, use_cache=cached)
        for row in range(3):
            single = model(ids[row, mask[row] == 1][None], use_cache=False).logits[0]
            assert torch.allclose(batch.logits[row, mask[row] == 1], single, atol=1e-5)
        if cached:
            assert batch.past_key_values.lengths.tolist() == list(lengths)


def test_what_stands_at_padding_does_not_matter() -> None:
    model = tiny()
    vectors = model.transformer.wte(tokens(2, 8)).detach()
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[0, :3] = 0
    spoilt = vectors.clone()
    spoilt[0, :3] = math.nan
    for cached in (False, True):
        good, bad = (model(inputs_embeds=x, attention_mask=mask, use_cache=cached).logits for x in (vectors, spoilt))
        assert torch.equal(good[mask == 1], bad[mask == 1])


def test_inputs_embeds_replace_ids() -> None:
    model, ids = tiny(), tokens(2, 9)
    vectors = model.transformer.wte(ids).detach().requires_grad_()
    outputs = model(inputs_embeds=vectors, labels=ids)
    assert torch.allclose(outputs.logits, model(ids).logits, atol=1e-6)
    outputs.loss.backward()
    assert vectors.grad is not None and vectors.grad.abs().max() > 0


def test_documents_do_not_see_each_other() -> None:
    model, ids = tiny(), tokens(1, 14)
    documents, positions = torch.tensor([[0] * 5 + [3] * 9]), torch.tensor([[*range(5), *range(9)]])
    packed = model(ids, document_ids=documents, position_ids=positions).logits[0]
    alone = torch.cat([model(ids[:, :5]).logits[0], model(ids[:, 5:]).logits[0]])
    assert torch.allclose(packed, alone, atol=1e-5)


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: "-".join(flags) or "plain")
def test_chunks_with_a_cache_equal_one_pass(flags: dict[str, object]) -> None:
    model, ids = tiny(**flags), tokens(2, 20)
    whole = model(ids).logits
    cache, parts, start = None, [], 0
    for length in (3, 1, 1, 9, 6):
        outputs = model(ids[:, start : start + length], past_key_values=cache, use_cache=True)
        cache, start = outputs.past_key_values, start + length
        parts.append(outputs.logits)
    assert cache.get_seq_length() == 20
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)


def test_chunks_may_be_padded_on_either_side_in_every_row() -> None:
    model, ids = tiny(), tokens(2, 12)
    masks = torch.tensor([[[0, 0, 1, 1], [1, 0, 0, 0]], [[0, 0, 0, 0], [1, 1, 1, 1]], [[1, 1, 1, 0], [0, 1, 1, 0]]])
    cache, seen = None, [[], []]
    for step, mask in enumerate(masks):
        chunk = ids[:, 4 * step : 4 * step + 4]
        outputs = model(chunk, attention_mask=mask, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        for row in range(2):
            seen[row] += chunk[row, mask[row] == 1].tolist()
            if mask[row].any():
                alone = model(torch.tensor([seen[row]])).logits[0, -int(mask[row].sum()) :]
                assert torch.allclose(outputs.logits[row, mask[row] == 1], alone, atol=1e-5), (step, row)
    assert cache.lengths.tolist() == [len(row) for row in seen]


def test_legacy_tuples_are_accepted() -> None:
    model, ids = tiny(), tokens(2, 10)
    mask = torch.ones(2, 10, dtype=torch.int64)
    mask[0, :2] = 0
    with torch.no_grad():
        cache = model(ids[:, :6]).past_key_values
        past = tuple((k[:, :, :6], v[:, :, :6]) for k, v in zip(cache.keys, cache.values, strict=True))  # a row has one page here
        assert torch.allclose(model(ids[:, 6:], past_key_values=past).logits, model(ids).logits[:, 6:], atol=1e-5)
        # the mask may cover the cached tokens too; then padding among them is left out
        outputs = model(ids[:, 6:], past_key_values=past, attention_mask=mask)
        assert outputs.past_key_values.lengths.tolist() == [8, 10]


def test_a_cache_is_made_only_where_no_gradients_are_recorded() -> None:
    model, ids = tiny(), tokens(1, 5)
    assert model(ids).past_key_values is None
    outputs = model(ids, labels=ids, use_cache=True)
    outputs.loss.backward()
    assert outputs.past_key_values.get_seq_length() == 5 and model.transformer.wte.weight.grad is not None
    assert not model(ids, past_key_values=outputs.past_key_values).logits.requires_grad
    with torch.no_grad():
        assert model(ids, use_cache=False).past_key_values is None
        assert tiny(use_cache=False)(ids).past_key_values is None


def test_logits_to_keep() -> None:
    model, ids = tiny(), tokens(2, 6)
    assert torch.allclose(model(ids, logits_to_keep=2).logits, model(ids).logits[:, -2:], atol=1e-6)


def test_wrong_inputs_are_named() -> None:
    model = tiny()
    good = tokens(2, 5)
    with torch.no_grad():
        full = model(tokens(2, 38)).past_key_values
    for line, arguments in {
        "input_ids hold 61; allowed: 0 to 60": {"input_ids": torch.tensor([[1, 61]])},
        "input_ids hold -1": {"input_ids": torch.tensor([[-1]])},
        "the sequence has 41 tokens, the model's context is 40": {"input_ids": tokens(1, 41)},
        "the sequence has 43 tokens, the model's context is 40": {"input_ids": good, "past_key_values": full},
        "whole numbers of shape": {"input_ids": good.float()},
        "either input_ids or inputs_embeds": {"input_ids": good, "inputs_embeds": torch.zeros(2, 5, 24)},
        "either input_ids": {},
        "inputs_embeds have shape": {"inputs_embeds": torch.zeros(2, 5, 23)},
        "attention_mask has shape": {"input_ids": good, "attention_mask": torch.ones(2, 6)},
        "position_ids hold 40": {"input_ids": good, "position_ids": torch.full((2, 5), 40)},
        "labels hold 99": {"input_ids": good, "labels": torch.full((2, 5), 99)},
        "labels have shape": {"input_ids": good, "labels": good[:, 1:]},
        "past_key_values has 2 rows, the input has 1": {"input_ids": good[:1], "past_key_values": full},
        "past_key_values is a str": {"input_ids": good, "past_key_values": "x"},
        "exclude each other": {"input_ids": good, "past_key_values": full, "document_ids": good},
    }.items():
        with pytest.raises(Error) as caught:
            model(**arguments)
        assert line in str(caught.value) and "\n" not in str(caught.value)
    assert full.get_seq_length() == 38  # a refused call leaves the cache as it was
    with pytest.raises(Error, match="41 tokens"):
        model.loss_sum(tokens(1, 41), tokens(1, 41))
