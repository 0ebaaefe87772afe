"""Text in pieces: where it may be cut without a change of its tokens, and which split a document belongs to."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_CUT = re.compile(r"\S\n(?=\S)")  # here GPT-2's pre-tokenizer ends a piece whatever follows, so a cut changes no token


class Piece(NamedTuple):
    """Some text of a document, with the SHA-256 of the whole document or, of a .txt file, of the piece; `ends` where the document
    does; `size` in bytes of UTF-8."""

    text: str
    split: str
    ends: bool
    size: int
    digest: bytes


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


def deal(text: str | bytes, val: float) -> str:
    """The split a document belongs to: a function of its own text, so that copies of it never land in both."""
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return split_of(hashlib.sha256(data).digest(), val)


def split_of(digest: bytes, val: float) -> str:
    """deal() by the text's SHA-256."""
    return "val" if int.from_bytes(digest[:8], "big") < val * 2.0**64 else "train"
