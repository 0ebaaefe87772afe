"""Against tiktoken, tokenizers and transformers: identical ids on 10^5 generated strings and on the data sets' texts."""

from __future__ import annotations

import gzip
import hashlib
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gptfast import GPT2Tokenizer

# tiktoken looks a file up under the SHA-1 of its address, and checks its content's SHA-256
CACHED = {
    "merges.txt": ("6d1cbeee0f20b3d9449abfede4726ed8212e3aee", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
    "vocab.json": ("6c7ea1a7e38e3a7f062df639a5b80947f075ffe6", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
}
COUNT = 100_000
SCRIPTS = {
    "latin": [*range(0x41, 0x5B), *range(0x61, 0x7B)] * 3 + [*range(0xC0, 0x180)],
    "greek, cyrillic": [*range(0x391, 0x3CA), *range(0x410, 0x450)],
    "chinese, japanese, korean": [*range(0x4E00, 0x9FA6), *range(0x3041, 0x30FF), *range(0xAC00, 0xB000)],
    "arabic, hebrew, hindi, thai": [*range(0x620, 0x64B), *range(0x5D0, 0x5EB), *range(0x904, 0x93A), *range(0xE01, 0xE3B)],
    "emoji": [*range(0x1F300, 0x1F650), *range(0x1F900, 0x1F9FF), 0x200D, 0xFE0F, *range(0x1F3FB, 0x1F400), 0x2764],
    "digits, signs": [*range(0x21, 0x41), *range(0x5B, 0x61), *range(0x7B, 0x7F), 0x660, 0x967, 0xBD, 0x20AC, 0x2014],
    "spaces": [0x20] * 6 + [0x0A, 0x0A, 0x0D, 0x09, 0xA0, 0x0B, 0x0C, 0x85, 0x2003, 0x2028, 0x3000, 0x200B, 0xFEFF],
    "any": [*range(0xD800), *range(0xE000, 0x11000), *range(0x20000, 0x20100), 0x10FFFF],
}
WORDS = ["don't", "I'll", "we've", "THEY'RE", "'s", " the", " 2024", "12345", "!!!", "  \n\n ", "http://a.b/c?d=1", "<|endoftext|>"]


def strings(count: int) -> Iterator[str]:
    """Strings of runs of one script each, so that the borders that GPT-2's pattern looks for are everywhere."""
    draw = random.Random(0)
    alphabets = [[chr(point) for point in points] for points in SCRIPTS.values()]
    for index in range(count):
        pieces = []
        for _ in range(draw.randint(0, 7)):
            if draw.random() < 0.15:
                pieces.append(draw.choice(WORDS))
            else:
                pieces.append("".join(draw.choices(draw.choice(alphabets), k=draw.randint(1, 6))) + " " * (draw.random() < 0.4))
        yield "".join(pieces) if index % 1000 else draw.choice(["a", " ", "\n", "好", "👍🏽", "7", "!?"]) * draw.randint(1, 2000)


@pytest.fixture(scope="module")
def folder(data_file: Callable[[str], Path]) -> Path:
    """The folder with GPT-2's merges.txt and vocab.json."""
    data_file("gpt2/merges.txt")
    return data_file("gpt2/vocab.json").parent


@pytest.fixture(scope="module")
def ours(folder: Path) -> GPT2Tokenizer:
    return GPT2Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def tiktoken(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """tiktoken's gpt2 encoding from the local files: they are the ones that it would download, which it verifies."""
    library = pytest.importorskip("tiktoken", reason="tiktoken is not installed")
    cache = tmp_path_factory.mktemp("tiktoken")
    for name, (address, content) in CACHED.items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != content:
            pytest.skip(f"{folder / name} is not OpenAI's file, so tiktoken cannot use it")
        shutil.copyfile(folder / name, cache / address)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        return library.get_encoding("gpt2")


@pytest.fixture(scope="module")
def tokenizers(folder: Path) -> Any:
    library = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    return library.ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))


@pytest.fixture(scope="module")
def generated(ours: GPT2Tokenizer) -> tuple[list[str], list[list[int]]]:
    texts = list(strings(COUNT))
    return texts, ours(texts).input_ids


def test_generated_strings_hold_every_script(generated: tuple[list[str], list[list[int]]]) -> None:
    found = set("".join(generated[0]))
    for script, points in SCRIPTS.items():
        wanted = {chr(point) for point in points}
        assert len(found & wanted) > 0.5 * len(wanted), script
    assert len(set(generated[0])) > 0.8 * COUNT


def test_generated_strings_against_tiktoken(generated: tuple[list[str], list[list[int]]], tiktoken: Any) -> None:
    texts, ids = generated
    assert tiktoken.encode_ordinary_batch(texts, num_threads=2) == ids


def test_generated_strings_against_tokenizers(generated: tuple[list[str], list[list[int]]], tokenizers: Any) -> None:
    texts, ids = generated
    assert [encoded.ids for encoded in tokenizers.encode_batch(texts)] == ids


def test_generated_strings_decode_to_themselves(generated: tuple[list[str], list[list[int]]], ours: GPT2Tokenizer) -> None:
    texts, ids = generated
    assert ours.batch_decode(ids) == texts


def test_random_ids_decode_as_elsewhere(ours: GPT2Tokenizer, tiktoken: Any, tokenizers: Any) -> None:
    draw = random.Random(1)
    for _ in range(3000):
        ids = [draw.randrange(50257) for _ in range(draw.randint(1, 12))]
        assert ours.decode(ids) == tiktoken.decode(ids)
        assert b"".join(map(ours.token_bytes, ids)) == tiktoken.decode_bytes(ids)
        if 50256 not in ids:
            assert ours.decode(ids) == tokenizers.decode(ids)


FILES = [
    "tinyshakespeare.txt", "wikitext2-valid.txt", "sst2/dev.tsv", "sst2/train.tsv",
    *(f"multi30k/{part}.{language}.gz" for part in ("val", "train") for language in ("de", "en", "fr")),
]


@pytest.mark.parametrize("name", FILES)
def test_data_sets(name: str, data_file: Callable[[str], Path], ours: GPT2Tokenizer, tiktoken: Any, tokenizers: Any) -> None:
    content = data_file(name).read_bytes()
    text = (gzip.decompress(content) if name.endswith(".gz") else content).decode("utf-8")
    ids = ours.encode(text)
    assert ids == tiktoken.encode_ordinary(text)
    part = text[:300_000]
    assert ours.encode(part) == tokenizers.encode(part).ids
    assert ours.decode(ids) == text


def test_transformers_loads_what_is_saved_here(ours: GPT2Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    trained = GPT2Tokenizer.train(["the cat sat on the mat", "你好 мир"] * 9, 330, ("<|end|>", "<|pad|>"))
    trained.pad_token, trained.padding_side = "<|pad|>", "left"
    texts = [*strings(500), "the cat sat", ""]
    for name, tokenizer in (("gpt2", ours), ("new", trained)):
        tokenizer.save_pretrained(tmp_path / name)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        assert len(theirs) == len(tokenizer) and theirs.eos_token_id == tokenizer.eos_token_id
        for text in texts:
            ids = theirs.encode(text)
            assert ids == tokenizer.encode(text, allow_special=True)
            assert theirs.decode(ids) == tokenizer.decode(ids) == text
        theirs.save_pretrained(tmp_path / f"{name}-again")
        again = GPT2Tokenizer.from_pretrained(tmp_path / f"{name}-again")
        assert again.fingerprint() == tokenizer.fingerprint() and again.eos_token_id == tokenizer.eos_token_id
    both = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")(["the cat", "a"], padding=True)
    assert both["input_ids"] == trained(["the cat", "a"], padding=True).input_ids
