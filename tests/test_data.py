"""Text to shards and back: nothing lost, documents dealt by their text, and one typed error for whatever is wrong on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptfast import Error, LoadError, data, shards
from gptfast.tokenizer import GPT2Tokenizer

LINES = [f"line {n}: the quick brown fox counts to {n * n % 97}\n" for n in range(3000)]


@pytest.fixture(scope="module")
def tokenizer() -> GPT2Tokenizer:
    return GPT2Tokenizer.train(LINES, 400)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "input.txt"
    path.write_text("".join(LINES), newline="")
    return path


def documents(folder: Path, split: str) -> list[str]:
    """The texts between the <|endoftext|> of a split."""
    tokenizer, ids = GPT2Tokenizer.from_pretrained(folder), data.load(folder, split)
    all_ids = ids.read(0, len(ids)).tolist()
    eos = tokenizer.eos_token_id
    assert all_ids[0] == all_ids[-1] == eos
    parts: list[list[int]] = [[]]
    for token in all_ids[1:]:
        if token == eos:
            parts.append([])
        else:
            parts[-1].append(token)
    assert parts.pop() == []
    return [tokenizer.decode(part) for part in parts]


def test_a_text_file_is_split_and_nothing_is_lost(tmp_path: Path, text: Path, tokenizer: GPT2Tokenizer) -> None:
    meta = data.prepare([text], tmp_path / "out", tokenizer, val=0.2, progress=False)
    found = {split: documents(tmp_path / "out", split) for split in data.SPLITS}
    assert sum(map(len, found["train"])) + sum(map(len, found["val"])) == len("".join(LINES))
    assert sorted(line for texts in found.values() for t in texts for line in t.splitlines(True)) == sorted(LINES)
    share = sum(map(len, found["val"])) / len("".join(LINES))
    assert 0.05 < share < 0.4
    for split in data.SPLITS:
        assert meta[split]["documents"] == len(found[split])
        assert meta[split]["bytes"] == sum(len(t.encode()) for t in found[split])
        assert meta[split]["tokens"] == len(data.load(tmp_path / "out", split))
    again = data.prepare([text], tmp_path / "again", tokenizer, val=0.2, progress=False)
    assert again == meta


def test_jsonl_documents_are_dealt_by_their_text(tmp_path: Path, tokenizer: GPT2Tokenizer) -> None:
    texts = [f"document {n} <|endoftext|> {n}" for n in range(200)] + ["twice é 🌍"] * 3
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.jsonl").write_text("\n\n".join(json.dumps({"text": t, "id": 1}) for t in texts))
    (tmp_path / "sub/ignored.bin").write_bytes(b"\xff")
    data.prepare([tmp_path / "sub"], tmp_path / "out", tokenizer, val=0.3, progress=False)
    train, val = (documents(tmp_path / "out", split) for split in data.SPLITS)
    assert sorted(train + val) == sorted(texts)  # what looks like a special token stayed text
    assert not set(train) & set(val)
    assert all(data.deal(t, 0.3) == "val" for t in val) and 30 < len(val) < 90
    assert data.deal("x", 0.0) == "train"


def test_a_new_tokenizer_is_trained_on_the_training_split(tmp_path: Path, text: Path) -> None:
    meta = data.prepare([text], tmp_path / "out", train_tokenizer=300, progress=False)
    assert meta["vocab_size"] == 300 == len(GPT2Tokenizer.from_pretrained(tmp_path / "out"))
    assert meta["vocabulary"] == GPT2Tokenizer.from_pretrained(tmp_path / "out").fingerprint()


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab \n\t\r'é1", max_size=400), st.integers(3, 40), st.integers(1, 50))
def test_cutting_text_does_not_change_its_tokens(body: str, size: int, block: int) -> None:
    tokenizer = GPT2Tokenizer.train(["ab ab\n\nab 'a é1 1 1\n a"], 280)
    pieces = list(data.cut((body[n : n + block] for n in range(0, len(body), block)), size))
    assert "".join(pieces) == body
    if all(len(piece) < 16 * size for piece in pieces[:-1]) and all(piece[-1:] == "\n" for piece in pieces[:-1]):
        assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(body)


def test_a_line_without_end_is_cut_anyway() -> None:
    pieces = list(data.cut(iter(["x" * 50] * 100), 10))
    assert "".join(pieces) == "x" * 5000 and max(map(len, pieces)) < 260


def test_shards_are_cut_and_read_as_one(tmp_path: Path) -> None:
    facts = {"dtype": "uint32", "vocab_size": 70000, "vocabulary": "0" * 64, "eos_token_id": 1}
    writer = data.ShardWriter(tmp_path, "train", facts, shard_tokens=100)
    ids = np.random.default_rng(0).integers(0, 70000, 1050)
    for start in range(0, 1050, 37):
        writer.write(ids[start : start + 37])
    split = writer.close()
    assert [shard["tokens"] for shard in split["shards"]] == [100] * 10 + [50]
    empty = {"tokens": 0, "documents": 0, "bytes": 0, "shards": []}
    meta = {"format": "gptfast-dataset", "version": 1, **facts, "train": split, "val": empty}
    (tmp_path / "dataset.json").write_text(json.dumps(meta))
    loaded = data.load(tmp_path)
    assert len(loaded) == 1050 and np.array_equal(loaded.read(0, 1050), ids) and np.array_equal(loaded.read(95, 210), ids[95:305])
    assert len(data.load(tmp_path, "val")) == 0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n\n{"text": ', r"a\.jsonl, line 3: not JSON"),
        ("a.jsonl", '{"text": "x"}\n["text"]', r'a\.jsonl, line 2: an object with a string "text"'),
        ("a.jsonl", '{"text": 1}', r"a\.jsonl, line 1: an object"),
        ("a.jsonl", "\n", "the corpus is empty"),
        ("a.txt", "", "the corpus is empty"),
        ("a.txt", b"abc \xff def", r"a\.txt: not UTF-8 text \(byte 0xff at offset 4\)"),
        ("a.pdf", "x", r"a\.pdf: allowed are \.txt, \.jsonl, \.csv"),
    ],
)
def test_bad_input_leaves_nothing_behind(
    tmp_path: Path, tokenizer: GPT2Tokenizer, name: str, content: str | bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(Error, match=message):
        data.prepare([path], tmp_path / "out", tokenizer, progress=False)
    assert sorted(tmp_path.iterdir()) == [path]


def test_arguments_that_cannot_work(tmp_path: Path, text: Path, tokenizer: GPT2Tokenizer) -> None:
    with pytest.raises(LoadError, match="no such file or folder"):
        data.prepare([tmp_path / "nothing"], tmp_path / "out", tokenizer)
    with pytest.raises(Error, match=r"not empty.*--out"):
        data.prepare([text], tmp_path, tokenizer)
    with pytest.raises(Error, match="not both"):
        data.prepare([text], tmp_path / "out", tokenizer, train_tokenizer=300)
    with pytest.raises(Error, match="val is 1"):
        data.prepare([text], tmp_path / "out", tokenizer, val=1.0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(Error, match=r"no \.txt, \.jsonl, .* file in it"):
        data.prepare([tmp_path / "empty"], tmp_path / "out", tokenizer)
    (tmp_path / "one.txt").write_text("one document")
    with pytest.raises(Error, match="every document was held out"):
        data.prepare([tmp_path / "one.txt"], tmp_path / "out", tokenizer, val=0.999999)
    with pytest.raises(LoadError, match=r"no dataset\.json in it"):
        data.load(tmp_path)


def _header(change: Callable[[dict[str, object]], None]) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        path = folder / "train_00000.bin"
        content = path.read_bytes()
        facts = json.loads(content[len(data.MAGIC) : data.HEADER])
        change(facts)
        path.write_bytes((data.MAGIC + json.dumps(facts).encode()).ljust(data.HEADER) + content[data.HEADER :])

    return harm


def _meta(**changes: object) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        path = folder / "dataset.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return harm


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


HARM: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda f: (f / "train_00000.bin").write_bytes((f / "train_00000.bin").read_bytes()[:-3]), "truncated or damaged"),
    "short header": (lambda f: (f / "train_00000.bin").write_bytes(b"gptfast-shard\n{}"), "its header is damaged"),
    "not a shard": (lambda f: (f / "train_00000.bin").write_bytes(b"x" * 5000), "its header is damaged"),
    "gone": (lambda f: (f / "train_00000.bin").unlink(), "No such file"),
    "other tokenizer": (_header(lambda facts: facts.update(vocabulary="1" * 64)), "made with another tokenizer"),
    "newer": (_header(lambda facts: facts.update(version=2)), "version 2, this gptfast reads 1"),
    "newer set": (_meta(version=7), "version 7, this gptfast reads 1"),
    "other format": (_meta(format="x"), "not a gptfast data set"),
    "no split": (_meta(train=3), "malformed"),
    "outside": (_meta(train={"shards": [{"file": "../x.bin", "tokens": 1}]}), "outside the folder"),
    "altered": (lambda f: _flip(f / "train_00000.bin"), "SHA-256: altered or damaged"),
    "cut": (lambda f: (f / "dataset.json").write_text('{"form'), "not JSON"),
}


@pytest.mark.parametrize("harm", HARM)
def test_damaged_shards_are_refused(tmp_path: Path, text: Path, tokenizer: GPT2Tokenizer, harm: str) -> None:
    data.prepare([text], tmp_path / "out", tokenizer, progress=False)
    action, message = HARM[harm]
    action(tmp_path / "out")
    with pytest.raises(LoadError, match=message):
        data.load(tmp_path / "out")


def test_hashes_of_a_large_split_are_checked_on_request(
    tmp_path: Path, text: Path, tokenizer: GPT2Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = data.prepare([text], tmp_path / "out", tokenizer, progress=False)
    assert data.verify(tmp_path / "out") == meta
    _flip(tmp_path / "out/train_00000.bin")
    monkeypatch.setattr(shards, "_HASHED", 10)
    assert len(data.load(tmp_path / "out")) == meta["train"]["tokens"]
    for check in (lambda: data.load(tmp_path / "out", verify=True), lambda: data.verify(tmp_path / "out")):
        with pytest.raises(LoadError, match=r"train_00000\.bin: its ids do not have"):
            check()


def test_real_text(tmp_path: Path, data_file: Callable[[str], Path]) -> None:
    path = data_file("tinyshakespeare.txt")
    data.prepare([path], tmp_path / "out", train_tokenizer=600, progress=False)
    found = [t for split in data.SPLITS for t in documents(tmp_path / "out", split)]
    original = path.read_text(encoding="utf-8")
    assert sum(map(len, found)) == len(original) and all(t in original for t in found)
