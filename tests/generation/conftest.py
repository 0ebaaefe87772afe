"""A tiny model with spread-out weights and a tokenizer of 300 tokens, as a folder and loaded."""

from pathlib import Path

import pytest
import torch

from gptfast import Engine, GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. \N{GRINNING FACE} na\u00efve "


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tokenizer = GPT2Tokenizer.train([TEXT * 4], 300)
    tokenizer.save_pretrained(path)
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, bos_token_id=end,
        eos_token_id=end,
    )
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def model(folder: Path) -> GPT2LMHeadModel:
    return GPT2LMHeadModel.from_pretrained(folder)


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> GPT2Tokenizer:
    return GPT2Tokenizer.from_pretrained(folder)


@pytest.fixture
def engine(folder: Path):
    with Engine(folder, device="cpu") as opened:
        yield opened
