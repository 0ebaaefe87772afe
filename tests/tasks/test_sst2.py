"""bench/tasks/sst2.py: no sentence of the development set is in what a model learns from."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from gptfast import data
from gptfast.tokenizer import GPT2Tokenizer


@pytest.fixture(scope="module")
def sst2() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_sst2", Path(__file__).parents[2] / "bench/tasks/sst2.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _leaks(sst2: ModuleType, documents: list[str], dev: list[str]) -> list[str]:
    """The sentences of dev that are a document, or that stand in one (short ones stand in many by chance)."""
    bare = [sst2.plain(text) for text in documents]
    whole, every = set(bare), "|".join(bare)
    return [text for text in map(sst2.plain, dev) if text in whole or (len(text) >= 20 and text in every)]


def test_no_development_sentence_in_any_shard(sst2: ModuleType, data_file: Callable[[str], Path], tmp_path: Path) -> None:
    folder = data_file("sst2/dev.tsv").parents[1]
    data_file("sst2/train.tsv"), data_file("wikitext2-valid.txt")
    sst2.prepare(folder, tmp_path, sst2.QUICK)
    tokenizer = GPT2Tokenizer.from_pretrained(tmp_path / "shards")
    documents: list[str] = []
    for split in data.SPLITS:
        shard = data.load(tmp_path / "shards", split)
        documents += tokenizer.decode(shard.read(0, len(shard)).tolist()).split("<|endoftext|>")
    dev = [text for text, _ in sst2.sentences(folder / "sst2/dev.tsv")]
    assert len(dev) > 800 and len(documents) > 8000
    assert _leaks(sst2, documents, dev) == []
    assert _leaks(sst2, [*documents, dev[3]], dev) and _leaks(sst2, [f"x {max(dev, key=len)} y"], dev), "a leak would be seen"
    learned = [text for text, _ in sst2.sentences(tmp_path / "train.tsv")]
    assert len(learned) == sst2.QUICK.examples and _leaks(sst2, learned, dev) == []
