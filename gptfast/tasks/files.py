"""Task files line by line: .jsonl, .tsv and .csv, each also as .gz, with errors that name file and line."""

from __future__ import annotations

import csv
import gzip
import json
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from gptfast.errors import Error, LoadError, shown

T = TypeVar("T")
SUFFIXES = (".jsonl", ".tsv", ".csv", ".txt")


class Record(NamedTuple):
    """One line: its values by name (for .txt: "text")."""

    path: Path
    line: int
    values: dict[str, Any]

    def error(self, problem: str) -> LoadError:
        """The error to raise for this line."""
        return LoadError(f"{self.path}, line {self.line}: {problem}")

    def text(self, name: str) -> str:
        """A value that has to be there and to be a text with more than spaces in it. Raises gptfast.LoadError."""
        value = self.values.get(name)
        if value is None:
            raise self.error(f"{name} is missing")
        if not isinstance(value, str):
            raise self.error(f"{name} is {shown(value)}; a text is needed")
        if not value.strip():
            raise self.error(f"{name} is empty")
        return value


@dataclass
class Examples(Generic[T]):
    """What was read from a file, and how many of its lines were skipped as bad."""

    path: Path
    items: list[T] = field(default_factory=list)
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[T]:
        return iter(self.items)

    def __getitem__(self, index: int) -> T:
        return self.items[index]

    def place(self, line: int) -> str:
        """Where an example stands, for an error."""
        return f"{self.path}, line {line}" if line else str(self.path)


def suffix(path: Path) -> str:
    """That of the name, without .gz."""
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 text file, or of one in a .gz, with their ends. Raises gptfast.LoadError where it is none."""
    if not path.is_file():
        raise LoadError(f"data {path}: no such file")
    opened = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opened(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise LoadError(f"{path}, line {number}: not UTF-8 text (byte 0x{error.object[error.start]:02x})") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise LoadError(f"{path}: not a whole .gz file ({error})") from error


def records(path: Path, columns: Sequence[str], bad: Callable[[LoadError], None]) -> Iterator[Record]:
    """The lines of a file that are not blank. A .jsonl line is an object; the first line of a .tsv or .csv may name its columns,
    else they are `columns` in order. A .tsv has no quoting. `bad` gets the error of each malformed line; it may raise it."""
    kind = suffix(path)
    if kind not in SUFFIXES:
        raise Error(f"data {path}: allowed are {', '.join(SUFFIXES)} files, and these as .gz")
    if kind in (".tsv", ".csv"):
        yield from _table(path, columns, kind, bad)
        return
    for number, line in enumerate(text_lines(path), 1):
        if not line.strip():
            continue
        if kind == ".txt":
            yield Record(path, number, {"text": line.rstrip("\r\n")})
            continue
        try:
            value = json.loads(line)
            if isinstance(value, dict):
                yield Record(path, number, value)
                continue
            problem = f"{shown(value)} is no object"
        except (ValueError, RecursionError) as error:
            problem = f"not JSON ({error})"
        bad(LoadError(f"{path}, line {number}: {problem}"))


def _table(path: Path, columns: Sequence[str], kind: str, bad: Callable[[LoadError], None]) -> Iterator[Record]:
    lines = text_lines(path)
    reader = csv.reader(lines, strict=True) if kind == ".csv" else csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    names, before = list(columns), 0
    try:
        for number, cells in enumerate(reader):
            line, before = before + 1, reader.line_num
            if number == 0 and set(columns[:2]) <= (found := {cell.strip().lower() for cell in cells}) and len(found) == len(cells):
                names = [cell.strip().lower() for cell in cells]
            elif len(cells) > len(names):
                bad(LoadError(f"{path}, line {line}: {len(cells)} columns; expected are {', '.join(names)}"))
            elif any(cell.strip() for cell in cells):
                yield Record(path, line, dict(zip(names, cells, strict=False)))
    except csv.Error as error:
        raise LoadError(f"{path}, line {reader.line_num}: not {kind[1:].upper()} ({error})") from error


def collect(
    path: Path, columns: Sequence[str], parse: Callable[[Any], T], skip_bad: bool = False, found: Iterable[Any] | None = None
) -> Examples[T]:
    """The examples that `parse` makes of a file's records, or of `found`: records of another kind of file, and a LoadError in place
    of each that is malformed. Raises the first bad line's gptfast.LoadError, or with skip_bad counts
    them and says so in a warning; raises in any case for a file without examples."""
    examples: Examples[T] = Examples(path)
    first: list[LoadError] = []

    def bad(error: LoadError) -> None:
        if not skip_bad:
            raise error
        first.append(error)
        examples.skipped += 1

    for record in records(path, columns, bad) if found is None else found:
        try:
            if isinstance(record, LoadError):
                raise record
            examples.items.append(parse(record))
        except LoadError as error:
            bad(error)
    if not examples.items:
        raise LoadError(f"data {path}: no examples in it" + (f"; the first bad line: {first[0]}" if first else ""))
    if first:
        warnings.warn(f"data {path}: {len(first):,} bad lines are skipped; the first: {first[0]}", stacklevel=2)
    return examples
