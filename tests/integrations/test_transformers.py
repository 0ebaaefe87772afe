"""patch(): the unpatched model's logits, loss, gradients, tokens and training curve, with every flag; and the way back."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gptfast.backend as backend
from gptfast import Error, ops
from gptfast.integrations.transformers import patch, unpatch
from gptfast.ops.attention import definition
from gptfast.testing import assert_close_to_reference, same_bits

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
transformers.logging.set_verbosity_error()

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SMALL = {
    "vocab_size": 211, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 2, "initializer_range": 0.2, "bos_token_id": 0,
    "eos_token_id": None, "pad_token_id": 0, **NO_DROPOUT,
}  # fmt: skip
FLAGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-cache": {"use_cache": False},
    "upcast": {"reorder_and_upcast_attn": True},
    "inverse-layer": {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3},
    "unscaled": {"scale_attn_weights": False, "initializer_range": 0.1},
    "untied": {"tie_word_embeddings": False},
    "odd": {"n_embd": 51, "n_head": 3, "n_inner": 70, "layer_norm_epsilon": 1e-3, "vocab_size": 97},
    "cross": {"add_cross_attention": True},
    **{f"act-{name}": {"activation_function": name} for name in (
        "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python", "relu", "silu", "tanh", "quick_gelu",
    )},
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "autocast": torch.float32}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(kind: str = "GPT2LMHeadModel", implementation: str = "sdpa", seed: int = 0, **values: Any) -> Any:
    """A random model whose biases and gains are not 0 and 1."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(**{**SMALL, **values})
    model = getattr(transformers, kind)._from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()


def masked(kind: str, batch: int, length: int) -> Tensor | None:
    """[B, T]: no padding, or more of it in each row, left or right."""
    if kind == "none":
        return None
    steps, pads = torch.arange(length), 2 * torch.arange(batch)[:, None]
    return ((steps >= pads) if kind == "left" else (steps < length - pads)).long()


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of each label [B, T - 1], 0 where it is ignored; of a classifier that of each row [B]."""
    if logits.dim() == 2:
        return F.cross_entropy(logits, labels, reduction="none")
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")


def outcome(model: Any, precision: str, given: dict[str, Any], upstream: Tensor) -> dict[str, Tensor]:
    """logits, loss, each label's loss, and the gradients of loss + sum(logits * upstream)."""
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        output = model(**given)
    (output.loss + (output.logits * upstream.to(output.logits.dtype)).sum()).backward()
    found = {"logits": output.logits.detach(), "loss": output.loss.detach()}
    found["losses"] = losses(output.logits.detach().double(), given["labels"]).to(output.loss.dtype)
    return found | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(model: Any, precision: str, given: dict[str, Any], **options: Any) -> Any:
    """Asserts that the patched model is as close to float64 as the rule wants it to be; returns the report.

    The rule is one of tensors: the error of one number may be 0 by chance. So the loss is compared label by label, and their mean
    with the mean of what the model's own logits give.
    """
    exact = copy.deepcopy(model.to(DTYPES[precision])).double()
    if "LMHead" in type(model).__name__:  # transformers' own loss is in fp32 for any logits
        exact.loss_function = lambda logits, labels, **_: losses(logits, labels).sum() / (labels[:, 1:] != -100).sum()
    for module in exact.modules():  # it would compute in fp32
        if hasattr(module, "reorder_and_upcast_attn"):
            module.reorder_and_upcast_attn = False
    with torch.no_grad():
        upstream = torch.randn_like(model(**given).logits)
    floats = {name: value for name, value in given.items() if isinstance(value, Tensor) and value.is_floating_point()}
    own = {**given, **{name: value.to(DTYPES[precision]) for name, value in floats.items()}}
    ref = outcome(exact, "fp64", {**given, **{name: value.double() for name, value in floats.items()}}, upstream)
    eager = outcome(model, precision, own, upstream)
    report = patch(model, **options)
    fast = outcome(model, precision, own, upstream)
    unpatch(model)
    assert fast.keys() == eager.keys()
    count = (given["labels"][..., 1:] != -100).sum() if given["labels"].dim() == 2 else len(given["labels"])
    mean = float(fast["losses"].double().sum() / count)
    within = 1e-6 if fast["loss"].dtype == torch.float32 else 2**-7  # a classifier's loss is in its logits' dtype
    assert fast["loss"].dtype == eager["loss"].dtype and float(fast.pop("loss")) == pytest.approx(mean, rel=within)
    for name, value in fast.items():
        gradient = name not in ("logits", "loss", "losses")
        assert_close_to_reference(value, eager[name], ref[name].view_as(eager[name]), name=name, gradient=gradient, long_sum=True)
    assert sum(report.calls.values()) > 0
    return report


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("precision", DTYPES)
def test_logits_loss_and_gradients(precision: str, padding: str, implementation: str) -> None:
    """Every position counts, the padded ones too: the upstream gradient is random everywhere."""
    model = build(implementation=implementation)
    ids = torch.randint(1, 211, (3, 17))
    labels = torch.where(torch.rand(ids.shape) < 0.2, -100, ids)
    report = compare(model, precision, {"input_ids": ids, "labels": labels, "attention_mask": masked(padding, 3, 17)})
    assert {"attention", "linear", "gelu", "layer_norm", "add_layer_norm", "cross_entropy"} <= report.calls.keys()
    assert not report.fallbacks and not report.skipped


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("flags", FLAGS)
def test_every_flag(flags: str, implementation: str) -> None:
    model = build(implementation=implementation, **FLAGS[flags])
    ids = torch.randint(1, model.config.vocab_size, (2, 19))
    report = compare(model, "fp32", {"input_ids": ids, "labels": ids, "attention_mask": masked("left", 2, 19)})
    unfused = flags in ("act-relu", "act-silu", "act-tanh", "act-quick_gelu")
    assert ("gelu" in report.calls) is not unfused and any("activation" in reason for reason in report.fallbacks) is unfused


