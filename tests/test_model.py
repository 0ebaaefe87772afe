"""The model against a second, plain writing of GPT-2's formula in float64; loss, dropout, dtypes, the classifier."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gptfast
from gptfast import Error, GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, layers, ops

TINY = {"vocab_size": 61, "n_positions": 40, "n_embd": 24, "n_layer": 3, "n_head": 3, "initializer_range": 0.3}
FLAGS = [
    {},
    {"n_inner": 20, "activation_function": "relu", "tie_word_embeddings": False},
    {"scale_attn_by_inverse_layer_idx": True, "activation_function": "silu"},
    {"scale_attn_weights": False, "activation_function": "gelu", "initializer_range": 0.1},
    {"reorder_and_upcast_attn": True, "activation_function": "tanh", "layer_norm_epsilon": 1e-2},
    {"activation_function": "gelu_pytorch_tanh", "n_head": 1},
]


def tiny(kind: type = GPT2LMHeadModel, **changes: object) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    model = kind(GPT2Config(**{**TINY, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases of 0 and gains of 1 would hide a forgotten one
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(TINY["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def plain(model: GPT2LMHeadModel, ids: Tensor) -> Tensor:
    """GPT-2's logits for ids [T], written out in float64 from the state dict."""
    config, w = model.config, {name: tensor.double() for name, tensor in model.state_dict().items()}

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + config.layer_norm_epsilon).sqrt()
        return centred / deviation * w[f"{name}.weight"] + w[f"{name}.bias"]

    def conv(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    def activation(x: Tensor) -> Tensor:
        if config.activation_function in ("gelu_new", "gelu_pytorch_tanh"):
            return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return {
            "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
            "relu": lambda x: x.clamp(min=0),
            "silu": lambda x: x / (1 + torch.exp(-x)),
            "tanh": torch.tanh,
        }[config.activation_function](x)

    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][: len(ids)]
    future = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
    for layer in range(config.n_layer):
        name = f"transformer.h.{layer}"
        q, k, v = conv(norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn").chunk(3, -1)
        heads = []
        for qh, kh, vh in zip(*(t.chunk(config.n_head, -1) for t in (q, k, v)), strict=True):
            scores = qh @ kh.T
            if config.scale_attn_weights:
                scores = scores / math.sqrt(qh.shape[-1])
            if config.scale_attn_by_inverse_layer_idx:
                scores = scores / (layer + 1)
            heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ vh)
        x = x + conv(torch.cat(heads, -1), f"{name}.attn.c_proj")
        x = x + conv(activation(conv(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")), f"{name}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["lm_head.weight"].T


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: "-".join(flags) or "plain")
def test_formula(flags: dict[str, object]) -> None:
    model, ids = tiny(**flags), tokens(2, 17)
    expected = torch.stack([plain(model, row) for row in ids])
    assert torch.allclose(model(ids).logits.double(), expected, atol=2e-4 * expected.std().item())
    if flags.get("reorder_and_upcast_attn"):
        return  # attention in fp32 whatever the dtype
    assert torch.allclose(model.double()(ids).logits, expected, atol=1e-10)


def test_state_dict_has_hugging_face_names_and_layouts() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tiny(n_layer=1, n_inner=20).state_dict().items()}
    block = {
        "ln_1.weight": (24,), "ln_1.bias": (24,), "attn.c_attn.weight": (24, 72), "attn.c_attn.bias": (72,),
        "attn.c_proj.weight": (24, 24), "attn.c_proj.bias": (24,), "ln_2.weight": (24,), "ln_2.bias": (24,),
        "mlp.c_fc.weight": (24, 20), "mlp.c_fc.bias": (20,), "mlp.c_proj.weight": (20, 24), "mlp.c_proj.bias": (24,),
    }  # fmt: skip
    ends = {"transformer.wte.weight": (61, 24), "transformer.wpe.weight": (40, 24), "lm_head.weight": (61, 24)}
    ends |= {"transformer.ln_f.weight": (24,), "transformer.ln_f.bias": (24,)}
    assert shapes == ends | {f"transformer.h.0.{name}": shape for name, shape in block.items()}


def test_head_is_tied_unless_the_config_unties_it() -> None:
    tied, untied = tiny(), tiny(tie_word_embeddings=False)
    assert tied.lm_head.weight is tied.transformer.wte.weight
    assert untied.lm_head.weight is not untied.transformer.wte.weight
    assert not torch.equal(untied.lm_head.weight, untied.transformer.wte.weight)


def test_initial_weights_are_gpt2s() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=500, n_positions=64, n_embd=128, n_layer=8, n_head=4))
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            expected = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02  # sqrt(2 * 8 blocks) = 4
            assert weight.std().item() == pytest.approx(expected, rel=0.05), name
        else:
            assert (weight == (1 if ".ln" in name and name.endswith("weight") else 0)).all(), name
    assert model.training


