"""Packed files: a model's weights in the form that the C++ engine reads, its config and its tokenizer, in one memory-mapped file.

    magic "GPTFAST\\0" | version u32 | header's length u64 | SHA-256 of the header | header, JSON | zeros up to a whole page
    payload: tensors in the order of use, each 64-byte aligned, then the files | SHA-256 of the payload | magic

Numbers are little-endian. The header holds dtype, config, tensors {name: format, shape, offset, bytes}, files {name: offset,
bytes}, payload_bytes, payload_sha256 and source. Opening checks everything but the payload's hash, so it reads a few kilobytes
however large the model is: the hash behind the payload shows a file that is cut, or put together from two. verify() reads it all.
"""

from __future__ import annotations

import builtins
import contextlib
import gc
import hashlib
import json
import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeGuard

import torch
from torch import Tensor

from gptfast import hub
from gptfast.checkpoint import sync_folder
from gptfast.config import GPT2Config
from gptfast.errors import Error, LoadError
from gptfast.ops.pack_weight import pack_weight
from gptfast.packed_layout import ALIGNMENT, Entry, aligned, is_by_rows, is_matrix, layout, shapes, token_bytes
from gptfast.packed_layout import end as payload_end
from gptfast.packing import PackedWeight
from gptfast.tokenizer import GPT2Tokenizer

if TYPE_CHECKING:
    from gptfast.model import GPT2LMHeadModel

__all__ = [
    "DTYPES", "Packed", "config_of", "fingerprint", "is_packed", "layout", "open", "pack", "shapes", "token_bytes", "verify",
    "write",
]
MAGIC, VERSION = b"GPTFAST\0", 1
DTYPES = ("fp32", "bf16", "int8", "int4")
PAGE = 4096
_PREFIX = struct.Struct("<8sIQ32s")
_SEAL = struct.Struct("<32s8s")
_HEADER_LIMIT = 1 << 26  # bytes; 1,024 blocks need 2 MB
_FILES_LIMIT = 1 << 28
_TOKENIZER, _GENERATION = "tokenizer", "generation_config.json"


# ------------------------------------------------------------------------------------------------------------------ what is in it


@dataclass(frozen=True)
class Packed:
    """A packed model: matrices as uint8 buffers in the layout of csrc/cpu/engine/product.h, vectors and wpe as fp32 tensors.

    `tensors`: Hugging Face's names -> buffer; `entries`: the same names -> format and shape (a matrix's is [outputs, inputs],
    however the folder stores it); `dtype` fp32, bf16, int8 or int4; `source`: what it was made from; `path`: None in memory. The
    tensors are views of a private mapping of the file, valid while they are held; writing into them does not reach the file.
    """

    path: Path | None
    config: GPT2Config
    dtype: str
    tensors: dict[str, Tensor]
    entries: dict[str, Entry]
    files: dict[str, bytes]
    source: str
    payload_sha256: str = ""

    @property
    def generation_config(self) -> dict[str, Any]:
        """generation_config.json of the folder, or {}."""
        try:
            return dict(json.loads(self.files.get(_GENERATION, b"{}")))
        except (ValueError, TypeError, RecursionError):
            raise LoadError(f"{self.path}: its generation_config.json is no JSON object") from None

    @property
    def parameters(self) -> int:
        """How many weights it stands for."""
        return sum(math.prod(entry.shape) for entry in self.entries.values())

    @property
    def has_tokenizer(self) -> bool:
        """Whether the model had one."""
        return _TOKENIZER in self.files

    def tokenizer(self) -> GPT2Tokenizer:
        """The tokenizer. Raises gptfast.LoadError where the model had none."""
        if not self.has_tokenizer:
            raise LoadError(f"{self.path}: it holds no tokenizer, its folder had none")
        collecting = gc.isenabled()
        gc.disable()  # so many new objects, which all stay, would make it walk through everything that torch has, several times
        try:
            return GPT2Tokenizer.from_bytes(self.files[_TOKENIZER])
        except LoadError as error:
            raise LoadError(f"{self.path}: {error}") from None
        finally:
            if collecting:
                gc.enable()

    def weight(self, name: str) -> PackedWeight:
        """The matrix `name` for ops.linear and its like."""
        entry = self.entries[name]
        return PackedWeight(self.tensors[name], entry.format, *entry.shape)

    def state(self) -> dict[str, Tensor]:
        """Hugging Face's state dict, a copy, bit for bit what was packed: bf16 if that holds every value, else fp32.

        Raises gptfast.LoadError for int8 and int4, which no longer hold the weights that they were made from.
        """
        if self.dtype not in hub.DTYPES:
            raise LoadError(f"{self.path} holds {self.dtype} codes, not the weights; use the folder that it was made from")
        state = {}
        for name, tensor in self.tensors.items():
            values = self.weight(name).dequantise() if is_matrix(name) else tensor.clone()
            state[name] = values.t().contiguous() if is_matrix(name) and not is_by_rows(name) else values
        plain = [tensor for name, tensor in self.tensors.items() if not is_matrix(name)]
        if self.dtype == "bf16" and all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in plain):
            return {name: tensor.bfloat16() for name, tensor in state.items()}
        return state


