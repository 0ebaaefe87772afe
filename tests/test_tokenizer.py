"""The tokenizer: known ids, exact decoding, special tokens, padding, files in every form, damaged files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptfast import Error, GPT2Tokenizer, LoadError
from gptfast.tokenizer import BYTE_OF

END = "<|endoftext|>"
CORPUS = ["the cat sat on the mat, and the dog sat on the cat.", "Hello, my dog is cute", "naïve café — 你好"] * 20


@pytest.fixture(scope="module")
def trained() -> GPT2Tokenizer:
    return GPT2Tokenizer.train(CORPUS, 300)


@pytest.fixture(scope="module")
def folder(trained: GPT2Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    trained.save_pretrained(path)
    return path


def test_gpt2s_ids(data_file: Any) -> None:
    data_file("gpt2/merges.txt")
    tokenizer = GPT2Tokenizer.from_pretrained(data_file("gpt2/vocab.json").parent)
    assert len(tokenizer) == tokenizer.vocab_size == 50257
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id == 50256
    # OpenAI's encoder gives these
    assert tokenizer.encode("Hello, my dog is cute") == [15496, 11, 616, 3290, 318, 13779]
    assert tokenizer.encode("hello 👋 world 🌍") == [31373, 50169, 233, 995, 12520, 234, 235]
    assert tokenizer.encode(f"a{END}", allow_special=True) == [64, 50256]
    assert tokenizer.encode(END) == [27, 91, 437, 1659, 5239, 91, 29]


def test_byte_alphabet_is_a_bijection() -> None:
    assert sorted(BYTE_OF.values()) == list(range(256)) and BYTE_OF["Ġ"] == ord(" ") and BYTE_OF["Ċ"] == ord("\n")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_decoding_gives_the_text_back(text: str) -> None:
    tokenizer = _small()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.token_bytes(index) for index in ids) == text.encode()


_cached: list[GPT2Tokenizer] = []


def _small() -> GPT2Tokenizer:
    if not _cached:
        _cached.append(GPT2Tokenizer.train(CORPUS, 300))
    return _cached[0]


def test_bytes_that_are_no_text_decode_to_replacement_characters(trained: GPT2Tokenizer) -> None:
    half = next(index for index in range(300) if trained.token_bytes(index) == b"\xc3")
    assert trained.decode([half]) == "�" and trained.decode(half) == "�"


def test_special_tokens_in_a_text_stay_text(trained: GPT2Tokenizer) -> None:
    text = f"the cat{END} sat"
    assert trained.eos_token_id not in trained.encode(text)
    special = trained.encode(text, allow_special=True)
    assert special.count(trained.eos_token_id) == 1
    assert trained.eos_token_id not in trained.encode(text)  # and stay so after a call that allowed them
    assert trained.decode(special) == trained.decode(trained.encode(text)) == text
    assert trained.decode(special, skip_special_tokens=True) == "the cat sat"
    assert trained(text, allow_special=True).input_ids == special and trained(text).input_ids == trained.encode(text)


def test_tensors_and_batches(trained: GPT2Tokenizer) -> None:
    ids = trained.encode("the cat", return_tensors="pt")
    assert ids.dtype == torch.int64 and ids.shape == (1, len(trained.encode("the cat")))
    assert trained.encode("", return_tensors="pt").shape == (1, 0) and trained.encode("") == []
    one = trained("the cat")
    assert one.input_ids == one["input_ids"] == ids[0].tolist() and one.attention_mask == [1] * ids.shape[1]
    both = trained(["the cat", "the cat sat on"], padding=True, return_tensors="pt").to("cpu")
    assert both.input_ids[0, ids.shape[1]] == trained.pad_token_id and torch.equal(both.input_ids[0, : ids.shape[1]], ids[0])
    assert both.attention_mask.sum(1).tolist() == [ids.shape[1], len(trained.encode("the cat sat on"))]
    assert trained.batch_decode(both.input_ids, skip_special_tokens=True) == ["the cat", "the cat sat on"]
    assert set({**both}) == {"input_ids", "attention_mask"}


def test_padding_side_truncation_and_width() -> None:
    tokenizer = GPT2Tokenizer.train(CORPUS, 300)
    tokenizer.padding_side = "left"
    rows = tokenizer(["the cat sat on the mat", "a"], padding="max_length", truncation=True, max_length=4)
    assert [len(row) for row in rows.input_ids] == [4, 4] and rows.attention_mask[1] == [0, 0, 0, 1]
    assert rows.input_ids[0] == tokenizer.encode("the cat sat on the mat")[:4]
    tokenizer.pad_token = "a"
    assert tokenizer(["the cat", "a"], padding=True).input_ids[1][0] == tokenizer.encode("a")[0]


def test_training_is_reproducible_and_puts_special_tokens_last(trained: GPT2Tokenizer) -> None:
    again = GPT2Tokenizer.train(iter(CORPUS), 300)
    assert again.fingerprint() == trained.fingerprint() != GPT2Tokenizer.train(CORPUS, 290).fingerprint()
    assert len(trained) == 300 and trained.eos_token_id == 299
    assert len(trained.encode("the cat sat")) < len("the cat sat")
    several = GPT2Tokenizer.train(CORPUS, 300, ("<|end|>", "<|pad here|>"))
    assert several.eos_token == "<|end|>" and several.token_bytes(299) == b"<|pad here|>"
    with pytest.raises(Error, match="vocab_size is 256"):
        GPT2Tokenizer.train(CORPUS, 256)


@pytest.mark.parametrize("form", ["tokenizer.json", "vocab.json"])
def test_both_file_forms_give_the_same_tokenizer(form: str, folder: Path, trained: GPT2Tokenizer, tmp_path: Path) -> None:
    files = {"tokenizer.json": ["tokenizer.json"], "vocab.json": ["vocab.json", "merges.txt"]}[form]
    for name in [*files, "tokenizer_config.json"]:
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    read = GPT2Tokenizer.from_pretrained(tmp_path)
    assert read.fingerprint() == trained.fingerprint() and read.eos_token_id == trained.eos_token_id
    text = "Hello, the cat — 你好"
    assert read.encode(text) == trained.encode(text)


def test_settings_survive_saving(tmp_path: Path) -> None:
    tokenizer = GPT2Tokenizer.train(CORPUS, 300, (END, "<|pad|>"))
    tokenizer.pad_token, tokenizer.padding_side, tokenizer.model_max_length = "<|pad|>", "left", 77
    tokenizer.save_pretrained(tmp_path)
    read = GPT2Tokenizer.from_pretrained(tmp_path)
    assert (read.pad_token_id, read.padding_side, read.model_max_length) == (299, "left", 77)
    assert read.fingerprint() == tokenizer.fingerprint()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json"}


def test_words_added_to_a_vocabulary_are_recognised_in_every_text(folder: Path, tmp_path: Path) -> None:
    whole = json.loads((folder / "tokenizer.json").read_text())
    whole["added_tokens"].append({**whole["added_tokens"][0], "id": 300, "content": "catdog", "special": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    tokenizer = GPT2Tokenizer.from_pretrained(tmp_path)
    assert 300 in tokenizer.encode("a catdog") and tokenizer.decode([300], skip_special_tokens=True) == "catdog"
    assert 299 not in tokenizer.encode(END)


@pytest.mark.parametrize(
    ("line", "call"),
    [
        ("half of a surrogate pair, U+D800 at character 2", lambda t: t.encode("ab\ud800")),
        ("text is a int", lambda t: t.encode(3)),
        ("text is a NoneType", lambda t: t(["a", None])),
        ("return_tensors is 'tf'; allowed", lambda t: t.encode("a", return_tensors="tf")),
        ("rows of 1 and 2 tokens", lambda t: t(["a", "a%"], return_tensors="pt")),
        ("need max_length", lambda t: t("a", truncation=True)),
        ("padding is 'wide'", lambda t: t("a", padding="wide")),
        ("token id 300 is not in the vocabulary; allowed: 0 to 299", lambda t: t.decode([300])),
        ("token id -1", lambda t: t.decode([-1])),
        ("batch_decode takes several", lambda t: t.decode([[1]])),
        ("pad_token is 'zzz'", lambda t: setattr(t, "pad_token", "zzz")),
    ],
)
def test_wrong_calls_are_named(trained: GPT2Tokenizer, line: str, call: Any) -> None:
    with pytest.raises(Error) as caught:
        call(trained)
    assert line in str(caught.value) and "\n" not in str(caught.value)


def _edit(**changes: Any) -> Any:
    def change(folder: Path) -> None:
        path = folder / "tokenizer.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def _without(name: str, change: Any) -> Any:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        change(folder)

    return apply


def _vocabulary(change: Any) -> Any:
    def apply(folder: Path) -> None:
        path = folder / "vocab.json"
        words = json.loads(path.read_text())
        change(words)
        path.write_text(json.dumps(words))

    return _without("tokenizer.json", apply)


@pytest.mark.parametrize(
    ("line", "damage"),
    [
        ("not a plain BPE", _edit(model={"type": "Unigram"})),
        ("no vocab and merges", _edit(model={"type": "BPE", "vocab": []})),
        ("not GPT-2's", _edit(normalizer={"type": "NFC"})),
        ("not GPT-2's", _edit(pre_tokenizer={"type": "Whitespace"})),
        ("an added token is", _edit(added_tokens=[{"id": "x", "content": "a"}])),
        ("the next free one", _edit(added_tokens=[{"id": 9999, "content": "new", "special": True}])),
        ("not readable JSON", lambda folder: (folder / "tokenizer.json").write_text("{")),
        ("not readable JSON", lambda folder: (folder / "tokenizer.json").write_text("[" * 100000)),
        ("no token for the byte 97", _vocabulary(lambda words: words.pop("a"))),
        ("the id 1 twice", _vocabulary(lambda words: words.update(b=1, a=1))),
        ("the id 'x'", _vocabulary(lambda words: words.update(a="x"))),
        ("no byte-level BPE", _vocabulary(lambda words: words.update({"two words": 1000}))),
        ("merges do not fit", _vocabulary(lambda words: words.pop("he", None) or words.pop("th", None) or words.pop("at"))),
        ("two tokens are needed", _without("tokenizer.json", lambda folder: (folder / "merges.txt").write_text("a b c\n"))),
        ("merges.txt cannot be read", _without("tokenizer.json", lambda folder: (folder / "merges.txt").unlink())),
        ("has no vocab.json", _without("tokenizer.json", lambda folder: (folder / "vocab.json").unlink())),
        ("add_bos_token", lambda folder: (folder / "tokenizer_config.json").write_text('{"add_bos_token": true}')),
    ],
)
def test_damaged_files_are_named(folder: Path, tmp_path: Path, line: str, damage: Any) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damage(tmp_path)
    with pytest.raises(LoadError) as caught:
        GPT2Tokenizer.from_pretrained(tmp_path)
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_random_damage_gives_load_errors_or_a_working_tokenizer(folder: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    outcomes = set()
    for _ in range(150):
        name = draw.choice(["tokenizer.json", "tokenizer.json", "tokenizer_config.json"])
        good = (folder / name).read_bytes()
        bad = bytearray(good)
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(len(bad))
            written = bytes(draw.choice(b'0"{}[],:x\xff') for _ in range(draw.randint(0, 3)))
            bad[place : place + draw.choice([0, 1, 1, 40])] = written
        (tmp_path / name).write_bytes(bytes(bad))
        try:
            outcomes.add(GPT2Tokenizer.from_pretrained(tmp_path).decode([65]) is not None)
        except Error:
            outcomes.add(False)
        (tmp_path / name).write_bytes(good)
    assert outcomes == {True, False}