def test_random_configs() -> None:
    """Sizes, flags, masks, positions and vectors in place of ids, drawn."""
    draw = random.Random(0)
    for seed in range(12):
        heads, size = draw.choice([1, 2, 3]), draw.choice([8, 32, 40])
        values = {
            "n_head": heads, "n_embd": heads * size, "n_layer": draw.randint(1, 3), "n_inner": draw.choice([None, 33]),
            "scale_attn_by_inverse_layer_idx": draw.random() < 0.3, "reorder_and_upcast_attn": draw.random() < 0.3,
            "scale_attn_weights": draw.random() < 0.8, "tie_word_embeddings": draw.random() < 0.7,
            "activation_function": draw.choice(["gelu_new", "gelu", "relu"]), "use_cache": draw.random() < 0.5,
        }  # fmt: skip
        model = build(implementation=draw.choice(["sdpa", "eager"]), seed=seed, **values)
        batch, length = draw.randint(1, 4), draw.randint(2, 40)
        ids = torch.randint(1, 211, (batch, length))
        given: dict[str, Any] = {"labels": ids, "attention_mask": masked(draw.choice(["none", "left", "right"]), batch, length)}
        given |= {"inputs_embeds": torch.randn(batch, length, heads * size)} if draw.random() < 0.3 else {"input_ids": ids}
        if draw.random() < 0.5:
            given["position_ids"] = torch.arange(length)[None] + draw.randint(0, 20)
        if draw.random() < 0.3:
            given["token_type_ids"] = torch.randint(0, 211, (batch, length))
        compare(model, draw.choice(["fp32", "autocast"]), given)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_classifier(padding: str, precision: str) -> None:
    model = build("GPT2ForSequenceClassification", num_labels=3, use_cache=False)
    pads, steps = torch.arange(32)[:, None] % 5, torch.arange(15)
    mask = ((steps >= pads) if padding == "left" else (steps < 15 - pads)).long()
    labels = torch.randint(0, 3, (32,))
    given = {"input_ids": torch.randint(1, 211, (32, 15)) * mask, "labels": labels, "attention_mask": mask}
    assert not compare(model, precision, given).fallbacks
    del given["attention_mask"]
    assert "transformer_block" in compare(model, "fp32", given).calls


def test_a_block_of_gpt2_is_one_op_where_nothing_is_in_the_way() -> None:
    ids = torch.randint(1, 211, (2, 33))
    report = compare(build(use_cache=False), "fp32", {"input_ids": ids, "labels": ids})
    assert report.calls["transformer_block"] == 2 and "attention" not in report.calls