# ------------------------------------------------------------------------------------------------------------------------- opening


def is_packed(path: str | Path) -> bool:
    """Whether `path` is a file, which as a model only a packed file can be."""
    return os.path.isfile(path)


def config_of(model: str | Path) -> GPT2Config:
    """The config of a folder, a hub id or a packed file. Raises gptfast.LoadError."""
    return open(model).config if is_packed(model) else hub.load_config(hub.resolve(model))


def open(path: str | Path, source: str | None = None, dtype: str | None = None) -> Packed:
    """Maps a packed file and checks all of it but the payload's hash; with `source` also what it was made from.

    Raises gptfast.LoadError in one line for a file that is none, is cut, damaged, of another version or of other weights, and
    gptfast.Error where it holds another dtype than is asked for.
    """
    path = Path(path)
    try:
        with builtins.open(path, "rb") as file:
            header, start, payload = _read_header(path, file)
            whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        if isinstance(error, LoadError):
            raise
        raise LoadError(f"packed file {path}: {error.strerror or error}") from None
    if source is not None and header.get("source") != source:
        raise LoadError(f"packed file {path}: it was made from other weights")
    config, held, entries, places = _read_tables(path, header, payload)
    if dtype not in (None, held):
        raise Error(f"dtype is {dtype!r}, and the packed file {path} holds {held}")
    view = torch.frombuffer(whole, dtype=torch.uint8)[start : start + payload]
    tensors = {}
    for name, entry in entries.items():
        piece = view[entry.offset : entry.offset + entry.bytes]
        tensors[name] = piece if is_matrix(name) else piece.view(torch.float32).view(entry.shape)
    files = {name: bytes(whole[start + offset : start + offset + size]) for name, (offset, size) in places.items()}
    return Packed(path, config, held, tensors, entries, files, str(header.get("source")), str(header["payload_sha256"]))


def _read_header(path: Path, file: BinaryIO) -> tuple[dict[str, Any], int, int]:
    """The header, where the payload starts and its size, after all checks that need no knowledge of the model."""
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(_PREFIX.size)
    if not prefix.startswith(MAGIC):
        raise LoadError(f"{path} is a file, and no packed one; a packed file, or the folder that holds config.json, is needed")
    if len(prefix) < _PREFIX.size:
        raise LoadError(f"packed file {path}: {size:,} bytes are too few, it is truncated")
    _, version, length, digest = _PREFIX.unpack(prefix)
    if version != VERSION:
        raise LoadError(f"packed file {path}: version {version}, this gptfast reads {VERSION}; pack the folder again")
    if length > min(_HEADER_LIMIT, size):
        raise LoadError(f"packed file {path}: a header of {length:,} bytes in a file of {size:,}: it is truncated or damaged")
    text = file.read(length)
    if hashlib.sha256(text).digest() != digest:
        raise LoadError(f"packed file {path}: its header does not have the SHA-256 written before it: it is damaged")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    payload = header.get("payload_bytes") if isinstance(header, dict) else None
    if not isinstance(header, dict) or not _is_size(payload) or not isinstance(header.get("payload_sha256"), str):
        raise LoadError(f"packed file {path}: its header is not one that gptfast writes")
    start = aligned(_PREFIX.size + length, PAGE)
    if (needed := start + payload + _SEAL.size) != size:
        raise LoadError(f"packed file {path}: {size:,} bytes, its header asks for {needed:,}: it is truncated")
    file.seek(start + payload)
    seal, magic = _SEAL.unpack(file.read(_SEAL.size))
    if magic != MAGIC or seal.hex() != header["payload_sha256"]:
        raise LoadError(f"packed file {path}: the header and the end of the file name different weights")
    return header, start, payload


