"""Where text comes from: files, folders, Hugging Face datasets on disk and standard input, read a document at a time.

.txt is text; a line of .jsonl, a row of .csv, .tsv or .parquet and a row of a dataset folder is a document, in the column "text"
unless another is named. Parquet and dataset folders need pyarrow (the `data` extra). However large an input is, no more of it is in
memory than a document, a block of a text file, or a batch of rows.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from gptfast.errors import Error, LoadError, shown
from gptfast.pieces import Piece, cut, split_of

_PIPE = "standard input"
KINDS = ("txt", "jsonl", "csv", "tsv", "parquet")
_BY_SUFFIX = {f".{kind}": kind for kind in KINDS}
_ALLOWED = ".txt, .jsonl, .csv, .tsv and .parquet files, folders of them, dataset folders and -"
_LONGEST = 1 << 28  # bytes of a line, characters of a field: more is a file of another format
_ROWS = 256  # of a table, in memory at once
_PARTS = 1 << 20  # characters: a longer document is encoded in pieces of this size
_SHOWN = 3  # bad places that are named where they are skipped; the others are counted


class Source(NamedTuple):
    """One file, or standard input (path None until it is kept in a file). size: bytes on disk, 0 if unknown."""

    name: str
    kind: str
    path: Path | None
    size: int


# ------------------------------------------------------------------------------------------------------------------ what there is


def find(inputs: Sequence[str | Path], kind: str | None = None, without: Path | None = None) -> list[Source]:
    """The sources behind `inputs`, in order; `kind` is how they are read whatever their suffix; a folder's files below `without`
    are left out. Raises gptfast.LoadError for one that is not there, gptfast.Error for one that holds nothing to read."""
    if kind is not None and kind not in KINDS:
        raise Error(f"format is {shown(kind)}; allowed: {', '.join(KINDS)}")
    sources: list[Source] = []
    for item in inputs:
        path = Path(item)
        if str(item) == "-":
            if any(source.path is None for source in sources):
                raise Error("input -: standard input can be read once")
            if kind == "parquet":
                raise Error("input -: a Parquet file is read from its end, which standard input does not have; name a file")
            sources.append(Source(_PIPE, kind or "txt", None, 0))
        elif path.is_dir():
            sources += _in_folder(path, kind, without)
        elif not path.exists():
            raise LoadError(f"input {path}: no such file or folder")
        elif kind is None and path.suffix not in _BY_SUFFIX:
            raise Error(f"input {path}: allowed are {_ALLOWED}; --format says how another file is read")
        else:
            sources.append(Source(str(path), kind or _BY_SUFFIX[path.suffix], path, path.stat().st_size))
    return sources


def _in_folder(folder: Path, kind: str | None, without: Path | None) -> list[Source]:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return _dataset(folder)
    wanted = _BY_SUFFIX if kind is None else {f".{kind}": kind}
    paths = sorted(path for path in folder.rglob("*") if path.suffix in wanted and path.is_file())
    if without is not None and without.resolve().is_relative_to(folder.resolve()):
        paths = [path for path in paths if not path.resolve().is_relative_to(without.resolve())]
    if not paths:
        raise Error(f"input {folder}: no {', '.join(wanted)} file in it")
    return [Source(str(path), wanted[path.suffix], path, path.stat().st_size) for path in paths]


def _dataset(folder: Path) -> list[Source]:
    """The Arrow files of a dataset that save_to_disk() of the library `datasets` wrote; of several splits the one called train."""
    if (folder / "dataset_dict.json").exists():
        splits = _json(folder / "dataset_dict.json").get("splits")
        if not isinstance(splits, list) or "train" not in splits:
            raise Error(f"input {folder}: a dataset with the splits {shown(splits)} and no train; name one split's folder")
        return _dataset(folder / "train")
    state = _json(folder / "state.json")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise LoadError(f"input {folder}: its rows are chosen by an index file; save the dataset again with flatten_indices()")
    try:
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except (KeyError, TypeError):
        raise LoadError(f"{folder / 'state.json'}: no list of data files; this is no dataset folder") from None
    sources = []
    for name in names:
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise LoadError(f"{folder / 'state.json'}: names {shown(name)}, which is no file of the folder")
        sources.append(Source(str(path), "arrow", path, path.stat().st_size))
    if not sources:
        raise Error(f"input {folder}: a dataset without rows")
    return sources


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise LoadError(f"{path}: an object is needed")
    return value


# ------------------------------------------------------------------------------------------------------------------------ reading


class Reader:
    """Reads documents; `position` is how many bytes of the current source it is through, `skipped` how many bad rows it left out.

    column: the name of the text in rows. skip_bad: a malformed row is counted, and said through `say`, instead of raised as
    gptfast.LoadError with file and line.
    """

    def __init__(self, column: str = "text", skip_bad: bool = False, say: Callable[[str], None] = lambda text: None) -> None:
        self.column, self.skip_bad, self.say = column, skip_bad, say
        self.position = self.skipped = 0

    def documents(self, source: Source) -> Iterator[str]:
        """The text of every row of a source that has rows, in order."""
        self.position = 0
        read = {"jsonl": self._jsonl, "csv": self._csv, "tsv": self._csv, "parquet": self._parquet, "arrow": self._arrow}
        yield from read[source.kind](source)

    def blocks(self, source: Source, size: int) -> Iterator[str]:
        """A text source in blocks of at most `size` characters. Raises gptfast.LoadError where it is not UTF-8."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        self.position = 0
        with opened(source) as file:
            while True:
                data = file.read(size)
                start = self.position - len(decoder.getstate()[0])  # bytes of a character that the last block cut
                try:
                    text = decoder.decode(data, final=not data)
                except UnicodeDecodeError as error:
                    place = f"byte 0x{error.object[error.start]:02x} at offset {start + error.start:,}"
                    raise LoadError(f"{source.name}: not UTF-8 text ({place})") from error
                self.position += len(data)
                if text:
                    yield text
                if not data:
                    return

    def pieces(self, source: Source, val: float) -> Iterator[Piece]:
        """Everything in a source, dealt to the splits.

        A row is a document. A text file is one too, but a piece of it that is dealt to the other split ends the document.
        """
        if source.kind != "txt":
            for text in self.documents(source):
                digest = hashlib.sha256(text.encode()).digest()
                parts = [text] if len(text) <= _PARTS else list(cut([text], _PARTS))
                for number, part in enumerate(parts, 1):
                    if part:
                        yield Piece(part, split_of(digest, val), number == len(parts), len(part.encode()), digest)
            return
        # small enough that a part of them can be held out and large enough that few documents are cut
        size = min(max(source.size // 256, 1 << 12), 1 << 20) if source.name != _PIPE else 1 << 14
        last: Piece | None = None
        for text in cut(self.blocks(source, size), size):
            data = text.encode()
            digest = hashlib.sha256(data).digest()
            split = split_of(digest, val)
            if last is not None:
                yield last._replace(ends=last.split != split)
            last = Piece(text, split, True, len(data), digest)
        if last is not None:
            yield last

    def _bad(self, place: str, reason: str) -> None:
        if not self.skip_bad:
            raise LoadError(f"{place}: {reason}")
        self.skipped += 1
        if self.skipped <= _SHOWN:
            self.say(f"skipped {place}: {reason}")

    def _text(self, value: Any, place: str, needed: str) -> Iterator[str]:
        """The text of one row, or nothing where it is bad and skipped."""
        if not isinstance(value, str):
            self._bad(place, needed)
        elif not value.isascii() and (half := re.search("[\ud800-\udfff]", value)):
            self._bad(place, f"the text holds half of a surrogate pair, U+{ord(half[0]):04X}, which is no Unicode text")
        else:
            yield value

    def _jsonl(self, source: Source) -> Iterator[str]:
        needed = f'an object with a string "{self.column}" is needed'
        with opened(source) as file:
            for number, line in enumerate(_lines(file), 1):
                self.position += len(line)
                if not line.strip():
                    continue
                place = f"{source.name}, line {number}"
                if len(line) > _LONGEST:
                    self._bad(place, f"longer than {_LONGEST:,} bytes; a document a line is needed")
                    continue
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as error:
                    self._bad(place, f"not JSON ({error})")
                    continue
                found = value.get(self.column) if isinstance(value, dict) else None
                has = "" if found is not None or not isinstance(value, dict) else f"; it has {_listed(value)}"
                yield from self._text(found, place, needed + has)

    def _csv(self, source: Source) -> Iterator[str]:
        limit = csv.field_size_limit(_LONGEST)  # of the whole process, so it is put back
        try:
            with opened(source) as file:
                how: Any = {"delimiter": ","} if source.kind == "csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
                yield from self._csv_rows(source, csv.reader(self._decoded(file, source), strict=True, **how))
        finally:
            csv.field_size_limit(limit)

    def _csv_rows(self, source: Source, rows: Any) -> Iterator[str]:
        names: list[str] | None = None
        while True:
            place = f"{source.name}, line {rows.line_num + 1}"
            try:
                row = next(rows, None)
            except csv.Error as error:
                if names is None:
                    raise LoadError(f"{place}: not {source.kind.upper()} ({error})") from None
                self._bad(place, f"not {source.kind.upper()} ({error})")
                continue
            if row is None:
                return
            if not row:
                continue
            if names is None:
                names = row
                column = self._column(source, names)
            elif len(row) != len(names):
                self._bad(place, f"{len(row)} fields, the first line names {len(names)}")
            else:
                yield from self._text(row[column], place, "")

    def _decoded(self, file: BinaryIO, source: Source) -> Iterator[str]:
        """Lines of text; a line that is not UTF-8 is an error whatever is skipped, for it may be any line of a quoted field."""
        for number, line in enumerate(_lines(file), 1):
            if len(line) > _LONGEST:
                raise LoadError(f"{source.name}, line {number}: longer than {_LONGEST:,} bytes")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                place = f"byte 0x{line[error.start]:02x} at offset {self.position + error.start:,}"
                raise LoadError(f"{source.name}, line {number}: not UTF-8 text ({place})") from error
            self.position += len(line)
            yield text

    def _column(self, source: Source, names: Sequence[str]) -> int:
        if self.column not in names:
            there = f"it has {_listed(names)}; --column names the one with the text"
            raise Error(f"{source.name}: no column {shown(self.column)}; {there}")
        return list(names).index(self.column)

    def _parquet(self, source: Source) -> Iterator[str]:
        arrow = _pyarrow()
        with _readable(arrow, source, "Parquet"), arrow.parquet.ParquetFile(str(source.path), buffer_size=1 << 20) as table:
            self._column(source, table.schema_arrow.names)
            done, total = 0, max(table.metadata.num_rows, 1)
            for batch in table.iter_batches(batch_size=_ROWS, columns=[self.column], use_threads=False):
                self.position = source.size * done // total
                yield from self._rows(source, batch.column(0), done)
                done += len(batch)

    def _arrow(self, source: Source) -> Iterator[str]:
        arrow = _pyarrow()
        with (
            _readable(arrow, source, "Arrow"), arrow.memory_map(str(source.path)) as file, arrow.ipc.open_stream(file) as stream,
        ):  # fmt: skip
            place, done = self._column(source, stream.schema.names), 0
            for batch in stream:
                column = batch.column(place)
                column.validate(full=True)  # the bytes are those of the file, and nothing has looked at them yet
                for start in range(0, len(column), _ROWS):
                    yield from self._rows(source, column[start : start + _ROWS], done + start)
                done += len(column)
                self.position = file.tell()

    def _rows(self, source: Source, values: Any, before: int) -> Iterator[str]:
        try:
            found = values.to_pylist()
        except UnicodeDecodeError as error:
            place = f"rows {before + 1:,} to {before + len(values):,}"
            raise LoadError(f"{source.name}, {place}: not UTF-8 text (byte 0x{error.object[error.start]:02x})") from None
        for number, value in enumerate(found, before + 1):
            needed = f"{shown(self.column)} is {shown(value)}; text is needed"
            yield from self._text(value, f"{source.name}, row {number:,}", needed)


def opened(source: Source) -> BinaryIO:
    """The source's bytes; standard input is handed out under another handle: closing that leaves the process's own open."""
    try:
        if source.path is not None:
            return open(source.path, "rb")
        stream: Any = sys.stdin.buffer
        return open(stream.fileno(), "rb", closefd=False) if hasattr(stream, "raw") else stream  # type: ignore[no-any-return]
    except OSError as error:
        raise LoadError(f"{source.name}: {error.strerror or error}") from error


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines with their ends; of one longer than _LONGEST no more than that is kept."""
    while line := file.readline(_LONGEST + 1):
        while len(line) > _LONGEST and not line.endswith(b"\n") and (rest := file.readline(_LONGEST)):
            line = line[:_LONGEST] + rest[-1:]
        yield line


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise Error("Parquet files and dataset folders need pyarrow: pip install 'gptfast-torch[data]'") from None
    return pyarrow


@contextlib.contextmanager
def _readable(arrow: Any, source: Source, what: str) -> Iterator[None]:
    """What pyarrow raises for a file that is damaged, as gptfast.LoadError."""
    try:
        yield
    except Error:
        raise
    except (arrow.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise LoadError(f"{source.name}: not a whole {what} file ({reason})") from None


def _listed(names: Iterable[Any]) -> str:
    """The first names of columns."""
    found = [str(name)[:40] for name in names]
    return ", ".join(found[:20]) + (", ..." if len(found) > 20 else "")


def read_texts(path: Path) -> Iterator[str]:
    """The documents of one file: each row's of a file that has rows, else the whole. Raises gptfast.LoadError where one is bad."""
    if not path.is_file():
        raise LoadError(f"data {path}: no such file")
    kind, reader = _BY_SUFFIX.get(path.suffix, "txt"), Reader()
    source = Source(str(path), kind, path, path.stat().st_size)
    if kind == "txt":
        yield "".join(reader.blocks(source, _PARTS))
    else:
        yield from reader.documents(source)
