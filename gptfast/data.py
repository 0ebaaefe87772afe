"""Text to token shards, and token shards to batches.

A data folder holds dataset.json, the tokenizer's files, and shards train_00000.bin, val_00000.bin ... A shard is a header of 1,024
bytes (a magic line, JSON, spaces) and token ids as little-endian uint16 or uint32. Every split starts with <|endoftext|> and has
one after each document, so that each token is predicted from something. The folder appears by rename when it is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from gptfast.checkpoint import read_json, sync_folder, write_json
from gptfast.errors import Error, LoadError, shown

if TYPE_CHECKING:
    from gptfast.tokenizer import GPT2Tokenizer

VERSION = 1
MAGIC = b"gptfast-shard\n"
HEADER = 1024  # bytes
SHARD_TOKENS = 1 << 26
SPLITS = ("train", "val")
_ENCODE_CHARS = 1 << 20  # text encoded at once: bounds the memory of prepare
_CUT = re.compile(r"\S\n(?=\S)")  # here GPT-2's pre-tokenizer ends a piece whatever follows, so a cut changes no token

Ids = npt.NDArray[Any]


# ----------------------------------------------------------------------------------------------------------------- reading text


class Piece(NamedTuple):
    """Some text of a document; `ends` where the document does."""

    text: str
    split: str
    ends: bool


def _input_files(inputs: Sequence[str | Path]) -> list[Path]:
    files: list[Path] = []
    for item in map(Path, inputs):
        if item.is_dir():
            files += sorted(path for path in item.rglob("*") if path.suffix in (".txt", ".jsonl") and path.is_file())
        elif not item.exists():
            raise LoadError(f"input {item}: no such file or folder")
        elif item.suffix not in (".txt", ".jsonl"):
            raise Error(f"input {item}: allowed are .txt and .jsonl files and folders of them")
        else:
            files.append(item)
    if not files:
        raise Error(f"input {', '.join(map(str, inputs))}: no .txt or .jsonl file in it")
    return files


def _jsonl(path: Path) -> Iterator[str]:
    """The "text" of every line of a .jsonl file; blank lines are skipped. Raises gptfast.LoadError with file and line."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise LoadError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(value, dict) or not isinstance(value.get("text"), str):
                raise LoadError(f'{path}, line {number}: an object with a string "text" is needed')
            yield value["text"]


def read_texts(path: Path) -> Iterator[str]:
    """The documents of one file: each line's of a .jsonl file, else the whole. Raises gptfast.LoadError where it is not UTF-8."""
    if not path.is_file():
        raise LoadError(f"data {path}: no such file")
    if path.suffix == ".jsonl":
        yield from _jsonl(path)
    else:
        yield "".join(_text_file(path))


def _cut_at(text: str, size: int) -> int:
    """Where to cut a piece of at least `size` characters off the front of `text`; 0 if more text is needed to tell."""
    if len(text) < 2 * size:
        return 0
    match = _CUT.search(text, size)
    if match:
        return match.end()
    return size if len(text) >= 16 * size else 0


def cut(blocks: Iterable[str], size: int) -> Iterator[str]:
    """The same text in pieces of about `size` characters, cut at line ends where the pieces have the tokens of the whole."""
    rest = ""
    for block in blocks:
        rest += block
        while at := _cut_at(rest, size):
            yield rest[:at]
            rest = rest[at:]
    if rest:
        yield rest


