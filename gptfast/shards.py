"""Token shards: how they are written, checked and read as one array.

A data folder holds dataset.json, the tokenizer's files, and shards train_00000.bin, val_00000.bin ... A shard is a header of 1,024
bytes (a magic line, JSON, spaces) and token ids as little-endian uint16 or uint32. Every split starts with <|endoftext|> and has
one after each document, so that each token is predicted from something. data.py makes such a folder from text.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from gptfast.checkpoint import read_json
from gptfast.errors import Error, LoadError, shown

VERSION = 1
MAGIC = b"gptfast-shard\n"
HEADER = 1024  # bytes
SHARD_TOKENS = 1 << 26
SPLITS = ("train", "val")
DTYPES = ("uint16", "uint32")
_HASHED = 1 << 30  # bytes of a split whose hashes are checked whenever it is loaded: a second at most
_CHUNK = 1 << 22  # bytes hashed at once

Ids = npt.NDArray[Any]


# --------------------------------------------------------------------------------------------------------------- writing shards


class ShardWriter:
    """Writes the token ids of one split into numbered shards; `facts` (vocabulary, dtype, ...) go into every header."""

    def __init__(self, folder: Path, split: str, facts: dict[str, Any], shard_tokens: int = SHARD_TOKENS) -> None:
        self.folder, self.split, self.facts, self.limit = folder, split, facts, shard_tokens
        self.dtype = np.dtype(facts["dtype"]).newbyteorder("<")
        self.shards: list[dict[str, Any]] = []
        self.tokens = self.documents = self.bytes = 0
        self._file: Any = None

    def write(self, ids: Sequence[int] | Ids) -> None:
        """Appends ids."""
        array = np.asarray(ids, dtype=self.dtype)
        while array.size:
            if self._file is None:
                self._open()
            part, array = array[: self.limit - self._count], array[self.limit - self._count :]
            data = part.tobytes()
            self._file.write(data)
            self._digest.update(data)
            self._count += part.size
            self.tokens += part.size
            if self._count == self.limit:
                self._finish()

    def _open(self) -> None:
        self._name = f"{self.split}_{len(self.shards):05d}.bin"
        self._file = open(self.folder / self._name, "wb")  # noqa: SIM115 - closed by _finish
        self._file.write(b" " * HEADER)
        self._digest, self._count = hashlib.sha256(), 0

    def _finish(self) -> None:
        facts = {"version": VERSION, "split": self.split, "tokens": self._count, **self.facts}
        header = MAGIC + json.dumps(facts).encode()
        self._file.seek(0)
        self._file.write(header.ljust(HEADER - 1) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        self.shards.append({"file": self._name, "tokens": self._count, "sha256": self._digest.hexdigest()})

    def close(self) -> dict[str, Any]:
        """Completes the last shard; returns the counts and the list of shards."""
        if self._file is not None:
            self._finish()
        return {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes, "shards": self.shards}

    def sync(self) -> dict[str, Any]:
        """Puts on disk what was written so far; returns what resume() goes on from."""
        state: dict[str, Any] = {name: getattr(self, name) for name in ("tokens", "documents", "bytes", "shards")}
        if self._file is None:
            return {**state, "open": None}
        self._file.flush()
        os.fsync(self._file.fileno())
        return {**state, "open": {"file": self._name, "tokens": self._count, "sha256": self._digest.copy().hexdigest()}}

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on from what sync() returned; shards that were begun later are removed, tokens that were written later cut off.

        Raises gptfast.LoadError where a file is not there or not what it was.
        """
        self.tokens, self.documents, self.bytes = state["tokens"], state["documents"], state["bytes"]
        self.shards = list(state["shards"])
        for shard in self.shards:
            path = self.folder / shard["file"]
            if not path.exists() or path.stat().st_size != HEADER + shard["tokens"] * self.dtype.itemsize:
                raise LoadError(f"shard {path}: not as long as when it was finished")
        known = {shard["file"] for shard in (*self.shards, *([state["open"]] if state["open"] else []))}
        for path in self.folder.glob(f"{self.split}_*.bin"):
            if path.name not in known:
                path.unlink()
        if state["open"] is not None:
            self._name, self._count = state["open"]["file"], state["open"]["tokens"]
            self._reopen(state["open"]["sha256"])

    def _reopen(self, sha256: str) -> None:
        path, left = self.folder / self._name, self._count * self.dtype.itemsize
        if not path.exists():
            raise LoadError(f"shard {path}: it is gone")
        self._file, self._digest = open(path, "r+b"), hashlib.sha256()  # noqa: SIM115 - closed by _finish
        self._file.truncate(HEADER + left)
        self._file.seek(HEADER)
        while left > 0 and (data := self._file.read(min(left, _CHUNK))):
            self._digest.update(data)
            left -= len(data)
        if self._digest.copy().hexdigest() != sha256:
            raise LoadError(f"shard {path}: not what was written to it")
        self._file.seek(0, os.SEEK_END)

    def abandon(self) -> None:
        """Closes what is open, whatever the disk says: left to the collector, an error there would be printed."""
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()


# ---------------------------------------------------------------------------------------------------------------- reading shards


