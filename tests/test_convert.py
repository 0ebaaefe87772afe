"""`gptfast convert` between folders, old pickles and packed files, `gptfast doctor --verify`, and packed files as MODEL."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import gptfast
from gptfast import packed

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("convert") / "model"
    tokenizer = gptfast.GPT2Tokenizer.train(["the cat sat on the mat. " * 20], 280)
    config = gptfast.GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=64, n_layer=2, n_head=2, initializer_range=0.2)
    gptfast.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_folder_to_packed_and_back(run: Run, model: Path, tmp_path: Path) -> None:
    file, back = tmp_path / "file", tmp_path / "back"
    code, out, _ = run("convert", model, "--to", "packed", "--out", file)
    assert code == 0 and out == f"{file}: converted from {model}, fp32, {file.stat().st_size:,} bytes\n"
    assert run("convert", file, "--to", "hf", "--out", back)[0] == 0
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "vocab.json", "merges.txt"):
        assert (back / name).read_bytes() == (model / name).read_bytes(), name


@pytest.mark.parametrize("dtype", packed.DTYPES)
def test_every_format(run: Run, model: Path, tmp_path: Path, dtype: str) -> None:
    file = tmp_path / "file"
    code, out, _ = run("convert", model, "--to", "packed", "--dtype", dtype, "--out", file, "--json")
    facts = json.loads(out)
    size = file.stat().st_size
    assert code == 0 and facts == {"source": str(model), "out": str(file), "to": "packed", "dtype": dtype, "bytes": size}
    code, out, _ = run("doctor", "--verify", file)
    assert code == 0 and out.startswith(f"{file}: whole; {dtype}, 0.1 M parameters, SHA-256 ")
    found = json.loads(run("doctor", "--verify", file, "--json")[1])
    assert found["sha256"] == packed.open(file).payload_sha256 and found["dtype"] == dtype


def test_from_one_packed_file_to_another(run: Run, model: Path, tmp_path: Path) -> None:
    assert run("convert", model, "--to", "packed", "--dtype", "fp32", "--out", tmp_path / "fp32")[0] == 0
    assert run("convert", tmp_path / "fp32", "--to", "packed", "--dtype", "int8", "--out", tmp_path / "a")[0] == 0
    assert run("convert", model, "--to", "packed", "--dtype", "int8", "--out", tmp_path / "b")[0] == 0
    assert packed.open(tmp_path / "a").payload_sha256 == packed.open(tmp_path / "b").payload_sha256
    assert run("convert", tmp_path / "fp32", "--to", "packed", "--out", tmp_path / "c")[0] == 0
    assert packed.open(tmp_path / "c").dtype == "fp32", "without --dtype as it is"


def refused(result: tuple[int, str, str], *words: str) -> None:
    code, out, err = result
    assert code == 2 and out == "" and err.startswith("gptfast: error: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err


def test_what_cannot_be_converted(run: Run, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "int8"
    assert run("convert", model, "--to", "packed", "--dtype", "int8", "--out", file)[0] == 0
    refused(run("convert", file, "--to", "hf", "--out", tmp_path / "x"), str(file), "int8 codes, not the weights")
    refused(run("convert", file, "--to", "packed", "--dtype", "fp32", "--out", tmp_path / "x"), "int8 codes")
    refused(run("convert", model, "--to", "packed", "--out", file), f"output {file} exists already")
    refused(run("convert", model, "--to", "packed", "--out", tmp_path), "exists already")
    refused(run("convert", model, "--to", "packed", "--dtype", "fp16", "--out", tmp_path / "x"), "fp16", "fp32, bf16, int8, int4")
    refused(run("convert", model, "--to", "packed", "--dtype", "int9", "--out", tmp_path / "x"), "int9")
    refused(run("convert", model, "--to", "gguf", "--out", tmp_path / "x"), "--to is 'gguf'", "hf, packed")
    refused(run("convert", model, "--to", "hf", "--dtype", "bf16", "--out", tmp_path / "x"), "--dtype", "--to packed")
    refused(run("convert", model, "--to", "hf", "--out", tmp_path / "x"), "has no pytorch_model.bin")
    refused(run("convert", tmp_path / "none", "--to", "packed", "--out", tmp_path / "x"), str(tmp_path / "none"))
    refused(run("convert", model, "--to", "packed", "--out", tmp_path / "no/where"), "no/where cannot be written")
    (tmp_path / "old").mkdir()
    torch.save({}, tmp_path / "old/pytorch_model.bin")
    (tmp_path / "old/config.json").write_bytes((model / "config.json").read_bytes())
    refused(run("convert", tmp_path / "old", "--to", "packed", "--out", tmp_path / "x"), "gptfast convert")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("what", ["truncated", "version", "header", "weights", "none", "absent"])
def test_packed_files_that_are_refused(run: Run, model: Path, tmp_path: Path, what: str) -> None:
    file = packed.write(model, "fp32", tmp_path / "file")
    data = bytearray(file.read_bytes())
    if what == "truncated":
        data = data[:-4096]
    elif what == "version":
        data[8] += 1
    elif what == "header":
        data[100] ^= 1
    elif what == "weights":  # the end of another model's file
        other = gptfast.GPT2LMHeadModel(gptfast.GPT2LMHeadModel.from_pretrained(model).config)
        other.save_pretrained(tmp_path / "other")
        gptfast.GPT2Tokenizer.from_pretrained(model).save_pretrained(tmp_path / "other")
        end = len(data) // 2
        data[end:] = packed.write(tmp_path / "other", "fp32", tmp_path / "file2").read_bytes()[end:]
    elif what == "none":
        data = bytearray(b"some text")
    file.write_bytes(data)
    if what == "absent":
        file.unlink()
    for command in (("generate", file, "the"), ("score", file, "the"), ("chat", file), ("doctor", "--verify", file)):
        code, out, err = run(*command)
        line = err.splitlines()[-1]
        assert code == 2 and out == "" and line.startswith("gptfast: error: ") and "Traceback" not in err
        words = {"none": "no packed one", "weights": "different weights", "absent": "file", "header": "SHA-256"}.get(what, what)
        assert str(file) in line and words in line, line


def test_damaged_weights_are_noticed_by_verify(run: Run, model: Path, tmp_path: Path) -> None:
    file = packed.write(model, "int8", tmp_path / "file")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(data)
    code, out, err = run("doctor", "--verify", file)
    assert code == 2 and out == "" and "its weights have the SHA-256" in err and err.count("\n") == 1