def _text_file(path: Path) -> Iterator[str]:
    """A .txt file in pieces, small enough that a part of them can be held out and large enough that few documents are cut."""
    size = min(max(path.stat().st_size // 256, 1 << 12), 1 << 20)
    with open(path, encoding="utf-8", newline="") as file:
        try:
            yield from cut(iter(lambda: file.read(size), ""), size)
        except UnicodeDecodeError as error:
            raise LoadError(f"{path}: not UTF-8 text (byte 0x{error.object[error.start]:02x})") from error


def deal(text: str | bytes, val: float) -> str:
    """The split a document belongs to: a function of its own text, so that copies of it never land in both."""
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return "val" if int.from_bytes(hashlib.sha256(data).digest()[:8], "big") < val * 2.0**64 else "train"


def _pieces(path: Path, val: float) -> Iterator[Piece]:
    """A .jsonl line is a document. A .txt file is one too, but a piece of it that is dealt to the other split ends the document."""
    if path.suffix == ".jsonl":
        for text in _jsonl(path):
            split = deal(text, val)
            parts = list(cut([text], _ENCODE_CHARS))
            for number, part in enumerate(parts, 1):
                yield Piece(part, split, number == len(parts))
        return
    last: Piece | None = None
    for text in _text_file(path):
        split = deal(text, val)
        if last is not None:
            yield last._replace(ends=last.split != split)
        last = Piece(text, split, True)
    if last is not None:
        yield last


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

    def abandon(self) -> None:
        """Closes what is open, whatever the disk says: left to the collector, an error there would be printed."""
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()


def _encode(pieces: Iterable[Piece], tokenizer: GPT2Tokenizer, writers: dict[str, ShardWriter], report: Any) -> None:
    """Encodes in batches of bounded size and hands each piece's ids to its split's writer."""
    if tokenizer.eos_token_id is None:
        raise Error("the tokenizer has no <|endoftext|>, which separates documents")
    eos = [tokenizer.eos_token_id]
    batch: list[Piece] = []

    def flush() -> None:
        for piece, ids in zip(batch, tokenizer([piece.text for piece in batch])["input_ids"], strict=True):
            writer = writers[piece.split]
            if not writer.tokens:
                writer.write(eos)
            writer.write(ids)
            writer.bytes += len(piece.text.encode("utf-8", "surrogatepass"))
            if piece.ends:
                writer.write(eos)
                writer.documents += 1
        report(sum(writer.bytes for writer in writers.values()))
        batch.clear()

    waiting = 0
    for piece in pieces:
        batch.append(piece)
        waiting += len(piece.text) + 100
        if waiting >= _ENCODE_CHARS:
            flush()
            waiting = 0
    if batch:
        flush()


def check_new(out: Path, flag: str = "--out") -> None:
    """Raises gptfast.Error if `out` exists and is not an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Error(f"output {out} exists and is not empty; name another with {flag}")


def prepare(
    inputs: Sequence[str | Path],
    out: str | Path,
    tokenizer: str | Path | GPT2Tokenizer | None = None,
    train_tokenizer: int | None = None,
    val: float = 0.05,
    progress: bool = True,
) -> dict[str, Any]:
    """Turns .txt and .jsonl files, and folders of them, into a data folder; returns the contents of its dataset.json.

    inputs: a .jsonl line is {"text": ...} and one document. out: a folder that is new or empty. tokenizer: a folder, a hub id or a
    tokenizer; or train_tokenizer: the vocabulary size of a new one, trained on the training split (default: 8192). val: fraction
    of documents held out, decided by the hash of each document's text. Memory is bounded by the longest line. Raises gptfast.Error
    for an empty corpus, a malformed line (with file and line), or an `out` that is not empty.
    """
    from gptfast.tokenizer import GPT2Tokenizer
    from gptfast.training.log import Line

    out = Path(out)
    if tokenizer is not None and train_tokenizer is not None:
        raise Error("tokenizer: give --tokenizer or --train-tokenizer, not both")
    if not 0 <= val < 1:
        raise Error(f"val is {val}; a fraction of at least 0 and below 1 is needed")
    check_new(out)
    files = _input_files(inputs)
    total = sum(path.stat().st_size for path in files)
    with Line(progress) as line:
        if tokenizer is None:
            line.show("training the tokenizer")
            text = (piece.text for path in files for piece in _pieces(path, val) if piece.split == "train")
            tokenizer = GPT2Tokenizer.train(text, train_tokenizer or 8192)
        elif not isinstance(tokenizer, GPT2Tokenizer):
            tokenizer = GPT2Tokenizer.from_pretrained(tokenizer)
        pieces = (piece for path in files for piece in _pieces(path, val) if piece.text)
        return write(pieces, out, tokenizer, lambda done: line.show(f"encoding: {done / 1e6:,.1f} of {total / 1e6:,.1f} MB"))


def write(pieces: Iterable[Piece], out: Path, tokenizer: GPT2Tokenizer, report: Any = lambda done: None) -> dict[str, Any]:
    """Encodes `pieces` and writes the data folder `out`; returns the contents of its dataset.json. `report(bytes done)` is called
    as it goes on. Raises gptfast.Error where there is no text, gptfast.LoadError where the disk is full."""
    size = len(tokenizer)
    vocabulary = {"vocab_size": size, "vocabulary": tokenizer.fingerprint(), "eos_token_id": tokenizer.eos_token_id}
    facts = {"dtype": "uint16" if size <= 1 << 16 else "uint32", **vocabulary}
    temporary = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    writers = {split: ShardWriter(temporary, split, facts) for split in SPLITS}
    try:
        temporary.mkdir(parents=True)
        _encode(pieces, tokenizer, writers, report)
        if not writers["train"].tokens and not writers["val"].tokens:
            raise Error("the corpus is empty: no text in any of the inputs")
        if not writers["train"].tokens:
            raise Error("the corpus is too small: every document was held out; give more text or a smaller --val")
        meta = {"format": "gptfast-dataset", "version": VERSION, **facts, **{name: writers[name].close() for name in SPLITS}}
        tokenizer.save_pretrained(temporary)
        write_json(temporary / "dataset.json", meta)
        sync_folder(temporary)
        if out.exists():
            out.rmdir()  # check_new found it empty
        os.replace(temporary, out)
        sync_folder(out.absolute().parent)
    except OSError as error:
        if isinstance(error, Error):
            raise
        raise LoadError(f"output {out}: {error.strerror or error}") from error
    finally:
        for writer in writers.values():
            writer.abandon()
        shutil.rmtree(temporary, ignore_errors=True)
    return meta


# ---------------------------------------------------------------------------------------------------------------- reading shards


def _read_shard(path: Path, meta: dict[str, Any]) -> Ids:
    """The ids of one shard as a memory map, after its header was compared with dataset.json and its own size."""
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
    if vocabulary != meta["vocabulary"] or dtype != meta["dtype"] or dtype not in ("uint16", "uint32"):
        names = f"{vocabulary!s:.12}, {dtype}", f"{meta['vocabulary']:.12}, {meta['dtype']}"
        raise LoadError(f"shard {path}: made with another tokenizer ({names[0]}) than its folder's ({names[1]})")
    kind = np.dtype(dtype).newbyteorder("<")
    if tokens < 1 or size != HEADER + tokens * kind.itemsize:
        raise LoadError(f"shard {path}: {size} bytes, its header says {HEADER + tokens * kind.itemsize}: truncated or damaged")
    return np.memmap(path, dtype=kind, mode="r", offset=HEADER, shape=(tokens,))


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
            int(meta[split]["bytes"])
        str(meta["vocabulary"] + meta["dtype"]), int(meta["vocab_size"]), int(meta["eos_token_id"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, Error):
            raise
        raise LoadError(f"{path}: malformed ({shown(error)})") from error
    return meta


def load(folder: Path | str, split: str = "train") -> TokenData:
    """One split, "train" or "val", of a data folder, memory-mapped. Raises gptfast.LoadError for a shard that is damaged or made
    with another tokenizer."""
    meta = read_meta(folder)
    facts = meta[split]
    parts = [_read_shard(Path(folder) / shard["file"], meta) for shard in facts["shards"]]
    if [len(part) for part in parts] != [shard["tokens"] for shard in facts["shards"]]:
        raise LoadError(f"data {folder}: its shards hold other numbers of tokens than dataset.json says")
    fingerprint = hashlib.sha256("".join(shard["sha256"] for shard in facts["shards"]).encode()).hexdigest()
    return TokenData(parts, meta["eos_token_id"], fingerprint, facts["bytes"])