def _read_shard(path: Path, meta: dict[str, Any], sha256: str | None) -> Ids:
    """The ids of one shard as a memory map, after its header was compared with dataset.json and its own size, and its ids with the
    hash that is given."""
    try:
        with open(path, "rb") as file:
            header = file.read(HEADER)
        size = path.stat().st_size
    except OSError as error:
        raise LoadError(f"shard {path}: {error.strerror or error}") from error
    try:
        facts = json.loads(header[len(MAGIC) :]) if header.startswith(MAGIC) and len(header) == HEADER else None
        if not isinstance(facts, dict):
            raise ValueError
        version, dtype, tokens, vocabulary = facts["version"], facts["dtype"], int(facts["tokens"]), facts["vocabulary"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise LoadError(f"shard {path}: not a gptfast shard (its header is damaged)") from None
    if version != VERSION:
        raise LoadError(f"shard {path}: version {version}, this gptfast reads {VERSION}")
    if vocabulary != meta["vocabulary"] or dtype != meta["dtype"] or dtype not in DTYPES:
        names = f"{vocabulary!s:.12}, {dtype}", f"{meta['vocabulary']:.12}, {meta['dtype']}"
        raise LoadError(f"shard {path}: made with another tokenizer ({names[0]}) than its folder's ({names[1]})")
    kind = np.dtype(dtype).newbyteorder("<")
    if tokens < 1 or size != HEADER + tokens * kind.itemsize:
        raise LoadError(f"shard {path}: {size} bytes, its header says {HEADER + tokens * kind.itemsize}: truncated or damaged")
    if sha256 is not None and _hash(path) != sha256:
        raise LoadError(f"shard {path}: its ids do not have dataset.json's SHA-256: altered or damaged")
    return np.memmap(path, dtype=kind, mode="r", offset=HEADER, shape=(tokens,))


def _hash(path: Path) -> str:
    """SHA-256 in hex of the ids of a shard."""
    try:
        with open(path, "rb") as file:
            file.seek(HEADER)
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise LoadError(f"shard {path}: {error.strerror or error}") from error


class TokenData:
    """One split: token ids in one or more arrays that are read as one. `bytes` of text behind them (0: unknown)."""

    def __init__(self, parts: Sequence[Ids], eos_token_id: int | None = None, fingerprint: str = "", bytes: int = 0) -> None:
        self.parts, self.eos_token_id, self.bytes = list(parts), eos_token_id, bytes
        self.starts = np.cumsum([0, *(len(part) for part in parts)])
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return int(self.starts[-1])

    @classmethod
    def from_ids(cls, ids: Tensor | Ids | Sequence[int], eos_token_id: int | None = None) -> TokenData:
        """From ids [N] in memory."""
        array = np.ascontiguousarray(ids.cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids))
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise Error(f"token ids have shape {array.shape} and dtype {array.dtype}; one dimension of whole numbers is needed")
        return cls([array], eos_token_id, hashlib.sha256(array.astype("<i8").tobytes()).hexdigest())

    def read(self, start: int, count: int) -> Ids:
        """ids [start, start + count) as int64."""
        out = np.empty(count, dtype=np.int64)
        part, done = int(np.searchsorted(self.starts, start, side="right")) - 1, 0
        while done < count:
            offset = start + done - int(self.starts[part])
            piece = self.parts[part][offset : offset + count - done]
            out[done : done + len(piece)] = piece
            done, part = done + len(piece), part + 1
        return out


def read_meta(folder: Path | str) -> dict[str, Any]:
    """dataset.json of a data folder. Raises gptfast.LoadError where the folder is none."""
    path = Path(folder) / "dataset.json"
    if not path.exists():
        raise LoadError(f"data {folder}: no dataset.json in it; `gptfast prepare` makes a data folder")
    meta = read_json(path)
    if not isinstance(meta, dict) or meta.get("format") != "gptfast-dataset":
        raise LoadError(f"{path}: not a gptfast data set")
    if meta.get("version") != VERSION:
        raise LoadError(f"{path}: version {meta.get('version')}, this gptfast reads {VERSION}")
    try:
        for split in SPLITS:
            for shard in meta[split]["shards"]:
                if Path(shard["file"]).name != shard["file"]:
                    raise LoadError(f"{path}: names the shard {shown(shard['file'])}, which is outside the folder")
                str(shard["sha256"] + ""), int(shard["tokens"])
            int(meta[split]["bytes"]), int(meta[split]["tokens"])
        str(meta["vocabulary"] + meta["dtype"]), int(meta["vocab_size"]), int(meta["eos_token_id"])
        if meta["dtype"] not in DTYPES:
            raise LoadError(f"{path}: dtype is {shown(meta['dtype'])}; allowed: {', '.join(DTYPES)}")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, Error):
            raise
        raise LoadError(f"{path}: malformed ({shown(error)})") from error
    return meta


def load(folder: Path | str, split: str = "train", verify: bool | None = None) -> TokenData:
    """One split, "train" or "val", of a data folder, memory-mapped. Raises gptfast.LoadError for a shard that is damaged or made
    with another tokenizer. verify: whether the ids are hashed as well (None: where that takes about a second at most)."""
    meta = read_meta(folder)
    facts = meta[split]
    if verify is None:
        verify = int(facts["tokens"]) * np.dtype(meta["dtype"]).itemsize <= _HASHED
    parts = [_read_shard(Path(folder) / shard["file"], meta, shard["sha256"] if verify else None) for shard in facts["shards"]]
    if [len(part) for part in parts] != [shard["tokens"] for shard in facts["shards"]]:
        raise LoadError(f"data {folder}: its shards hold other numbers of tokens than dataset.json says")
    fingerprint = hashlib.sha256("".join(shard["sha256"] for shard in facts["shards"]).encode()).hexdigest()
    return TokenData(parts, meta["eos_token_id"], fingerprint, facts["bytes"])


def verify(folder: Path | str) -> dict[str, Any]:
    """dataset.json of a data folder, after every id in it was hashed. Raises gptfast.LoadError for the first shard that is not what
    `gptfast prepare` wrote."""
    for split in SPLITS:
        load(folder, split, verify=True)
    return read_meta(folder)
