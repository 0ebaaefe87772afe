"""Text to token shards: what `gptfast prepare` does, so that it can be killed at any moment and goes on where it stopped.

The data folder OUT comes into being as OUT.partial and appears by rename when it is complete. progress.json in it says how much of
the inputs is encoded and on disk; every ten seconds the shards are synced and it is replaced. A run that finds it cuts the shards
back to what it says, reads the inputs up to that place without encoding them, and goes on. The shards depend on the inputs and the
tokenizer alone: not on the number of processes, nor on where a run was stopped. sources.py reads, encoding.py encodes, shards.py
writes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from gptfast.checkpoint import read_json, sync_folder, write_json
from gptfast.encoding import Encoder, Task
from gptfast.errors import Error, LoadError
from gptfast.pieces import Piece, cut, deal
from gptfast.progress import Bar
from gptfast.shards import (
    HEADER,
    MAGIC,
    SHARD_TOKENS,
    SPLITS,
    VERSION,
    Ids,
    ShardWriter,
    TokenData,
    load,
    read_meta,
    verify,
)
from gptfast.sources import Reader, Source, find, opened, read_texts

if TYPE_CHECKING:
    from gptfast.tokenizer import GPT2Tokenizer

__all__ = [
    "HEADER", "MAGIC", "SHARD_TOKENS", "SPLITS", "VERSION", "Ids", "ShardWriter", "TokenData", "check_new", "cut", "deal", "load",
    "prepare", "read_meta", "read_texts", "verify",
]  # fmt: skip

COMMIT_EVERY = 10.0  # seconds: the most work that a kill costs
_BATCH_CHARS = 1 << 20  # text encoded at once: bounds the memory of prepare
_TRAIN_BYTES = 1 << 28  # a new tokenizer is trained on that much of the inputs; of more, an even share is drawn
_STATE = "progress.json"


def check_new(out: Path, flag: str = "--out") -> None:
    """Raises gptfast.Error if `out` exists and is not an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Error(f"output {out} exists and is not empty; name another with {flag}")


class Place(NamedTuple):
    """How far the inputs are encoded: `pieces` of source number `source`, whose digests make `chain`; `skipped` rows before it."""

    source: int = 0
    pieces: int = 0
    chain: str = ""
    skipped: int = 0


class Done(NamedTuple):
    """What a task stands for: where it ends, documents and bytes of each split in it; `position` in the inputs, in bytes."""

    place: Place
    documents: dict[str, int]
    bytes: dict[str, int]
    position: int


# --------------------------------------------------------------------------------------------------------- the folder in the making


def partial_of(out: Path) -> Path:
    """Where the folder `out` comes into being."""
    return out.with_name(f"{out.name}.partial")


