"""LoRA: what is trained, what merging gives, peft's files in and out, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gptfast import Error, LoadError, cli
from gptfast.checkpoint import read_tensors, write_tensors
from gptfast.config import GPT2Config, LoraConfig
from gptfast.layers import Conv1D
from gptfast.model import GPT2ForSequenceClassification, GPT2LMHeadModel
from gptfast.tokenizer import GPT2Tokenizer
from gptfast.training import lora

ALL = ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj")


def model(kind: Any = GPT2LMHeadModel, **more: Any) -> Any:
    torch.manual_seed(0)
    return kind(GPT2Config(96, 24, 32, 2, 4, initializer_range=0.3, num_labels=3, **more)).eval()


def adapted(kind: Any = GPT2LMHeadModel, targets: tuple[str, ...] = ALL, rank: int = 4, **more: Any) -> Any:
    """A model with adapters that do something."""
    made = model(kind, **more)
    lora.apply(made, LoraConfig(rank, 2.0 * rank, targets))
    for module in lora.adapters(made).values():
        torch.nn.init.normal_(module.lora_B, std=0.2)
    return made


IDS = torch.arange(40).view(2, 20) * 7 % 96


@pytest.mark.parametrize("activation", ["gelu_new", "relu"])
@pytest.mark.parametrize("matrix", ALL)
def test_every_target_counts_and_merges(matrix: str, activation: str) -> None:
    plain = model(activation_function=activation)
    made = adapted(targets=(matrix,), activation_function=activation)
    with torch.no_grad():
        before, with_adapter = plain(IDS).logits, made(IDS).logits
        lora.merge(made)
        merged = made(IDS).logits
    assert not lora.adapters(made) and all(type(m) is Conv1D for m in made.modules() if isinstance(m, Conv1D))
    assert (with_adapter - before).abs().max() > 0.05, "the adapter does something"
    assert (with_adapter - merged).abs().max() <= 1e-5 * with_adapter.abs().max().clamp(min=1)


def test_a_new_adapter_changes_nothing_and_is_all_that_is_trained() -> None:
    made = model(GPT2ForSequenceClassification)
    before = made(IDS, attention_mask=torch.ones_like(IDS)).logits
    lora.apply(made, LoraConfig(lora_targets=("c_proj",)))
    assert torch.allclose(made(IDS, attention_mask=torch.ones_like(IDS)).logits, before, atol=1e-6)
    trained = {name for name, parameter in made.named_parameters() if parameter.requires_grad}
    parts = (f"{layer}.{part}" for layer in (0, 1) for part in ("attn", "mlp"))
    places = {f"transformer.h.{part}.c_proj.lora_{matrix}" for part in parts for matrix in "AB"}
    assert trained == places | {"score.weight"}
    made(IDS, attention_mask=torch.ones_like(IDS), labels=torch.tensor([0, 1])).loss.backward()
    assert {name for name, parameter in made.named_parameters() if parameter.grad is not None} == trained


@pytest.mark.parametrize("kind", [GPT2LMHeadModel, GPT2ForSequenceClassification])
def test_files_round_trip(tmp_path: Path, kind: Any) -> None:
    made = adapted(kind)
    lora.save(made, tmp_path, LoraConfig(4, 8.0, ALL), "the/base")
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values["fan_in_fan_out"] and values["r"] == 4 and values["base_model_name_or_path"] == "the/base"
    other = model(kind)
    lora.load(other, tmp_path)
    mask = torch.ones_like(IDS)
    with torch.no_grad():
        assert torch.equal(made(IDS, attention_mask=mask).logits, other(IDS, attention_mask=mask).logits)


def test_convert_merges_an_adapter_into_its_model(tmp_path: Path) -> None:
    base = model()
    base.save_pretrained(tmp_path / "base")
    GPT2Tokenizer.train(["x"], 257).save_pretrained(tmp_path / "base")
    made = adapted()
    lora.save(made, tmp_path / "adapter", LoraConfig(4, 8.0, ALL), str(tmp_path / "base"))
    assert cli.main(["convert", str(tmp_path / "adapter"), "--out", str(tmp_path / "out")]) == 0
    with torch.no_grad():
        expected, found = made(IDS).logits, GPT2LMHeadModel.from_pretrained(tmp_path / "out")(IDS).logits
    assert torch.allclose(expected, found, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"rank_pattern": {"c_attn": 2}}, "rank_pattern is"),
        ({"lora_alpha": None}, "lora_alpha is None"),
    ],
)
def test_adapters_of_another_kind(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    lora.save(adapted(), tmp_path, LoraConfig(4, 8.0, ALL), "the/base")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(LoadError, match=message) as caught:
        lora.load(model(), tmp_path)
    assert str(path) in str(caught.value)


def test_adapters_of_another_model(tmp_path: Path) -> None:
    lora.save(adapted(GPT2ForSequenceClassification), tmp_path, LoraConfig(4, 8.0, ALL), "the/base")
    with pytest.raises(LoadError, match=r"score\.weight of shape \(3, 32\) belongs to no part"):
        lora.load(model(), tmp_path)
    lora.save(adapted(), tmp_path, LoraConfig(4, 8.0, ALL), "the/base")
    with pytest.raises(LoadError, match=r"A \[4, 32\] and B \[96, 4\]; \[r, 48\] and \[144, r\] are needed"):
        lora.load(GPT2LMHeadModel(GPT2Config(96, 24, 48, 2, 4)), tmp_path)
    with pytest.raises(LoadError, match=r"h\.1\.attn\.c_attn is no matrix"):
        lora.load(GPT2LMHeadModel(GPT2Config(96, 24, 32, 1, 4)), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in read_tensors(path).items()}  # not a map of the file that is rewritten
    key = next(name for name in tensors if "lora_B" in name)
    write_tensors(path, {name: tensor for name, tensor in tensors.items() if name != key})
    with pytest.raises(LoadError, match="only one of lora_A and lora_B"):
        lora.load(model(), tmp_path)
    write_tensors(path, {**tensors, "base_model.model.transformer.wte.lora_embedding_A": torch.zeros(4, 96)})
    with pytest.raises(LoadError, match=r"wte\.lora_embedding_A is neither"):
        lora.load(model(), tmp_path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(LoadError, match="not a safetensors file"):
        lora.load(model(), tmp_path)
    path.unlink()
    with pytest.raises(LoadError, match=r"has no adapter_model\.safetensors"):
        lora.load(model(), tmp_path)


def test_values_that_make_no_adapter() -> None:
    for values in ({"lora_rank": 0}, {"lora_alpha": -1.0}):
        with pytest.raises(Error, match="allowed: at least"):
            LoraConfig(**values)
    with pytest.raises(Error, match="--lora-targets is empty"):
        lora.apply(model(), LoraConfig(lora_targets=()))
