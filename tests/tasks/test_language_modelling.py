"""Evaluation of a language model on a data folder, a text file and documents."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from gptfast import Error, data
from gptfast.config import GPT2Config
from gptfast.model import GPT2LMHeadModel
from gptfast.tasks.language_modelling import evaluate
from gptfast.tokenizer import GPT2Tokenizer

TEXTS = [f"number {n} is written {n * 7}, é\n" * 5 for n in range(30)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = GPT2Tokenizer.train(TEXTS, 290)
    torch.manual_seed(0)
    config = GPT2Config(len(tokenizer), 16, 16, 1, 2, eos_token_id=tokenizer.eos_token_id, initializer_range=0.3)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def by_hand(folder: Path, ids: list[int]) -> float:
    """-log P of ids[1:], each from the first of the windows of 16 tokens, 8 apart, that predicts it."""
    model, total, done = GPT2LMHeadModel.from_pretrained(folder), 0.0, 0
    for start in range(0, len(ids), 8):
        window = torch.tensor([ids[start : start + 17]])
        if done >= len(ids) - 1:
            break
        with torch.no_grad():
            logs = torch.log_softmax(model(window[:, :-1]).logits[0].double(), -1)
        for place in range(window.shape[1] - 1):
            if start + place >= done:
                total -= float(logs[place, window[0, place + 1]])
                done += 1
    assert done == len(ids) - 1
    return total


def test_a_text_file_is_one_document(tmp_path: Path, model: Path) -> None:
    text = "".join(TEXTS[:4])
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    result = evaluate(model, tmp_path / "text.txt")
    tokenizer = GPT2Tokenizer.from_pretrained(model)
    expected = by_hand(model, [tokenizer.eos_token_id or 0, *tokenizer.encode(text)])
    assert result["bytes"] == len(text.encode()) and result["tokens"] == len(tokenizer.encode(text)) and result["stride"] == 8
    assert result["bits_per_byte"] == pytest.approx(expected / math.log(2) / len(text.encode()), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(expected / result["tokens"]), rel=1e-5)


def test_documents_are_scored_one_by_one(tmp_path: Path, model: Path) -> None:
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS[:3]))
    tokenizer = GPT2Tokenizer.from_pretrained(model)
    expected = sum(by_hand(model, [tokenizer.eos_token_id or 0, *tokenizer.encode(text)]) for text in TEXTS[:3])
    result = evaluate(model, tmp_path / "text.jsonl")
    assert result["loss"] * result["tokens"] == pytest.approx(expected, rel=1e-5)


def test_a_data_folder_is_scored_on_its_held_out_split(tmp_path: Path, model: Path) -> None:
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    data.prepare([tmp_path / "text.jsonl"], tmp_path / "data", model, val=0.3, progress=False)
    held_out = data.load(tmp_path / "data", "val")
    result = evaluate(model, tmp_path / "data")
    expected = by_hand(model, held_out.read(0, len(held_out)).tolist())
    assert result["loss"] * result["tokens"] == pytest.approx(expected, rel=1e-5) and result["bytes"] == held_out.bytes
    data.prepare([tmp_path / "text.jsonl"], tmp_path / "other", train_tokenizer=280, progress=False)
    with pytest.raises(Error, match="prepared with another tokenizer"):
        evaluate(model, tmp_path / "other")


def test_bad_input(tmp_path: Path, model: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    for name, message in (("empty.txt", "no text to evaluate on"), ("nothing", "no such file"), ("", "no dataset")):
        with pytest.raises(Error, match=message):
            evaluate(model, tmp_path / name)
    with pytest.raises(Error, match="dtype is 'fp8'"):
        evaluate(model, tmp_path / "empty.txt", dtype="fp8")