class Partial:
    """OUT.partial: made or, where a run with these settings was interrupted, opened again; a context manager.

    `state` is the last committed progress. When an error leaves it, the folder is removed unless something was committed. Raises
    gptfast.Error where it belongs to a run with other settings or to one that is still running, LoadError where the disk is full.
    """

    def __init__(self, out: Path, settings: dict[str, Any], bar: Bar) -> None:
        self.out, self.settings, self.bar = out, settings, bar
        self.path = partial_of(out)
        self.state: dict[str, Any] = {}
        self.keep = False
        self._lock: int | None = None

    def __enter__(self) -> Self:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY)
            self._take()
            self._open()
        except BaseException as error:
            self._release()
            if isinstance(error, OSError) and not isinstance(error, Error):
                if not self.keep:
                    shutil.rmtree(self.path, ignore_errors=True)
                raise LoadError(f"output {self.path}: {error.strerror or error}") from error
            raise
        return self

    def _take(self) -> None:
        try:
            import fcntl
        except ModuleNotFoundError:  # a system without it: two runs into one folder are the user's to avoid
            return
        try:
            fcntl.flock(self._lock or 0, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Error(f"output {self.path}: another gptfast prepare is writing it") from None

    def _open(self) -> None:
        found = [path for path in self.path.iterdir() if path.name != f"{_STATE}.tmp"]
        if found:  # a kill leaves names with a dot of files that were being written
            if not (self.path / _STATE).exists():
                raise Error(f"output {self.path} exists and is not what an interrupted run left; remove it or name another --out")
            for path in self.path.glob(".*.tmp-*"):
                path.unlink()
            self.state = self._read()
            self.keep = self.state.get("place") is not None
        if not self.keep and not self.state.get("tokenizer"):
            self.commit()

    def _read(self) -> dict[str, Any]:
        state = read_json(self.path / _STATE)
        hint = "remove that folder to start again"
        if not isinstance(state, dict) or state.get("version") != VERSION or not isinstance(state.get("settings"), dict):
            raise LoadError(f"{self.path / _STATE}: not the progress of an interrupted run; {hint}")
        old = state["settings"]
        differ = [name for name in self.settings if old.get(name) != self.settings[name]]
        if not differ:
            return state
        if state.get("place") is None:  # nothing is lost with it
            for path in self.path.iterdir():
                path.unlink()
            return {}
        raise Error(f"output {self.path} is of an interrupted run whose {', '.join(differ)} differ; repeat that command, or {hint}")

    def commit(self, **progress: Any) -> None:
        """Puts progress.json on disk: the settings and what else is known."""
        self.state = {**self.state, **progress, "version": VERSION, "settings": self.settings}
        write_json(self.path / f"{_STATE}.tmp", self.state)
        os.replace(self.path / f"{_STATE}.tmp", self.path / _STATE)
        sync_folder(self.path)
        self.keep = self.state.get("place") is not None

    def publish(self) -> None:
        """The folder is complete: it becomes OUT."""
        sync_folder(self.path)
        if self.out.exists():
            self.out.rmdir()  # check_new found it empty
        os.replace(self.path, self.out)
        sync_folder(self.out.absolute().parent)
        (self.out / _STATE).unlink()
        self.keep = True

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and self.keep:
            self.bar.say(f"what is finished is kept in {self.path}; the same command goes on from there")
        elif error is not None:
            shutil.rmtree(self.path, ignore_errors=True)
        self._release()
        if isinstance(error, OSError) and not isinstance(error, Error):
            raise LoadError(f"output {self.out}: {error.strerror or error}") from error


# ------------------------------------------------------------------------------------------------------------------------ pipeline


def prepare(
    inputs: Sequence[str | Path],
    out: str | Path,
    tokenizer: str | Path | GPT2Tokenizer | None = None,
    train_tokenizer: int | None = None,
    val: float = 0.05,
    progress: bool = True,
    *,
    column: str = "text",
    format: str | None = None,
    skip_bad: bool = False,
    processes: int | None = 1,
) -> dict[str, Any]:
    """Turns text into a data folder; returns the contents of its dataset.json.

    inputs: .txt, .jsonl, .csv, .tsv and .parquet files, folders of them, dataset folders of the library `datasets`, or "-" for
    standard input; `format` is how they are read whatever their names. A row is a document, its text in `column`. out: a folder
    that is new or empty. tokenizer: a folder, a hub id or a tokenizer; or train_tokenizer: the vocabulary size of a new one,
    trained on the training split (default: 8192). val: fraction of documents held out, decided by the hash of each document's
    text. skip_bad: malformed rows are left out and counted ("skipped"). processes: how many encode (1: this one on all its
    threads; None: one a core, for longer texts); more than one start by importing the main script, which therefore must not call
    this at its top level. Memory is bounded by the longest document. A run that was interrupted goes on when it is repeated. Raises
    gptfast.Error for an empty corpus, a malformed row (with file and line), a column that is not there, text that is not UTF-8
    (with the byte's offset), an `out` that is not empty, or a full disk.
    """
    from gptfast.tokenizer import GPT2Tokenizer

    out = Path(out)
    if tokenizer is not None and train_tokenizer is not None:
        raise Error("tokenizer: give --tokenizer or --train-tokenizer, not both")
    if not 0 <= val < 1:
        raise Error(f"val is {val}; a fraction of at least 0 and below 1 is needed")
    if processes is not None and not 1 <= processes <= 1024:
        raise Error(f"processes is {processes}; allowed: 1 to 1024")
    check_new(out)
    sources = find(inputs, format, without=partial_of(out))
    if tokenizer is not None and not isinstance(tokenizer, GPT2Tokenizer):
        tokenizer = GPT2Tokenizer.from_pretrained(tokenizer)
    vocabulary = train_tokenizer or 8192
    facts = [[source.name, source.kind, source.size, _changed_at(source)] for source in sources]
    settings = {
        "inputs": hashlib.sha256(json.dumps(facts).encode()).hexdigest(), "val": val, "column": column,
        "tokenizer": vocabulary if tokenizer is None else tokenizer.fingerprint(),
    }  # fmt: skip
    with Bar(progress) as bar, Partial(out, settings, bar) as partial:
        reader = Reader(column, skip_bad, bar.say)
        if tokenizer is None:
            tokenizer, sources = _trained(partial, sources, reader, vocabulary, val)
        with Encoder(tokenizer.to_json(), _end(tokenizer), processes) as encoder:
            meta = _write(partial, sources, reader, tokenizer, val, encoder)
        partial.publish()
    return meta


def _changed_at(source: Source) -> int:
    return source.path.stat().st_mtime_ns if source.path is not None else 0


def _end(tokenizer: GPT2Tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise Error("the tokenizer has no <|endoftext|>, which separates documents")
    return tokenizer.eos_token_id


def _trained(
    partial: Partial, sources: list[Source], reader: Reader, size: int, val: float
) -> tuple[GPT2Tokenizer, list[Source]]:
    """A tokenizer trained on the sources, or the one that an interrupted run trained; and the sources to encode: standard input,
    which is needed twice, is kept in a file."""
    from gptfast.tokenizer import GPT2Tokenizer

    kept = partial.path / "standard_input"
    if partial.state.get("tokenizer"):
        kept.unlink(missing_ok=True)
        tokenizer = GPT2Tokenizer.from_pretrained(partial.path)
        if tokenizer.fingerprint() != partial.state["tokenizer"]:
            raise LoadError(f"{partial.path}: the tokenizer in it was altered; remove that folder to start again")
        return tokenizer, sources
    for number, source in enumerate(sources):
        if source.path is None:
            partial.bar.begin("reading standard input")
            with opened(source) as file, open(kept, "wb") as copy:
                while data := file.read(1 << 20):
                    partial.bar.to(copy.tell() + copy.write(data))
            sources[number] = source._replace(path=kept, size=kept.stat().st_size)
    total = sum(source.size for source in sources)
    partial.bar.begin("training the tokenizer", total)
    # bad rows are reported when they are encoded
    texts = _sample(sources, Reader(reader.column, reader.skip_bad), val, _TRAIN_BYTES / max(total, 1), partial.bar)
    tokenizer = GPT2Tokenizer.train(texts, size)
    tokenizer.save_pretrained(partial.path)
    partial.commit(tokenizer=tokenizer.fingerprint())
    return tokenizer, sources


def _sample(sources: list[Source], reader: Reader, val: float, share: float, bar: Bar) -> Iterator[str]:
    """The training split's text, or about `share` of it, chosen by other bytes of the hash than the split is."""
    before = 0
    for source in sources:
        for piece in reader.pieces(source, val):
            bar.to(before + reader.position)
            if piece.split == "train" and int.from_bytes(piece.digest[8:16], "big") < share * 2.0**64:
                yield piece.text
        before += source.size


def _placed(sources: list[Source], reader: Reader, val: float, start: Place) -> Iterator[tuple[Piece, Place]]:
    """Every piece after `start`, with the place behind it. Raises gptfast.LoadError where what comes before is not what it was."""
    reader.skipped = start.skipped
    for number in range(start.source, len(sources)):
        source, skipped, chain, count = sources[number], reader.skipped, b"", 0
        before = start.pieces if number == start.source else 0
        for piece in reader.pieces(source, val):
            count += 1
            chain = hashlib.sha256(chain + piece.digest).digest()
            if count > before:
                yield piece, Place(number, count, chain.hex(), skipped)
            elif count == before and chain.hex() != start.chain:
                break
        if count < before or (count == before and count and chain.hex() != start.chain):
            raise LoadError(f"{source.name}: changed since the run that is to go on was interrupted")


def _tasks(sources: list[Source], reader: Reader, val: float, start: Place) -> Iterator[tuple[Task, Done]]:
    """The pieces in batches of bounded size."""
    sizes = [0, *(source.size for source in sources)]
    batch: list[tuple[Piece, Place]] = []
    waiting = 0

    def made() -> tuple[Task, Done]:
        pieces, place = [piece for piece, _ in batch], batch[-1][1]
        documents, lengths = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
        for piece in pieces:
            documents[piece.split] += piece.ends
            lengths[piece.split] += piece.size
        task = Task([piece.text for piece in pieces], [piece.split for piece in pieces], [piece.ends for piece in pieces])
        return task, Done(place, documents, lengths, sum(sizes[: place.source + 1]) + reader.position)

    for piece, place in _placed(sources, reader, val, start):
        batch.append((piece, place))
        waiting += len(piece.text) + 100
        if waiting >= _BATCH_CHARS:
            yield made()
            batch, waiting = [], 0
    if batch:
        yield made()


def _write(
    partial: Partial, sources: list[Source], reader: Reader, tokenizer: GPT2Tokenizer, val: float, encoder: Encoder
) -> dict[str, Any]:
    """Encodes the sources, or what is left of them, into the folder in the making; returns the contents of its dataset.json."""
    size = len(tokenizer)
    vocabulary = {"vocab_size": size, "vocabulary": tokenizer.fingerprint(), "eos_token_id": tokenizer.eos_token_id}
    facts = {"dtype": "uint16" if size <= 1 << 16 else "uint32", **vocabulary}
    writers = {split: ShardWriter(partial.path, split, facts) for split in SPLITS}
    try:
        start = _resume(partial, writers)
        partial.bar.begin("encoding", sum(source.size for source in sources))
        _encode(partial, encoder.map(_tasks(sources, reader, val, start)), writers)
        for split, reason in (("val", "is empty: no text in any of the inputs"), ("train", _TOO_SMALL)):
            if not writers["train"].tokens and (split == "train" or not writers["val"].tokens):
                partial.keep = False
                raise Error(f"the corpus {reason}")
        splits = {split: writer.close() for split, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.abandon()
    meta = {"format": "gptfast-dataset", "version": VERSION, **facts, **splits, "skipped": reader.skipped}
    tokenizer.save_pretrained(partial.path)
    (partial.path / "standard_input").unlink(missing_ok=True)
    write_json(partial.path / "dataset.json", meta)
    return meta


_TOO_SMALL = "is too small: every document was held out; give more text or a smaller --val"


def _resume(partial: Partial, writers: dict[str, ShardWriter]) -> Place:
    """Where the interrupted run stopped, with its shards opened again; Place() for a new one."""
    if partial.state.get("place") is None:
        for path in partial.path.glob("*.bin"):
            path.unlink()
        return Place()
    try:
        place = Place(**partial.state["place"])
        for split, writer in writers.items():
            writer.resume(partial.state["splits"][split])
    except (KeyError, TypeError, LoadError) as error:
        reason = str(error) if isinstance(error, LoadError) else f"{partial.path / _STATE}: malformed"
        raise LoadError(f"{reason}; remove {partial.path} to start again") from error
    partial.bar.say(f"going on after {sum(writer.tokens for writer in writers.values()):,} tokens in {partial.path}")
    return place


def _encode(partial: Partial, results: Iterable[tuple[dict[str, Any], Done]], writers: dict[str, ShardWriter]) -> None:
    committed = time.monotonic()
    for ids, done in results:
        for split, array in ids.items():
            writer = writers[split]
            if not writer.tokens:
                writer.write([writer.facts["eos_token_id"]])
            writer.write(array)
            writer.documents += done.documents[split]
            writer.bytes += done.bytes[split]
        partial.bar.to(done.position)
        if time.monotonic() - committed >= COMMIT_EVERY:
            splits = {split: writer.sync() for split, writer in writers.items()}
            partial.commit(place=done.place._asdict(), splits=splits)
            committed = time.monotonic()
