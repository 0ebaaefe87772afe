"""Bad input through the command line: exit code 2 and one line that names the thing, never a traceback, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gptfast
from gptfast import cli
from gptfast.backend import supports

Refused = Callable[..., str]
PROMPT = ("the cat", "--max-tokens", "2")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """refused("score", folder, ...) -> the error's one line, after checking all that every error has in common."""

    def call(*arguments: object) -> str:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert code == 2, f"exit code {code}: {err}"
        assert "Traceback" not in err and out == ""
        *notes, line = err.splitlines()
        assert line.startswith("gptfast: error: ") and not any(note.startswith("gptfast: error") for note in notes), err
        return line.removeprefix("gptfast: error: ")

    return call


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    tokenizer = gptfast.GPT2Tokenizer.train(["the cat sat on the mat. " * 20], 280)
    config = gptfast.GPT2Config(vocab_size=len(tokenizer), n_positions=16, n_embd=16, n_layer=2, n_head=2)
    gptfast.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(good: Path, tmp_path: Path) -> Path:
    """A copy of a good model, for a test to spoil."""
    return Path(shutil.copytree(good, tmp_path / "model"))


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ----------------------------------------------------------------------------------------------------------------------- models


def test_a_good_model_is_not_refused(good: Path) -> None:
    assert cli.main(["generate", str(good), *PROMPT]) == 0


@pytest.mark.parametrize("command", [("generate",), ("score",), ("evaluate", "--data", "x.txt")])
def test_a_folder_that_is_no_model(refused: Refused, tmp_path: Path, command: tuple[str, ...]) -> None:
    text = ["text"] if command[0] == "score" else []
    assert str(tmp_path) in refused(command[0], tmp_path, *text, *command[1:])


def test_a_name_that_is_nowhere(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "no/such-model" in refused("generate", "no/such-model", *PROMPT)


@pytest.mark.parametrize("kept", [0, 4, 100, -100])
def test_truncated_safetensors(refused: Refused, model: Path, kept: int) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert "model.safetensors" in refused("generate", model, *PROMPT)


@pytest.mark.parametrize("name", ["../good/model.safetensors", "/etc/passwd", "a/../../x.safetensors"])
def test_a_shard_index_that_points_outside(refused: Refused, model: Path, name: str) -> None:
    (model / "model.safetensors").unlink()
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"transformer.wte.weight": name}}))
    line = refused("generate", model, *PROMPT)
    assert "model.safetensors.index.json" in line and name in line


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_embd": 17}, ("n_embd 17", "n_head 2")),
        ({"n_head": 3}, ("n_embd 16", "n_head 3")),
        ({"n_layer": -1}, ("n_layer", "-1")),
        ({"n_positions": "many"}, ("n_positions", "many")),
        ({"activation_function": "gelo"}, ("activation_function", "gelo")),
        ({"n_layer": 3}, ("h.2.",)),
        ({"n_embd": 32}, ("shape",)),
        ({"model_type": "llama"}, ("model_type", "llama")),
    ],
)
def test_a_config_that_makes_no_model(refused: Refused, model: Path, changes: dict[str, Any], words: tuple[str, ...]) -> None:
    _edit(model / "config.json", **changes)
    line = refused("generate", model, *PROMPT)
    assert all(word in line for word in words), line


@pytest.mark.parametrize("name", ["config.json", "vocab.json", "tokenizer.json", "merges.txt"])
def test_files_that_are_not_what_they_should_be(refused: Refused, model: Path, name: str) -> None:
    if name in ("vocab.json", "merges.txt"):
        (model / "tokenizer.json").unlink()
    (model / name).write_bytes(b"{\xff\x00")
    assert name in refused("generate", model, *PROMPT)


def test_a_pickle_that_holds_code_is_not_run(refused: Refused, model: Path, tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "harm"),))

    (model / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Harm()}, model / "pytorch_model.bin")
    assert "pytorch_model.bin" in refused("convert", model, "--out", tmp_path / "out")
    assert not (tmp_path / "harm").exists() and not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------- prompts and sampling


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--temperature", "-1"), ("temperature", "-1")),
        (("--temperature", "nan"), ("temperature", "nan")),
        (("--temperature", "warm"), ("temperature", "warm")),
        (("--top-p", "1.5"), ("top-p", "1.5")),
        (("--top-k", "0.5"), ("top-k", "0.5")),
        (("--n", "0"), ("--n", "0")),
        (("--max-tokens", "-1"), ("max-tokens", "-1")),
        (("--repetition-penalty", "0"), ("--repetition-penalty", "0")),
        (("--banned-tokens", "5000"), ("5000", "0 to ")),
        (("--logit-bias", "-1=3"), ("-1", "0 to ")),
        (("--stop-token-ids", "99999999999999999999"), ("99999999999999999999",)),
        (("--logit-bias", "5"), ("--logit-bias",)),
        (("--stop", ""), ("stop",)),
        (("--order", "vlm"), ("vlm", "vllm")),
        (("--dtype", "int2"), ("int2", "int4")),
        (("--dtype", "fp64"), ("fp64", "fp32")),
        (("--threads", "0"), ("threads", "0")),
        (("--seed", "-99999999999999999999"), ("seed",)),
    ],
)
def test_sampling_options(refused: Refused, good: Path, options: tuple[str, ...], words: tuple[str, ...]) -> None:
    line = refused("generate", good, *PROMPT, *options)
    assert all(word in line for word in words), line


def test_a_prompt_longer_than_the_context(refused: Refused, good: Path) -> None:
    line = refused("generate", good, "the cat " * 40)
    assert "tokens" in line and "context is 16" in line