# ----------------------------------------------------------------------------------------------------- caches, outputs, generate


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_past_key_values(padding: str, implementation: str) -> None:
    """Prompt, then one token, then five at once, with the cache of the one model in the other's hands."""
    model, fused = (build(implementation=implementation).eval() for _ in range(2))
    report = patch(fused)
    ids, mask = torch.randint(1, 211, (3, 20)), masked(padding, 3, 20)
    pasts: list[Any] = [None, None]
    with torch.no_grad():
        for start, end in ((0, 14), (14, 15), (15, 20)):
            given = {"attention_mask": None if mask is None else mask[:, :end], "use_cache": True}
            found = [m(ids[:, start:end], past_key_values=p, **given) for m, p in zip((model, fused), pasts, strict=True)]
            pasts = [output.past_key_values for output in found][::-1]
            real = slice(None) if mask is None else mask[:, start:end].bool()
            assert torch.allclose(found[0].logits[real], found[1].logits[real], rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(*(past.layers for past in pasts), strict=True):
        assert torch.allclose(ours.keys, theirs.keys, atol=1e-4) and torch.allclose(ours.values, theirs.values, atol=1e-4)
    assert report.calls["layer_norm_linear"] > 0 and report.calls["linear_add"] > 0


@pytest.mark.parametrize("how", [
    {"do_sample": False}, {"do_sample": False, "num_beams": 3}, {"do_sample": True, "top_k": 20},
    {"do_sample": False, "left": True},
    {"do_sample": False, "cache_implementation": "static"}, {"do_sample": False, "use_cache": False},
])  # fmt: skip
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_generate(how: dict[str, Any], implementation: str) -> None:
    model = build(implementation=implementation, initializer_range=0.4).eval()
    arguments = {name: value for name, value in how.items() if name != "left"} | {"max_new_tokens": 24}
    ids = torch.randint(1, 211, (4, 9))
    arguments["attention_mask"] = masked("left" if how.get("left") else "none", 4, 9)
    texts = []
    for fused in (False, True):
        report = patch(model) if fused else None
        torch.manual_seed(3)
        texts.append(model.generate(ids, **arguments))
    assert torch.equal(*texts) and report is not None and report.calls["linear"] > 0
    assert len(set(texts[0][0].tolist())) > 8  # no loop of one token
    if how.get("use_cache", True) and "cache_implementation" not in how:
        assert report.calls["layer_norm_linear"] >= 2 * 2 * 20


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_hidden_states_and_attentions(implementation: str) -> None:
    model, fused = (build(implementation=implementation).eval() for _ in range(2))
    report = patch(fused)
    ids = torch.randint(1, 211, (2, 13))
    for _ in range(2):  # transformers' hooks are installed by the first call
        theirs, ours = (m(ids, output_hidden_states=True, output_attentions=True) for m in (model, fused))
        for a, b in zip(theirs.hidden_states, ours.hidden_states, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
        for a, b in zip(theirs.attentions or (), ours.attentions or (), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    if implementation == "eager":
        assert len(ours.attentions) == 2 and report.fallbacks["output_attentions, which needs the weights"] == 4
    assert report.calls["linear"] > 0
    before = report.calls["attention"]
    fused(ids)
    assert report.calls["attention"] == before + 2


def test_masks_of_another_kind_are_left_to_transformers() -> None:
    ids = torch.randint(1, 211, (2, 12))
    block = torch.ones(12, 12, dtype=torch.bool).tril()
    block[6:, :6] = False
    mask = block.expand(2, 1, 12, 12)
    report = compare(build(), "fp32", {"input_ids": ids, "labels": ids, "attention_mask": mask})
    assert report.fallbacks == {"an attention mask that is more than causal with padding": 2}
    positions = torch.arange(12).remainder(6)[None].expand(2, 12)  # packed documents, as transformers tells them
    report = compare(build(), "fp32", {"input_ids": ids, "labels": ids, "position_ids": positions, "use_cache": False})
    assert sum(report.fallbacks.values()) == 2


def test_cross_attention_is_left_to_transformers() -> None:
    ids, states = torch.randint(1, 211, (2, 12)), torch.randn(2, 5, 64)
    report = compare(build(add_cross_attention=True), "fp32", {"input_ids": ids, "labels": ids, "encoder_hidden_states": states})
    assert report.fallbacks["a block with cross-attention"] == 2 and report.calls["gelu"] == 2


# ------------------------------------------------------------------------------------------------------------------------ dropout


class _Dropout(nn.Module):
    """What a patched nn.Dropout is to compute, from the same draws of torch's generator."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        with backend.use("eager"):
            return ops.dropout(x, self.p, torch.randint(-(2**63), 2**63 - 1, (1,)))


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> tuple[Tensor, None]:
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return definition(q, k, v, scaling, None, 0.3, torch.randint(-(2**63), 2**63 - 1, (1,)))[0], None


@pytest.mark.parametrize("cache", [True, False])
def test_dropout_is_where_transformers_has_it(cache: bool) -> None:
    """An unpatched model with the dropouts' definition in each of its places: embeddings, attention, both residual additions."""
    values = {"resid_pdrop": 0.1, "embd_pdrop": 0.2, "attn_pdrop": 0.3, "use_cache": cache}
    model, fused = build(**values), build(**values)
    report = patch(fused)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Dropout):
                setattr(parent, name, _Dropout(child.p))
    transformers.AttentionInterface.register("gptfast_test_dropout", _attention)
    model.set_attn_implementation("gptfast_test_dropout")
    ids = torch.randint(1, 211, (2, 16))
    found = []
    for each in (model, fused):
        torch.manual_seed(5)
        output = each(ids, labels=ids)
        output.loss.backward()
        found.append((output.logits, {name: p.grad for name, p in each.named_parameters()}))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-4, atol=1e-4)
    for name, gradient in found[0][1].items():
        assert torch.allclose(gradient, found[1][1][name], rtol=1e-3, atol=1e-5), name
    assert report.calls["dropout"] == (5 if cache else 1)  # inside the block's own op there are the others
    fused.eval()
    with torch.no_grad():
        assert torch.equal(fused(ids).logits, fused(ids).logits)


# ----------------------------------------------------------------------------------------------------------- training, the way back


class _Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = (torch.arange(24) * (index % 7 + 1) + index) % 211
        return {"input_ids": row, "labels": row}


@pytest.mark.parametrize(
    ("options", "logits"), [({}, True), ({"gradient_checkpointing": True}, True), ({"gradient_accumulation_steps": 2}, False)]
)
def test_the_curve_of_transformers_trainer(options: dict[str, Any], logits: bool, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate, which is not installed")
    curves = []
    for fused in (False, True):
        model = build(use_cache=False, initializer_range=0.05)
        report = patch(model, logits=logits) if fused else None
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=12, per_device_train_batch_size=4, learning_rate=3e-3, logging_steps=1, seed=1, report_to=[],
            save_strategy="no", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, **options,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=_Rows())
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert report is not None and report.calls["linear" if logits else "linear_cross_entropy"] > 0
    assert curves[1] == pytest.approx(curves[0], rel=2e-4) and len(curves[0]) == 12 and curves[0][-1] < curves[0][0] - 0.3


def test_without_logits_the_loss_and_gradients_are_the_same() -> None:
    model, fused = build(), build()
    report = patch(fused, logits=False)
    ids = torch.randint(1, 211, (2, 21))
    labels = torch.where(torch.rand(ids.shape) < 0.3, -100, ids)
    for extra in ({}, {"num_items_in_batch": torch.tensor(17)}, {"return_dict": False}):
        losses = []
        for each in (model, fused):
            each.zero_grad(set_to_none=True)
            output = each(ids, labels=labels, **extra)
            output[0].backward()
            losses.append(output[0].detach())
        assert torch.allclose(*losses, rtol=1e-5)
        for (name, a), (_, b) in zip(model.named_parameters(), fused.named_parameters(), strict=True):
            assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-6), name
    assert fused(ids, labels=labels).logits is None and report.calls["linear_cross_entropy"] == 4
    assert fused(ids).logits.shape == (2, 21, 211)
    assert fused.eval()(ids, labels=labels).logits.shape == (2, 21, 211)


