"""A tiny model with spread-out weights and a tokenizer of 300 tokens, as a folder and loaded, every engine on it, and runners of
every kind for the scheduler's tests."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import gptfast.backend as backend
from gptfast import Engine, GPT2Config, GPT2LMHeadModel, GPT2Tokenizer
from gptfast.generation.loading import cpp_reason
from gptfast.testing.generation import RUNNERS, make_runner, runner_reason, tiny

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


ENGINES = ("eager", "cpp-fp32", "cpp-bf16", "cpp-int8", "cpp-int4")


@contextmanager
def opened(name: str, folder: Path) -> Iterator[Engine]:
    """One of ENGINES on a folder; skips where it does not run."""
    if name == "eager":
        with backend.use("eager"), Engine(folder, device="cpu") as engine:
            yield engine
        return
    dtype = name.removeprefix("cpp-")
    reason = cpp_reason(dtype, "cpu")
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    with Engine(folder, dtype, device="cpu") as engine:
        assert engine.describe().startswith("cpp")
        yield engine


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[Engine]:
    """Every engine, on the tiny model."""
    with opened(request.param, folder) as one:
        yield one


@pytest.fixture(params=ENGINES)
def open_on(request: pytest.FixtureRequest) -> Callable[[Path], object]:
    """open_on(folder): every engine on another model, to be used with `with`."""
    return lambda folder: opened(request.param, folder)


@pytest.fixture(scope="session")
def tiny_model() -> GPT2LMHeadModel:
    return tiny()


@pytest.fixture(params=RUNNERS)
def kind(request: pytest.FixtureRequest) -> str:
    """The name of a runner of every kind that runs here."""
    reason = runner_reason(request.param)
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def make(kind: str, tiny_model: GPT2LMHeadModel) -> Callable[..., object]:
    """make(pages, model): a runner of this kind."""
    return lambda pages, which=tiny_model: make_runner(kind, which, pages)
