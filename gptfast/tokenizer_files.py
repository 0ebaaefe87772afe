"""The files of a tokenizer, read and checked: tokenizer.json, or vocab.json with merges.txt and what tokenizer_config.json adds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gptfast import hub
from gptfast.errors import LoadError


def content(token: Any) -> str | None:
    """The text of a special token, which files write as a string or as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def read_merges(path: Path) -> list[tuple[str, str]]:
    """The pairs of a merges.txt, in order. Raises gptfast.LoadError for a line that is none."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"{path} cannot be read: {error}") from None
    return list(_pairs(path, (line for line in lines if line and not line.startswith("#version"))))


def _pairs(path: Path, merges: Iterable[Any]) -> Iterator[tuple[str, str]]:
    for number, merge in enumerate(merges):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise LoadError(f"{path}: merge {number} is {str(merge)[:80]!r}; two tokens are needed")
        yield parts[0], parts[1]


def added(path: Path, tokens: Any) -> tuple[dict[str, int], set[str]]:
    """Text -> id of the tokens that were added to a vocabulary, and those of them that are not special. Raises gptfast.LoadError
    for an entry that is no token."""
    special: dict[str, int] = {}
    ordinary: set[str] = set()
    for token in tokens if isinstance(tokens, list) else []:
        text = content(token)
        if not text or not isinstance(token, dict) or not str(token.get("id")).isdecimal():
            raise LoadError(f"{path}: an added token is {str(token)[:80]}; an object of content and id is needed")
        special[text] = int(token["id"])
        if token.get("special") is False:
            ordinary.add(text)
    return special, ordinary


def read_tokenizer_json(path: Path) -> tuple[dict[str, int], list[tuple[str, str]], dict[str, int], set[str], bool]:
    """Vocabulary, merges, added tokens and add_prefix_space of a tokenizer.json that describes GPT-2's pipeline.

    Raises gptfast.LoadError where it describes another.
    """
    whole = hub.read_json(path)
    model, split = whole.get("model"), whole.get("pre_tokenizer")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or model.get("dropout"):
        raise LoadError(f"{path}: the model is not a plain BPE")
    if not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list):
        raise LoadError(f"{path}: the model has no vocab and merges")
    if whole.get("normalizer") is not None or not isinstance(split, dict) or split.get("type") != "ByteLevel":
        raise LoadError(f"{path}: normalizer and pre_tokenizer are not GPT-2's (none, and ByteLevel)")
    if not split.get("use_regex", True):
        raise LoadError(f"{path}: the pre_tokenizer does not split text (use_regex is false)")
    special, ordinary = added(path, whole.get("added_tokens"))
    return model["vocab"], list(_pairs(path, model["merges"])), special, ordinary, bool(split.get("add_prefix_space"))