def _read_tables(path: Path, header: dict[str, Any], payload: int) -> tuple[GPT2Config, str, dict[str, Entry], dict[str, Any]]:
    """Config, dtype, tensors and files of a header: exactly what this version writes for such a model, all of it in the payload."""

    def malformed(what: str) -> LoadError:
        return LoadError(f"packed file {path}: {what}; this gptfast did not write it, pack the folder again")

    if header.get("dtype") not in DTYPES:
        raise malformed(f"dtype is {str(header.get('dtype'))[:40]!r}, allowed are {', '.join(DTYPES)}")
    if not isinstance(header.get("config"), dict) or not all(isinstance(header.get(name), dict) for name in ("tensors", "files")):
        raise malformed("config, tensors or files are not there")
    try:
        config = GPT2Config.from_dict(header["config"])
    except (Error, TypeError) as error:
        raise LoadError(f"packed file {path}: {error}") from None
    entries = layout(config, header["dtype"])
    for name, entry in entries.items():
        if header["tensors"].get(name) != entry.described():
            raise malformed(f"{name} is not the tensor that its config asks for")
    if len(header["tensors"]) != len(entries):
        raise malformed(f"{(header['tensors'].keys() - entries.keys()).pop()[:80]} belongs to no part of the model")
    end, places = payload_end(entries), {}
    for name, place in header["files"].items():
        size = place.get("bytes") if isinstance(place, dict) else None
        if not _is_size(size) or place != {"offset": end, "bytes": size} or end + size > payload or size > _FILES_LIMIT:
            raise malformed(f"its file {name[:80]} lies elsewhere")
        places[name] = (end, size)
        end += size
    if end != payload:
        raise malformed(f"{payload:,} bytes of payload, {end:,} are described")
    return config, header["dtype"], entries, places


def _is_size(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def verify(path: str | Path) -> Packed:
    """open(), and the payload's SHA-256 as well. Raises gptfast.LoadError where the weights are not those that were packed."""
    found = open(path)
    with builtins.open(path, "rb") as file:
        _, start, payload = _read_header(Path(path), file)
        digest = hashlib.sha256()
        file.seek(start)
        while payload > 0 and (piece := file.read(min(payload, 1 << 24))):
            digest.update(piece)
            payload -= len(piece)
    if digest.hexdigest() != found.payload_sha256:
        raise LoadError(
            f"packed file {path}: its weights have the SHA-256 {digest.hexdigest()[:16]}..., its header says "
            f"{found.payload_sha256[:16]}...: they are damaged, or another model's"
        )
    return found


# ------------------------------------------------------------------------------------------------------------------------- packing


class _Source(NamedTuple):
    """What is packed: state [Hugging Face's shapes] of any float dtype, and the files that go with it."""

    config: GPT2Config
    state: Mapping[str, Tensor]
    files: dict[str, bytes]
    source: str


def _source(model: GPT2LMHeadModel | str | Path, dtype: str) -> _Source:
    if dtype not in DTYPES:
        raise Error(f"dtype is {dtype!r}; allowed in a packed file: {', '.join(DTYPES)}")
    if not isinstance(model, (str, Path)):
        rows = model.config.real_vocabulary
        config = replace(model.config, vocab_size=rows, real_vocab_size=None)
        state = {name: tensor[:rows] if is_by_rows(name) else tensor for name, tensor in model.state_dict().items()}
        return _Source(config, state, _files(None, model.generation_config), "")
    if is_packed(model):
        old = open(model)
        return _Source(old.config, old.state(), old.files, old.source)
    folder = hub.resolve(model)
    config = hub.load_config(folder)
    stored = {name: shape if is_by_rows(name) or not is_matrix(name) else shape[::-1] for name, shape in shapes(config).items()}
    state = hub.load_state(folder, stored, foreign=("score.weight",))
    tokenizer = None
    if any((folder / name).exists() for name in ("tokenizer.json", "vocab.json")):
        tokenizer = GPT2Tokenizer.from_pretrained(folder)
    return _Source(config, state, _files(tokenizer, hub.load_generation_config(folder)), fingerprint(folder))


def fingerprint(folder: Path) -> str:
    """SHA-256 in hex of a folder's place and of the names, sizes and times of every file that decides what is packed."""
    kinds = (hub.WEIGHTS, hub.INDEX, "config.json", "generation_config.json", *hub.TOKENIZER_FILES)
    files = sorted(path for path in folder.iterdir() if path.name in kinds or path.suffix == ".safetensors")
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps([VERSION, str(folder.resolve()), facts]).encode()).hexdigest()