def picture(model: Any) -> dict[str, Any]:
    """Every module's class and attributes, by identity, and every tensor's address and bits."""
    modules = {name: (type(m), {key: id(value) for key, value in vars(m).items()}) for name, m in model.named_modules()}
    return {"modules": modules, "state": {name: (t.data_ptr(), t.clone()) for name, t in model.state_dict().items()}}


@pytest.mark.parametrize("logits", [True, False])
def test_unpatch_restores_the_model_bit_for_bit(logits: bool) -> None:
    model, ids = build(), torch.randint(1, 211, (2, 15))
    expected = model(ids, labels=ids)
    before, settings = picture(model), copy.deepcopy(vars(model.config))
    patch(model, logits=logits)
    other = copy.deepcopy(model)  # a copy is patched on its own, and stays so
    assert type(model.transformer.h[0]).__name__ == "GPT2Block" and isinstance(model, transformers.GPT2LMHeadModel)
    assert "gptfast" in str(type(model.transformer.h[0])) or type(model.transformer.h[0]) is not type(build().transformer.h[0])
    model(ids, labels=ids).loss.backward()
    model.zero_grad()
    unpatch(model)
    after = picture(model)
    assert after["modules"].keys() == before["modules"].keys()
    for name, (kind, attributes) in before["modules"].items():
        assert after["modules"][name][0] is kind and after["modules"][name][1].keys() == attributes.keys(), name
    for name, (address, bits) in before["state"].items():
        assert after["state"][name][0] == address and same_bits(after["state"][name][1], bits), name
    assert vars(model.config) == settings
    again = model(ids, labels=ids)
    assert same_bits(again.logits, expected.logits) and same_bits(again.loss, expected.loss)
    unpatch(other)
    assert same_bits(other(ids).logits, expected.logits)