def test_output_by_attribute_index_and_slice() -> None:
    model, ids = tiny(), tokens(1, 5)
    outputs = model(ids, labels=ids)
    loss, logits = outputs[:2]
    assert loss is outputs.loss and outputs[1] is outputs.logits and logits.shape == (1, 5, 61) and outputs["loss"] is loss
    assert outputs.past_key_values is None and len(outputs) == 2 and list(outputs) == [loss, logits]
    with torch.no_grad():
        outputs = model(ids)
    assert outputs[0] is outputs.logits and outputs[1] is outputs.past_key_values and outputs.loss is None


def test_loss_is_the_mean_over_shifted_labels_that_count() -> None:
    model, ids = tiny(), tokens(3, 9)
    labels = ids.clone()
    labels[0, :6], labels[2] = -100, -100
    outputs = model(ids, labels=labels)
    expected = F.cross_entropy(outputs.logits[:, :-1].double().flatten(0, 1), labels[:, 1:].flatten())
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    total, count = model.loss_sum(ids[:, :-1], labels[:, 1:])
    assert count.item() == (labels[:, 1:] != -100).sum() and total.dtype == torch.float32
    assert total.item() == pytest.approx(expected.item() * count.item(), rel=1e-5)


def test_loss_sum_has_the_gradients_of_the_loss() -> None:
    model, ids = tiny(), tokens(2, 12)
    gradients = []
    for step in range(2):
        model.zero_grad()
        total, count = model.loss_sum(ids[:, :-1], ids[:, 1:])
        (model(ids, labels=ids).loss if step else total / count).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-4, atol=1e-6), name
        assert gradient.abs().max() > 0, name


def test_hidden_states() -> None:
    model, ids = tiny(), tokens(2, 7)
    states = model(ids, output_hidden_states=True).hidden_states
    assert len(states) == 4 and all(state.shape == (2, 7, 24) for state in states)
    positions = torch.arange(7)
    assert torch.allclose(states[0], model.transformer.wte(ids) + model.transformer.wpe(positions))
    assert torch.allclose(model.lm_head(states[-1]), model(ids).logits)


def test_later_tokens_change_nothing_before_them() -> None:
    model, ids = tiny(), tokens(1, 20)
    changed = ids.clone()
    changed[0, 11] = (ids[0, 11] + 1) % 61
    before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :11], after[:, :11]) and not torch.allclose(before[:, 11:], after[:, 11:])


# ------------------------------------------------------------------------------------------------------------- dropout and dtypes


@pytest.mark.parametrize("site", ["embd_pdrop", "attn_pdrop", "resid_pdrop"])
def test_each_dropout_acts_in_training_only(site: str) -> None:
    off = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    model, ids = tiny(**{**off, site: 0.5}), tokens(2, 12)
    quiet = model(ids).logits
    model.train()
    torch.manual_seed(7)
    first, second = model(ids).logits, model(ids).logits
    torch.manual_seed(7)
    assert torch.equal(model(ids).logits, first)
    assert not torch.allclose(first, quiet) and not torch.allclose(first, second)


def test_seeds_are_drawn_once_a_pass_and_only_where_needed() -> None:
    model, ids = tiny(), tokens(1, 4)
    state = torch.get_rng_state()
    model(ids)
    assert torch.equal(torch.get_rng_state(), state)
    model.train()
    seeds = model.transformer.draw_seeds()
    assert seeds is not None and seeds.shape == (10,) and len(set(seeds.tolist())) == 10  # embeddings, then three a block
    assert tiny(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0).train().transformer.draw_seeds() is None


def test_dropout_keeps_the_mean() -> None:
    model = tiny(n_layer=1, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.25).train()
    ids = tokens(8, 40)
    clean = model.transformer.wte(ids) + model.transformer.wpe(torch.arange(40))
    dropped = model(ids, output_hidden_states=True).hidden_states[0]
    kept = dropped != 0
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.02)
    assert torch.allclose(dropped[kept], clean[kept] / 0.75, rtol=1e-5)