def test_files_of_text(refused: Refused, good: Path, tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("Straße".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("")
    assert "latin is not UTF-8" in refused("score", good, "--file", tmp_path / "latin")
    assert "absent" in refused("score", good, "--file", tmp_path / "absent")
    assert "empty.txt" in refused("evaluate", good, "--data", tmp_path / "empty.txt")
    assert "absent.txt" in refused("evaluate", good, "--data", tmp_path / "absent.txt")
    assert "stride" in refused("score", good, "the cat", "--stride", "17")
    assert "squad" in refused("evaluate", good, "--data", tmp_path / "empty.txt", "--task", "squad")


# --------------------------------------------------------------------------------------------------------- backends and devices


def test_backends(refused: Refused, good: Path) -> None:
    assert "'cupp' (did you mean cpp?)" in refused("generate", good, *PROMPT, "--backend", "cupp")
    assert "'layer_nrom' (did you mean layer_norm?)" in refused("backends", "--backend", "layer_nrom=cpp")
    assert "two backends" in refused("backends", "--backend", "cpp,eager")
    reason = supports("layer_norm", "cuda")
    if reason is not None:
        assert reason.split(":")[0] in refused("generate", good, *PROMPT, "--backend", "layer_norm=cuda")
    if not torch.cuda.is_available():
        line = refused("generate", good, *PROMPT, "--device", "cuda")
        assert "no CUDA device" in line
        with gptfast.backend(layer_norm="cuda"):
            line = refused("generate", good, *PROMPT)
        assert "layer_norm: backend cuda was forced and cannot run" in line, "the C++ engine, which calls no ops, does not step in"


# -------------------------------------------------------------------------------------------------------------- data and training


def _prepare(folder: Path, text: str, *options: str) -> tuple[object, ...]:
    (folder / "in.txt").write_text(text)
    return ("prepare", folder / "in.txt", "--out", folder / "shards", "--train-tokenizer", "260", *options)


def test_an_empty_corpus(refused: Refused, tmp_path: Path) -> None:
    assert "empty" in refused(*_prepare(tmp_path, ""))
    (tmp_path / "folder").mkdir()
    assert "folder" in refused("prepare", tmp_path / "folder", "--out", tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


def test_inputs_of_prepare(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    out = ("--out", tmp_path / "shards")
    line = refused("prepare", tmp_path / "bad.jsonl", *out)
    assert "bad.jsonl" in line and "2" in line
    assert "absent" in refused("prepare", tmp_path / "absent", *out)
    assert "val" in refused(*_prepare(tmp_path, "text " * 99, "--val", "1"))
    assert "-5" in refused(*_prepare(tmp_path, "text " * 99)[:-1], "-5")
    assert "not both" in refused(*_prepare(tmp_path, "text " * 99, "--tokenizer", str(tmp_path)))
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/mine").write_text("mine")
    assert "not empty" in refused(*_prepare(tmp_path, "text " * 99))
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--n-embd", "17", "--n-head", "2"), ("n_embd 17", "n_head 2")),
        (("--lr", "fast"), ("--lr", "fast")),
        (("--steps", "0"), ("--steps", "0")),
        (("--schedule", "cosin"), ("cosin", "did you mean cosine")),
        (("--context", "4096"), ("4,096", "1,024")),
        (("--out", ""), ("--out",)),
        (("--data", "/nowhere"), ("/nowhere",)),
        (("--resume", "--out", "/nowhere"), ("/nowhere",)),
        (("--config", "/nowhere.yaml"), ("/nowhere.yaml",)),
        (("--beta1", "1"), ("beta1", "1")),
    ],
)
def test_training_options(refused: Refused, shards: Path, tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...]) -> None:
    small = ("--n-layer", "1", "--n-embd", "16", "--n-head", "2", "--n-positions", "1024", "--steps", "1", "--batch", "1")
    line = refused("train", "--data", shards, "--out", tmp_path / "run", *small, *options)
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    assert cli.main([str(a) for a in _prepare(folder, "the cat sat on the mat. " * 900, "--val", "0")]) == 0
    return folder / "shards"


@pytest.mark.parametrize("kept", [0, 10, 1023, -1])
def test_a_spoiled_shard(refused: Refused, shards: Path, tmp_path: Path, kept: int) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "shards"))
    (file,) = copy.glob("train_*.bin")
    file.write_bytes(file.read_bytes()[:kept])
    assert file.name in refused("train", "--data", copy, "--out", tmp_path / "run", "--steps", "1")


# ----------------------------------------------------------------------------------------------------------------- a full disk


def _on_a_full_disk(limit: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in a process whose files may not grow beyond `limit` bytes: the write itself fails, as on a full disk."""
    code = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
from gptfast import cli
sys.exit(cli.main({[str(argument) for argument in arguments]!r}))
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_prepare_on_a_full_disk(tmp_path: Path) -> None:
    done = _on_a_full_disk(4096, *_prepare(tmp_path, "".join(f"the {i} cat sat. " for i in range(9000))))
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("gptfast: error: "), done.stderr
    assert "Traceback" not in done.stderr and "too large" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt"], "nothing half-written stays"


def test_convert_on_a_full_disk(good: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    torch.save(gptfast.GPT2LMHeadModel.from_pretrained(good).state_dict(), old / "pytorch_model.bin")
    shutil.copyfile(good / "config.json", old / "config.json")
    done = _on_a_full_disk(8192, "convert", old, "--out", tmp_path / "new")
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("gptfast: error: "), done.stderr
    assert "Traceback" not in done.stderr and not list((tmp_path / "new").glob("*"))