def test_weights_and_folders_are_those_of_an_unpatched_model(tmp_path: Path) -> None:
    model = build()
    state = copy.deepcopy(model.state_dict())
    patch(model)
    assert model.state_dict().keys() == state.keys()
    model.save_pretrained(tmp_path)
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert all(same_bits(loaded.state_dict()[name], value) for name, value in state.items())


def test_an_adapter_of_peft_is_not_bypassed() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    ids = torch.randint(1, 211, (2, 15))
    found = []
    for when in ("never", "before", "after"):
        model = build(use_cache=False)
        if when == "before":
            patch(model)
        config = peft.LoraConfig(r=2, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True, init_lora_weights=False)
        torch.manual_seed(1)
        wrapped = peft.get_peft_model(model, config)
        report = patch(model) if when == "after" else None
        found.append(wrapped(ids, labels=ids).loss)
        plain = wrapped.disable_adapter()
        with plain:
            assert abs(float(wrapped(ids, labels=ids).loss - found[-1])) > 1e-2
    assert report is not None and report.calls["layer_norm"] > 0
    assert torch.allclose(torch.stack(found[1:]), found[0], rtol=1e-5)


def test_a_hook_still_sees_its_module() -> None:
    model, ids = build(use_cache=False), torch.randint(1, 211, (2, 15))
    expected, seen = model(ids).logits, []
    patch(model)
    handle = model.transformer.h[1].mlp.c_fc.register_forward_hook(lambda *given: seen.append(given[2].shape))
    assert torch.allclose(model(ids).logits, expected, rtol=1e-4, atol=1e-5) and seen == [(2, 15, 256)]
    handle.remove()
    model(ids)
    assert len(seen) == 1


def test_what_cannot_be_patched() -> None:
    with pytest.raises(Error, match="the model is a Linear"):
        patch(nn.Linear(2, 2))
    with pytest.raises(Error, match="is not patched"):
        unpatch(build())
    model = build()
    patch(model)
    with pytest.raises(Error, match="patched already"):
        patch(model)
    with pytest.raises(Error, match="logits=False is for GPT2LMHeadModel"):
        patch(build("GPT2ForSequenceClassification"), logits=False)
    model.transformer.h[0].__class__ = type("Wrapped", (type(model.transformer.h[0]),), {})
    with pytest.raises(Error, match=r"transformer\.h\.0 is now"):
        unpatch(model)


def test_what_something_else_replaced_is_left_alone_and_named() -> None:
    model, ids = build(), torch.randint(1, 211, (1, 9))
    model.transformer.ln_f.forward = lambda x: x * 0
    report = patch(model)
    assert float(model(ids).logits.detach().abs().max()) == 0
    assert report.skipped == ["transformer.ln_f: something else has replaced its forward"] and "not patched" in str(report)
    own = build()
    own.loss_function = lambda logits, labels, **_: logits.sum() * 0 + 7
    patch(own)
    assert float(own(ids, labels=ids).loss) == 7


def test_the_report_names_ops_backends_and_reasons() -> None:
    model, ids = build(activation_function="relu"), torch.randint(1, 211, (1, 9))
    report = patch(model)
    assert str(report) == "no op was called yet"
    model(ids)
    choice = {row["op"]: row["choice"] for row in backend.table()}
    assert f"attention x 2 ({choice['attention']})" in str(report) and "left to transformers x 2: activation ReLU" in str(report)
    assert not dataclasses.is_dataclass(report)
