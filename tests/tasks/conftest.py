"""A small base model, and sentences with a mood that it can learn to tell."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gptfast import cli
from gptfast.config import GPT2Config
from gptfast.model import GPT2LMHeadModel
from gptfast.tokenizer import GPT2Tokenizer

MOODS = {"good": ["lovely", "brilliant", "warm", "funny"], "bad": ["dull", "awful", "stale", "clumsy"]}
NOUNS = ["film", "plot", "story", "cast", "score", "scene", "book", "joke", "song"]
Run = Callable[..., tuple[int, str, str]]


def _sentences(count: int, seed: int) -> list[tuple[str, str]]:
    """(text, label), no two alike."""
    every = [
        (f"the {noun} and the {other} of it is {word}", label)
        for label, words in MOODS.items() for word, noun, other in itertools.product(words, NOUNS, NOUNS)
    ]  # fmt: skip
    return random.Random(seed).sample(every, count)


@pytest.fixture(scope="session")
def sentences() -> Callable[[int, int], list[tuple[str, str]]]:
    """sentences(count, seed) -> [(text, label)]; no two of them alike."""
    return _sentences


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of two narrow blocks with random weights."""
    folder = tmp_path_factory.mktemp("tasks") / "base"
    tokenizer = GPT2Tokenizer.train([text for text, _ in _sentences(400, 0)] + ["User: Assistant: ### System\n"] * 20, 330)
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    config = GPT2Config(
        len(tokenizer), 64, 32, 2, 2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=end, eos_token_id=end,
        initializer_range=0.1,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def moods(tmp_path: Path) -> Path:
    """200 labelled sentences as .tsv."""
    path = tmp_path / "moods.tsv"
    path.write_text("".join(f"{text}\t{label}\n" for text, label in _sentences(200, 1)))
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """run("predict", folder, ...) -> (exit code, standard output, standard error)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call