def test_bfloat16_and_autocast() -> None:
    model, ids = tiny(initializer_range=0.1), tokens(2, 16)
    exact = model(ids, labels=ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(ids, labels=ids)
        total, count = model.loss_sum(ids[:, :-1], ids[:, 1:])
    total.backward()
    assert model.transformer.wte.weight.grad.dtype == torch.float32
    model.bfloat16()
    half = model(ids, labels=ids)
    for loss in (mixed.loss, half.loss, total / count):
        assert loss.item() == pytest.approx(exact.loss.item(), rel=0.02)
    assert half.logits.dtype == torch.bfloat16
    with torch.no_grad():
        assert model(ids).past_key_values.dtype == torch.bfloat16
        assert tiny(reorder_and_upcast_attn=True).bfloat16()(ids).past_key_values.dtype == torch.float32


def test_upcast_attention_computes_scores_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(q: Tensor, *rest: object) -> Tensor:
        seen.append(q.dtype)
        return attention(q, *rest)

    attention = ops.attention
    monkeypatch.setattr(ops, "attention", spy)
    monkeypatch.setattr(layers.Block, "_weights", lambda self: None)  # through its modules, not as one op
    tiny(reorder_and_upcast_attn=True).bfloat16()(tokens(1, 5))
    tiny().bfloat16()(tokens(1, 5))
    assert seen == [torch.float32] * 3 + [torch.bfloat16] * 3


def test_the_training_step_traces_in_one_graph() -> None:
    model, ids = tiny().train(), tokens(2, 9)
    torch.manual_seed(1)
    eager = model.loss_sum(ids[:, :-1], ids[:, 1:])[0]
    torch.manual_seed(1)
    traced = torch.compile(model.loss_sum, backend="eager", fullgraph=True)(ids[:, :-1], ids[:, 1:])[0]
    assert torch.equal(traced, eager)


# ------------------------------------------------------------------------------------------------------------- vocabulary padding


def test_rows_that_only_pad_the_vocabulary_do_not_exist_outside() -> None:
    small, ids = tiny(), tokens(2, 8)
    padded = tiny(vocab_size=64, real_vocab_size=61)
    state = small.state_dict()
    table = torch.full((64, 24), 5.0)
    table[:61] = state["transformer.wte.weight"]
    padded.load_state_dict({**state, "transformer.wte.weight": table, "lm_head.weight": table})
    expected, outputs = small(ids, labels=ids), padded(ids, labels=ids)
    assert outputs.logits.shape == (2, 8, 61)
    assert torch.allclose(outputs.logits, expected.logits, atol=1e-5)
    assert outputs.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    total, count = padded.loss_sum(ids[:, :-1], ids[:, 1:])
    assert (total / count).item() == pytest.approx(expected.loss.item(), rel=1e-5)
    total.backward()
    assert (padded.transformer.wte.weight.grad[61:] == 0).all()
    with pytest.raises(Error, match="61"):
        padded(torch.tensor([[61]]))


# --------------------------------------------------------------------------------------------------------------------- classifier


@pytest.mark.parametrize("masked", [True, False])
def test_classifier_reads_the_last_real_token(masked: bool) -> None:
    model = tiny(GPT2ForSequenceClassification, num_labels=4, pad_token_id=0)
    texts = [[5, 9, 2, 0, 7], [8], [4, 4, 1]]
    expected = torch.cat([model(torch.tensor([text])).logits for text in texts])
    for side in ("left", "right"):
        rows = [[0] * (5 - len(t)) + t if side == "left" else t + [0] * (5 - len(t)) for t in texts]
        ones = [[0] * (5 - len(t)) + [1] * len(t) if side == "left" else [1] * len(t) + [0] * (5 - len(t)) for t in texts]
        logits = model(torch.tensor(rows), attention_mask=torch.tensor(ones) if masked else None).logits
        assert torch.allclose(logits, expected, atol=1e-5), side


def test_classifier_losses() -> None:
    ids = tokens(3, 6)
    mask = torch.ones_like(ids)
    model = tiny(GPT2ForSequenceClassification, num_labels=4)
    outputs = model(ids, attention_mask=mask, labels=torch.tensor([1, 3, 0]))
    assert outputs.loss.item() == pytest.approx(F.cross_entropy(outputs.logits, torch.tensor([1, 3, 0])).item(), rel=1e-6)
    several = torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1]])
    outputs = model(ids, attention_mask=mask, labels=several)
    assert outputs.loss.item() == pytest.approx(F.binary_cross_entropy_with_logits(outputs.logits, several).item(), rel=1e-6)
    model = tiny(GPT2ForSequenceClassification, num_labels=1)
    outputs = model(ids, attention_mask=mask, labels=torch.tensor([0.5, -1, 2]))
    outputs.loss.backward()
    expected = (outputs.logits[:, 0] - torch.tensor([0.5, -1, 2])).square().mean()
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert model.score.weight.grad.abs().max() > 0


def test_classifier_asks_for_what_it_needs() -> None:
    model = tiny(GPT2ForSequenceClassification, num_labels=3)
    with pytest.raises(Error, match="2 rows needs attention_mask or config"):
        model(tokens(2, 4))
    with pytest.raises(Error, match="labels hold 3; allowed: 0 to 2"):
        model(tokens(1, 4), labels=torch.tensor([3]))
    assert model(tokens(1, 4)).logits.shape == (1, 3)


def test_public_names() -> None:
    assert gptfast.GPT2LMHeadModel is GPT2LMHeadModel and gptfast.GPT2Config is GPT2Config
