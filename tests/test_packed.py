"""Packed files: written, mapped, verified, kept in the cache, and everything that can be wrong with them."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import resource
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptfast import Engine, Error, GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, LoadError, packed, packed_cache
from gptfast.packed_layout import is_by_rows, is_matrix

PREFIX = struct.Struct("<8sIQ32s")
SIZES = {"n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 2, "n_inner": 40, "initializer_range": 0.2}


@pytest.fixture(scope="module")
def tokenizer() -> GPT2Tokenizer:
    return GPT2Tokenizer.train(["the cat sat on the mat. " * 20], 280)


def build(path: Path, tokenizer: GPT2Tokenizer, seed: int = 0, **changes: Any) -> Path:
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**{**SIZES, "vocab_size": len(tokenizer), **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_()
            assert parameter.abs().sum() > 0, name
    model.generation_config = {"max_new_tokens": 7}
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: GPT2Tokenizer) -> Path:
    return build(tmp_path_factory.mktemp("packed") / "model", tokenizer)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """An int8 file of the folder, not to be changed."""
    return packed.write(folder, "int8", folder.parent / "whole.gptfast")


# ------------------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("dtype", packed.DTYPES)
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_in_a_file(tmp_path: Path, tokenizer: GPT2Tokenizer, dtype: str, tied: bool) -> None:
    build(tmp_path / "model", tokenizer, tie_word_embeddings=tied)
    path = packed.write(tmp_path / "model", dtype, tmp_path / "file")
    found = packed.verify(path)
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "model")
    assert found.config == model.config and found.dtype == dtype and found.generation_config == {"max_new_tokens": 7}
    assert found.tokenizer().fingerprint() == tokenizer.fingerprint()
    assert found.parameters == sum(p.numel() for p in model.parameters())
    state = dict(model.named_parameters())
    assert found.tensors.keys() == found.entries.keys() == state.keys()
    in_memory = packed.pack(tmp_path / "model", dtype)
    for name, tensor in found.tensors.items():
        entry, shape = found.entries[name], tuple(state[name].shape)
        assert tensor.data_ptr() % 64 == 0 and torch.equal(tensor, in_memory.tensors[name]), name
        if is_matrix(name):
            assert entry.shape == (shape if is_by_rows(name) else shape[::-1]) and tensor.dtype == torch.uint8
            assert entry.format == ("int8" if dtype == "int4" and is_by_rows(name) else dtype), name
            assert tensor.numel() == entry.bytes == found.weight(name).data.numel()
        else:
            assert entry.format == "fp32" and torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_weights_come_back_bit_for_bit(tmp_path: Path, tokenizer: GPT2Tokenizer, dtype: str, stored: torch.dtype) -> None:
    model = GPT2LMHeadModel.from_pretrained(build(tmp_path / "model", tokenizer)).to(stored)
    model.save_pretrained(tmp_path / "model")
    path = packed.write(tmp_path / "model", dtype, tmp_path / "file")
    kind = torch.float32 if dtype == "fp32" else torch.bfloat16
    read = GPT2LMHeadModel.from_pretrained(path)
    assert not read.training and read.generation_config == {"max_new_tokens": 7}
    assert read.dtype == (torch.bfloat16 if dtype == "bf16" and stored is torch.bfloat16 else torch.float32)
    for (name, ours), theirs in zip(read.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours.float(), theirs.to(kind if is_matrix(name) else torch.float32).float()), name
    assert all(p.dtype == torch.bfloat16 for p in GPT2LMHeadModel.from_pretrained(path, dtype="bf16").parameters())
    again = packed.write(path, dtype, tmp_path / "again")
    assert packed.open(again).payload_sha256 == packed.open(path).payload_sha256, "from a packed file as from the folder"
    assert GPT2Tokenizer.from_pretrained(path).fingerprint() == tokenizer.fingerprint()


def test_a_model_in_memory_without_its_padding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**SIZES, vocab_size=64, real_vocab_size=37))
    found = packed.open(packed.write(model, "fp32", tmp_path / "file"))
    assert found.config.vocab_size == 37 and found.entries["transformer.wte.weight"].shape == (37, 24)
    assert torch.equal(found.state()["transformer.wte.weight"], model.transformer.wte.weight[:37])
    assert not found.has_tokenizer
    with pytest.raises(LoadError, match="holds no tokenizer"):
        found.tokenizer()


def test_writing_into_a_tensor_does_not_reach_the_file(folder: Path, tmp_path: Path) -> None:
    path = packed.write(folder, "fp32", tmp_path / "file")
    before = path.read_bytes()
    found = packed.open(path)
    for tensor in found.tensors.values():
        tensor.zero_()
    assert path.read_bytes() == before and packed.verify(path)
    path.unlink()
    assert found.tensors["transformer.ln_f.weight"].sum() == 0, "a mapping outlives its name"


def test_quantised_weights_do_not_come_back(whole: Path) -> None:
    with pytest.raises(LoadError, match="holds int8 codes, not the weights"):
        GPT2LMHeadModel.from_pretrained(whole)
    with pytest.raises(LoadError, match="int8 codes"):
        packed.write(whole, "bf16", whole.parent / "never")
    assert not (whole.parent / "never").exists()


def test_opening_does_not_read_the_weights(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(**{**SIZES, "n_embd": 512, "n_head": 8, "n_inner": None, "n_layer": 8}, vocab_size=8192))
    path = packed.write(model, "fp32", tmp_path / "file")
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    packed.open(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 2000 and path.stat().st_size > 100 << 20
    assert time.process_time() - start < 0.5


def test_bytes_of_a_token() -> None:
    config = GPT2Config()
    sizes = {dtype: packed.token_bytes(config, dtype) / 1e6 for dtype in packed.DTYPES}
    assert 490 < sizes["fp32"] < 500 and 245 < sizes["bf16"] < 250 and 123 < sizes["int8"] < 128 and 80 < sizes["int4"] < 90
    untied = packed.token_bytes(GPT2Config(tie_word_embeddings=False), "fp32") / 1e6
    assert untied == sizes["fp32"], "of a table that is only looked up one row is read"


# ------------------------------------------------------------------------------------------------------------ what can be wrong


def refused(path: Path, *words: str) -> None:
    for read in (packed.open, packed.verify, GPT2Tokenizer.from_pretrained, GPT2LMHeadModel.from_pretrained, Engine):
        with pytest.raises(LoadError) as caught:
            read(path)
        assert all(word in str(caught.value) for word in (path.name, *words)) and "\n" not in str(caught.value), caught.value


@pytest.mark.parametrize("kept", [0.9, 0.5, 1.0, 0.01])
def test_a_truncated_file(whole: Path, tmp_path: Path, kept: float) -> None:
    data = whole.read_bytes()
    path = tmp_path / "short.gptfast"
    path.write_bytes(data[: min(int(len(data) * kept), len(data) - 1)])
    refused(path, "truncated")
    path.write_bytes(data[:30])
    refused(path, "truncated")
    path.write_bytes(data + b"\0")
    refused(path, "bytes, its header asks for")


def test_files_that_are_none(tmp_path: Path) -> None:
    for content in (b"", b"GPTFAST", b"{}", os.urandom(5000)):
        (tmp_path / "strange").write_bytes(content)
        refused(tmp_path / "strange", "no packed one", "config.json")
    with pytest.raises(LoadError, match="absent: No such file"):
        packed.open(tmp_path / "absent")
    with pytest.raises(LoadError, match="directory"):
        packed.open(tmp_path)


def test_another_version(whole: Path, tmp_path: Path) -> None:
    data = bytearray(whole.read_bytes())
    data[8:12] = struct.pack("<I", 2)
    (tmp_path / "newer").write_bytes(data)
    refused(tmp_path / "newer", "version 2, this gptfast reads 1")


def test_a_corrupted_header(whole: Path, tmp_path: Path) -> None:
    data = bytearray(whole.read_bytes())
    data[PREFIX.size + 20] ^= 1
    (tmp_path / "bent").write_bytes(data)
    refused(tmp_path / "bent", "header", "SHA-256", "damaged")


def test_weights_of_another_model(folder: Path, whole: Path, tmp_path: Path, tokenizer: GPT2Tokenizer) -> None:
    other = packed.write(build(tmp_path / "other", tokenizer, seed=1), "int8", tmp_path / "other.gptfast")
    mine, theirs = whole.read_bytes(), other.read_bytes()
    assert len(mine) == len(theirs)
    start = -(-(PREFIX.size + PREFIX.unpack(mine[: PREFIX.size])[2]) // 4096) * 4096
    (tmp_path / "mixed").write_bytes(mine[:start] + theirs[start:])
    refused(tmp_path / "mixed", "different weights")
    (tmp_path / "forged").write_bytes(mine[:start] + theirs[start:-40] + mine[-40:])
    assert packed.open(tmp_path / "forged").dtype == "int8", "only reading all of it can tell"
    with pytest.raises(LoadError, match=r"forged: its weights have the SHA-256 \w{16}\.\.\., its header says"):
        packed.verify(tmp_path / "forged")
    packed.open(whole, packed.fingerprint(folder))
    with pytest.raises(LoadError, match="made from other weights"):
        packed.open(whole, packed.fingerprint(tmp_path / "other"))


def _with_header(whole: Path, path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A file whose header was changed and hashed again, as nobody but an attacker would."""
    data = whole.read_bytes()
    length = PREFIX.unpack(data[: PREFIX.size])[2]
    header = json.loads(data[PREFIX.size : PREFIX.size + length])
    changed = change(header)
    text = json.dumps(changed if isinstance(changed, list) else header).encode()
    start, new = (-(-(PREFIX.size + size) // 4096) * 4096 for size in (length, len(text)))
    prefix = PREFIX.pack(b"GPTFAST\0", 1, len(text), hashlib.sha256(text).digest())
    path.write_bytes((prefix + text).ljust(new, b"\0") + data[start:])
    return path


WTE = "transformer.wte.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: [1], ("not one that gptfast writes",)),
        (lambda h: h.pop("payload_bytes"), ("not one that gptfast writes",)),
        (lambda h: h.update(payload_bytes=-1), ("not one that gptfast writes",)),
        (lambda h: h.update(payload_bytes=2**61), ("truncated",)),
        (lambda h: h.update(payload_sha256="0" * 64), ("different weights",)),
        (lambda h: h.update(dtype="int2"), ("dtype is 'int2'", "fp32, bf16, int8, int4")),
        (lambda h: h.update(dtype=["int8"]), ("dtype",)),
        (lambda h: h.update(dtype="bf16"), ("is not the tensor that its config asks for",)),
        (lambda h: h.update(config=[]), ("config",)),
        (lambda h: h["config"].update(n_embd=7), ("n_embd 7",)),
        (lambda h: h["config"].update(n_embd=48), ("is not the tensor",)),
        (lambda h: h["config"].update(n_layer=1024), ("h.2.", "is not the tensor")),
        (lambda h: h["config"].update(n_positions=2**30), ("wpe", "is not the tensor")),
        (lambda h: h["config"].update(id2label=3), ("id2label",)),
        (lambda h: h["tensors"][WTE].update(offset=0), (WTE,)),
        (lambda h: h["tensors"][WTE].update(offset=-64), (WTE,)),
        (lambda h: h["tensors"][WTE].update(offset=2**60), (WTE,)),
        (lambda h: h["tensors"][WTE].update(bytes=2**40), (WTE,)),
        (lambda h: h["tensors"].update({WTE: 3}), (WTE,)),
        (lambda h: h["tensors"].pop(WTE), (WTE,)),
        (lambda h: h["tensors"].update(extra=h["tensors"][WTE]), ("extra",)),
        (lambda h: h.update(files=3), ("files",)),
        (lambda h: h["files"]["tokenizer"].update(bytes=2**50), ("file tokenizer",)),
        (lambda h: h["files"]["tokenizer"].update(offset=0), ("file tokenizer",)),
        (lambda h: h["files"].update(tokenizer=[]), ("file tokenizer",)),
        (lambda h: h["files"].clear(), ("bytes of payload",)),
    ],
)
def test_a_forged_header(whole: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], words: tuple[str, ...]) -> None:
    refused(_with_header(whole, tmp_path / "forged", change), *words)


