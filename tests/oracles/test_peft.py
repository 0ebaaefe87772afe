"""LoRA files against peft on transformers' GPT-2: ours load there, peft's load here, and merged logits are equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gptfast import GPT2ForSequenceClassification, GPT2LMHeadModel
from gptfast.config import LoraConfig
from gptfast.training import lora

peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

TARGETS = ("c_attn", "attn.c_proj", "c_fc")
IDS = torch.arange(60).view(3, 20) * 11 % 96
KINDS = {
    "CAUSAL_LM": (GPT2LMHeadModel, transformers.GPT2LMHeadModel),
    "SEQ_CLS": (GPT2ForSequenceClassification, transformers.GPT2ForSequenceClassification),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def base(kind: str, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=96, n_positions=24, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, num_labels=3, pad_token_id=95,
        bos_token_id=95, eos_token_id=95, id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2},
    )  # fmt: skip
    KINDS[kind][1](config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS, attention_mask=torch.ones_like(IDS)).logits
    return found


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.shape == b.shape and float((a - b).abs().max()) <= 1e-5 * max(float(a.abs().max()), 1.0)


def test_ours_in_peft(kind: str, base: Path, tmp_path: Path) -> None:
    ours = KINDS[kind][0].from_pretrained(base)
    before = logits(ours)
    config = LoraConfig(4, 12.0, TARGETS)
    lora.apply(ours, config)
    for module in lora.adapters(ours).values():
        torch.nn.init.normal_(module.lora_B, std=0.3)
    if kind == "SEQ_CLS":
        torch.nn.init.normal_(ours.score.weight)
    lora.save(ours, tmp_path / "adapter", config, str(base))
    theirs = peft.PeftModel.from_pretrained(KINDS[kind][1].from_pretrained(base), str(tmp_path / "adapter"))
    expected = logits(ours)
    assert float((expected - before).abs().max()) > 0.1
    close(expected, logits(theirs))
    lora.merge(ours)
    close(logits(ours), logits(theirs.merge_and_unload()))


@pytest.mark.parametrize("rs", [False, True])
def test_pefts_in_ours(kind: str, base: Path, tmp_path: Path, rs: bool) -> None:
    torch.manual_seed(1)
    config = peft.LoraConfig(
        task_type=kind, r=4, lora_alpha=12, target_modules=list(TARGETS), fan_in_fan_out=True, use_rslora=rs, lora_dropout=0.1
    )
    theirs = peft.get_peft_model(KINDS[kind][1].from_pretrained(base), config)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name or ("modules_to_save" in name and "score" in name):
            torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = KINDS[kind][0].from_pretrained(base)
    lora.load(ours, tmp_path / "adapter")
    assert len(lora.adapters(ours)) == 6
    close(logits(theirs), logits(ours))
    lora.merge(ours)
    close(logits(theirs.merge_and_unload()), logits(ours))