def _files(tokenizer: GPT2Tokenizer | None, generation_config: Mapping[str, Any]) -> dict[str, bytes]:
    files = {_TOKENIZER: tokenizer.to_bytes()} if tokenizer is not None else {}
    return files | ({_GENERATION: json.dumps(generation_config).encode()} if generation_config else {})


def _pack_all(source: _Source, entries: Mapping[str, Entry]) -> Iterator[tuple[str, Tensor]]:
    """Name and packed tensor, one at a time."""
    for name, entry in entries.items():
        tensor = source.state[name].detach().to("cpu", torch.float32)
        if not is_matrix(name):
            yield name, tensor.contiguous()
            continue
        yield name, pack_weight(tensor if is_by_rows(name) else tensor.t(), entry.format).data


def pack(model: GPT2LMHeadModel | str | Path, dtype: str) -> Packed:
    """A model, a folder, a hub id or a packed file of fp32 or bf16, packed in memory. Raises gptfast.Error as write() does."""
    source = _source(model, dtype)
    entries = layout(source.config, dtype)
    return Packed(None, source.config, dtype, dict(_pack_all(source, entries)), entries, source.files, source.source)


def write(model: GPT2LMHeadModel | str | Path, dtype: str, path: str | Path) -> Path:
    """Packs a model, a folder, a hub id or a packed file of fp32 or bf16 into the file `path`; one tensor at a time is in memory.

    The file appears whole, by rename, or not at all. dtype: fp32, bf16, int8 (a scale an output) or int4 (a scale for each 64
    inputs, the head int8). Raises gptfast.Error where it cannot be written and gptfast.LoadError where the source cannot be read.
    """
    source, path = _source(model, dtype), Path(path)
    entries = layout(source.config, dtype)
    places, end = {}, payload_end(entries)
    for name, data in source.files.items():
        places[name] = {"offset": end, "bytes": len(data)}
        end += len(data)
    header: dict[str, Any] = {
        "dtype": dtype, "config": source.config.to_dict(), "tensors": {name: entry.described() for name, entry in entries.items()},
        "files": places, "payload_bytes": end, "payload_sha256": "0" * 64, "source": source.source,
    }
    with _replacing(path) as file:
        start = aligned(_PREFIX.size + len(json.dumps(header)), PAGE)
        file.seek(start)
        digest = hashlib.sha256()
        for _, tensor in _pack_all(source, entries):
            _append(file, tensor.view(-1).view(torch.uint8).numpy(), digest)
            _append(file, bytes(-tensor.nbytes % ALIGNMENT), digest)
        for data in source.files.values():
            _append(file, data, digest)
        file.write(_SEAL.pack(digest.digest(), MAGIC))
        text = json.dumps({**header, "payload_sha256": digest.hexdigest()}).encode()
        file.seek(0)
        file.write(_PREFIX.pack(MAGIC, VERSION, len(text), hashlib.sha256(text).digest()) + text)
    return path


def _append(file: BinaryIO, data: Any, digest: Any) -> None:
    view = memoryview(data)
    for begin in range(0, len(view), 1 << 24):
        file.write(view[begin : begin + (1 << 24)])
        digest.update(view[begin : begin + (1 << 24)])


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path` that takes its name once it is complete and on disk, and is removed where anything fails."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with builtins.open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.absolute().parent)
    except OSError as error:
        if isinstance(error, Error):
            raise
        raise Error(f"packed file {path} cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