def test_a_tokenizer_that_is_none(whole: Path, tmp_path: Path) -> None:
    data = whole.read_bytes()
    (tmp_path / "file").write_bytes(data.replace(b'{"vocabulary":{', b'{"vocabulary":[', 1))
    with pytest.raises(LoadError, match="file: this is no tokenizer"):
        packed.open(tmp_path / "file").tokenizer()
    empty = b'{"merges": [], "vocabulary": {}}'
    for text in (b"", b"[]", b"{}", b'{"merges": [3]}', b'{"merges": ["a b c"], "vocabulary": {}}', empty):
        with pytest.raises(LoadError):
            GPT2Tokenizer.from_bytes(text)


def test_random_damage_gives_load_errors_or_the_same_model(whole: Path, tmp_path: Path) -> None:
    """Bytes changed, cut, repeated anywhere, and headers changed and hashed again: typed errors, bounded time and memory."""
    draw, good = random.Random(0), whole.read_bytes()
    length = PREFIX.unpack(good[: PREFIX.size])[2]
    path, outcomes, longest = tmp_path / "bad", {True: 0, False: 0}, 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(400):
        bad = bytearray(good)
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(draw.choice([PREFIX.size, PREFIX.size + length, len(bad)]))
            bad[place : place + draw.choice([0, 1, 8, 500])] = draw.randbytes(draw.choice([0, 1, 8, 500]))
        if number % 2:
            text = bytearray(good[PREFIX.size : PREFIX.size + length])
            place = draw.randrange(len(text))
            digits = [m.span() for m in re.finditer(rb"\d+", text)]
            if draw.random() < 0.7:
                begin, end = draw.choice(digits)
                text[begin:end] = str(draw.choice([0, 1, -1, 63, 2**31, 2**63, 10**30, draw.randrange(9999)])).encode()
            else:
                text[place : place + 1] = draw.choice([b"", b'"', b"{", b"]", b",", b"null", b"[" * 3000])
            front = PREFIX.pack(b"GPTFAST\0", 1, len(text), hashlib.sha256(text).digest()) + text
            rest = good[-(-(PREFIX.size + length) // 4096) * 4096 :]
            bad = bytearray(front.ljust(-(-len(front) // 4096) * 4096, b"\0") + rest)
        path.write_bytes(bad)
        start = time.process_time()
        try:
            packed.open(path).tokenizer().encode("the cat")
            outcomes[True] += 1
        except Error as error:
            assert "\n" not in str(error) and len(str(error)) < 600
            outcomes[False] += 1
        longest = max(longest, time.process_time() - start)
    assert min(outcomes.values()) > 10 and longest < 2, (outcomes, longest)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200 << 10


# ----------------------------------------------------------------------------------------------------------- disks and the cache


def test_a_full_disk_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    code = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
from gptfast import Error, packed
for path in ({str(tmp_path / "file")!r}, {str(tmp_path / "absent/file")!r}):
    try:
        packed.write({str(folder)!r}, "fp32", path)
    except Error as error:
        print(error)
"""
    (tmp_path / "file").write_text("older")
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120)
    first, second = done.stdout.splitlines()
    assert first == f"packed file {tmp_path / 'file'} cannot be written: File too large", done.stderr
    assert second.endswith("cannot be written: No such file or directory")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "older"


def test_a_writer_that_is_stopped_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(packed, "_append", stop)
    with pytest.raises(KeyboardInterrupt):
        packed.write(folder, "fp32", tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["fp16", "int3"])
def test_formats_that_are_none(folder: Path, tmp_path: Path, dtype: str) -> None:
    for call in (packed.pack, packed_cache.cached, lambda f, d: packed.write(f, d, tmp_path / "file")):
        with pytest.raises(Error, match=f"dtype is '{dtype}'; allowed in a packed file: fp32, bf16, int8, int4"):
            call(folder, dtype)
    assert not (tmp_path / "file").exists()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(packed_cache, "CACHE_FROM", 1)
    return tmp_path / "cache/gptfast"


def test_a_folder_is_packed_once(tmp_path: Path, tokenizer: GPT2Tokenizer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(tmp_path / "model", tokenizer)
    first = packed_cache.cached(model, "int8")
    (file,) = cache.iterdir()
    assert first.path == file and first.source == packed.fingerprint(model)
    with monkeypatch.context() as patch:
        patch.setattr(packed, "write", None)
        assert packed_cache.cached(str(model), "int8").path == file
    assert packed_cache.cached(model, "fp32").dtype == "fp32" and len(list(cache.iterdir())) == 2
    (cache / f".model-x.tmp-{2**22 + 1}").write_text("left by a process that is gone")
    build(tmp_path / "model", tokenizer, seed=5)
    second = packed_cache.cached(model, "int8")
    assert second.path != file and not file.exists() and len(list(cache.iterdir())) == 2, "the older weights' file is gone"
    assert second.payload_sha256 != first.payload_sha256
    second.path.write_bytes(b"damaged")
    assert packed_cache.cached(model, "int8").payload_sha256 == second.payload_sha256


def test_without_a_cache_it_is_packed_in_memory(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.parent.write_text("a file where the folder should be")
    found = packed_cache.cached(folder, "bf16")
    assert found.path is None and torch.equal(found.tensors[WTE], packed.pack(folder, "bf16").tensors[WTE])
    monkeypatch.setattr(packed_cache, "CACHE_FROM", 1 << 30)
    cache.parent.unlink()
    assert packed_cache.cached(folder, "bf16").path is None and not cache.exists(), "small ones are not kept"
    (folder / "model.safetensors").rename(folder / "away")
    try:
        with pytest.raises(LoadError, match="neither"):
            packed_cache.cached(folder, "fp32")
    finally:
        (folder / "away").rename(folder / "model.safetensors")


def test_a_packed_file_is_opened_as_it_is(whole: Path) -> None:
    assert packed_cache.cached(whole, "int8").path == whole
    with pytest.raises(Error, match=r"dtype is 'fp32', and the packed file .*whole\.gptfast holds int8"):
        packed_cache.cached(whole, "fp32")
