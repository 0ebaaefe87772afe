"""GPT-2's byte-level BPE (Radford et al. 2019, section 2.2) on the `tokenizers` library: from files, or trained on new text.

Text is split by GPT-2's pattern, each piece's UTF-8 bytes are written as 256 printable characters, and pairs are merged in the
order of the merge list. Every byte is a token, so any text can be encoded, and decoding gives back exactly its bytes. What looks
like a special token in a user's text stays text unless allow_special=True.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from gptfast import hub
from gptfast.errors import Error, LoadError
from gptfast.tokenizer_files import added, content, read_merges, read_tokenizer_json

END = "<|endoftext|>"
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
# GPT-2's writing of bytes: printable Latin-1 characters stand for themselves, the other bytes for characters from 256 on
BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + place): byte for place, byte in enumerate(byte for byte in range(256) if byte not in _PRINTABLE)
}

# the same for str.translate: Latin-1 characters that stand for no byte become one that Latin-1 has not
_SPELLED = dict.fromkeys(range(256), 0xFFFF) | {ord(char): byte for char, byte in BYTE_OF.items()}


class Encoding(dict[str, Any]):
    """What calling a tokenizer returns: `input_ids` and `attention_mask` by key and by attribute; `model(**encoding)` takes it."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, device: torch.device | str) -> Encoding:
        """The same with its tensors on `device`."""
        return Encoding({name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.items()})


class GPT2Tokenizer:
    """Byte-level BPE of a vocabulary (token -> id), merges in order, and special tokens (text -> id).

    The special tokens in `ordinary` are none: they were added to the vocabulary as words, and are recognised in every text.
    Raises gptfast.LoadError where these make no byte-level BPE.
    """

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        special: Mapping[str, int] | None = None,
        *,
        ordinary: Iterable[str] = (),
        eos_token: str | None = END,
        bos_token: str | None = None,
        pad_token: str | None = None,
        add_prefix_space: bool = False,
        padding_side: str = "right",
        model_max_length: int | None = None,
    ) -> None:
        self._vocabulary = dict(vocabulary)
        self._merges = list(merges)
        self._special = dict(special) if special is not None else {END: vocabulary[END]} if END in vocabulary else {}
        self._ordinary = set(ordinary)
        self._prefix = add_prefix_space
        self._bytes = self._spell()
        self._plain = self._build()
        self._matching: Tokenizer | None = None  # the same, but special tokens in text are recognised
        self.eos_token = eos_token if eos_token in self._special else None
        self.bos_token = bos_token if bos_token in self._special else self.eos_token
        self._pad = pad_token if pad_token in self._ids else None
        self.padding_side = padding_side
        self.model_max_length = model_max_length

    def _spell(self) -> dict[int, bytes]:
        """The bytes of every id, after checking that the vocabulary is a byte-level one."""
        self._ids = {**self._vocabulary, **self._special}
        lacking = next((char for char in BYTE_OF if char not in self._vocabulary), None)
        if lacking is not None:
            raise LoadError(f"the vocabulary has no token for the byte {BYTE_OF[lacking]}; GPT-2's byte-level BPE has all 256")
        spelled: dict[int, bytes] = {}
        for token, index in self._ids.items():
            if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < 2**31:
                raise LoadError(f"the vocabulary gives {token!r} the id {index!r}; whole numbers from 0 are needed")
            if index in spelled:
                raise LoadError(f"the vocabulary gives the id {index} twice, the second time to {token!r}")
            if token in self._special:
                spelled[index] = token.encode()
                continue
            try:
                spelled[index] = token.translate(_SPELLED).encode("latin-1")
            except UnicodeEncodeError:
                char = next(char for char in token if char not in BYTE_OF)
                raise LoadError(f"token {token!r} holds {char!r}, which stands for no byte: this is no byte-level BPE") from None
        return spelled

    def _build(self) -> Tokenizer:
        try:
            built = Tokenizer(models.BPE(vocab=self._vocabulary, merges=self._merges))
        except Exception as error:  # the library raises plain Exception
            raise LoadError(f"the merges do not fit the vocabulary: {error}") from None
        built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=self._prefix)
        built.decoder = decoders.ByteLevel()
        ordered = sorted(self._special, key=self._special.__getitem__)
        for token in ordered:  # one at a time: the library gives out ids in this order
            special = token not in self._ordinary
            built.add_tokens([AddedToken(token, special=special, normalized=False)])
        for token, index in self._special.items():
            if built.token_to_id(token) != index:
                raise LoadError(f"the added token {token!r} has the id {index}; {built.token_to_id(token)} is the next free one")
        built.encode_special_tokens = True  # special tokens in text are encoded as text
        return built

    # ------------------------------------------------------------------------------------------------------------ files, training

    @classmethod
    def from_pretrained(cls, path: str | Path, *, revision: str | None = None) -> GPT2Tokenizer:
        """That of a folder, a hub id (tokenizer.json, or vocab.json with merges.txt) or a packed file; else gptfast.LoadError."""
        if os.path.isfile(path):
            found: GPT2Tokenizer = import_module("gptfast.packed").open(path).tokenizer()
            return found
        folder = hub.resolve(path, revision, hub.TOKENIZER_FILES)
        settings = hub.read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
        if settings.get("add_bos_token"):
            raise LoadError(f"{folder / 'tokenizer_config.json'}: add_bos_token is true, which gptfast does not support")
        names = {name: content(settings.get(name)) for name in ("eos_token", "bos_token", "pad_token")}
        if (folder / "tokenizer.json").exists():
            vocabulary, merges, special, ordinary, prefix = read_tokenizer_json(folder / "tokenizer.json")
        else:
            vocabulary = hub.read_json(folder / "vocab.json")
            merges, prefix = read_merges(folder / "merges.txt"), bool(settings.get("add_prefix_space"))
            tokens = settings.get("added_tokens_decoder")
            listed = [{"id": index, **token} for index, token in tokens.items()] if isinstance(tokens, dict) else []
            special, ordinary = added(folder / "tokenizer_config.json", listed)
        for token in (END, *names.values()):
            if token is not None and token in vocabulary:
                special[token] = vocabulary[token]
        limit = settings.get("model_max_length")
        try:
            return cls(
                vocabulary,
                merges,
                special,
                ordinary=ordinary,
                eos_token=names["eos_token"] or END,
                bos_token=names["bos_token"],
                pad_token=names["pad_token"],
                add_prefix_space=prefix,
                padding_side=settings.get("padding_side", "right"),
                model_max_length=limit if isinstance(limit, int) and 0 < limit < 2**31 else None,
            )
        except LoadError as error:
            raise LoadError(f"{folder}: {error}") from None

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = (END,)) -> GPT2Tokenizer:
        """A new vocabulary of at most `vocab_size` tokens, special ones last, from the most frequent merges in `texts`."""
        if vocab_size < 256 + len(special_tokens):
            raise Error(f"vocab_size is {vocab_size}; the 256 bytes and {len(special_tokens)} special tokens need more")
        built = Tokenizer(models.BPE())
        built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(special_tokens), min_frequency=2, initial_alphabet=alphabet, show_progress=False
        )
        built.train_from_iterator(texts, trainer)
        model = json.loads(built.to_str())["model"]
        vocabulary = model["vocab"]
        special = {token: len(vocabulary) + place for place, token in enumerate(special_tokens)}
        merges = [(left, right) for left, right in model["merges"]]
        return cls(vocabulary | special, merges, special, eos_token=special_tokens[0] if special_tokens else None)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes tokenizer.json, vocab.json, merges.txt and tokenizer_config.json, which transformers loads."""
        names = {"bos_token": self.bos_token, "eos_token": self.eos_token, "unk_token": self.eos_token, "pad_token": self._pad}
        settings: dict[str, Any] = {name: token for name, token in names.items() if token is not None}
        if self.model_max_length is not None:
            settings["model_max_length"] = self.model_max_length
        settings |= {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": self._prefix, "padding_side": self.padding_side}
        merges = "".join(f"{left} {right}\n" for left, right in self._merges)
        with hub.Writer(Path(folder)) as writer:
            writer.path("tokenizer.json").write_text(self._plain.to_str(pretty=True), encoding="utf-8")
            writer.json("vocab.json", dict(sorted(self._vocabulary.items(), key=lambda item: item[1])))
            writer.path("merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
            writer.json("tokenizer_config.json", settings)

    def to_json(self) -> str:
        """The pipeline as tokenizer.json holds it: what another process needs to encode the same way."""
        text: str = self._plain.to_str()
        return text

    def to_bytes(self) -> bytes:
        """Everything that from_bytes() needs, as JSON: what a packed file holds, and faster to read than tokenizer.json."""
        facts = {
            "vocabulary": self._vocabulary, "merges": [f"{left} {right}" for left, right in self._merges], "special": self._special,
            "ordinary": sorted(self._ordinary), "eos_token": self.eos_token, "bos_token": self.bos_token, "pad_token": self._pad,
            "add_prefix_space": self._prefix, "padding_side": self.padding_side, "model_max_length": self.model_max_length,
        }
        return json.dumps(facts, ensure_ascii=False, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> GPT2Tokenizer:
        """The tokenizer that to_bytes() wrote. Raises gptfast.LoadError for anything else."""
        try:
            facts = json.loads(data)
            merges = [merge.split(" ") for merge in facts.pop("merges")]
            if not all(len(merge) == 2 for merge in merges):
                raise ValueError("a merge is not two tokens")
            return cls(facts.pop("vocabulary"), [(left, right) for left, right in merges], **facts)
        except LoadError:
            raise
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise LoadError(f"this is no tokenizer that gptfast wrote ({type(error).__name__}: {error})") from None

    def fingerprint(self) -> str:
        """SHA-256 in hex of everything that decides which ids a text gets."""
        tokens = sorted(self._ids.items(), key=lambda item: item[1])
        facts = [tokens, self._merges, sorted(self._special), sorted(self._ordinary), self._prefix]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    # ----------------------------------------------------------------------------------------------------------------------- tokens

    def __len__(self) -> int:
        """Number of tokens, special ones included."""
        return len(self._ids)

    @property
    def vocab_size(self) -> int:
        """The smallest table that has a row for every id."""
        return max(self._bytes) + 1

    @property
    def eos_token_id(self) -> int | None:
        """Id of the token that ends a text."""
        return None if self.eos_token is None else self._ids[self.eos_token]

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that starts a text."""
        return None if self.bos_token is None else self._ids[self.bos_token]

    @property
    def pad_token(self) -> str | None:
        """The token that fills rows up: the end token unless another was set."""
        return self._pad or self.eos_token

    @pad_token.setter
    def pad_token(self, token: str | None) -> None:
        if token is not None and token not in self._ids:
            raise Error(f"pad_token is {token!r}, which is not in the vocabulary")
        self._pad = token

    @property
    def pad_token_id(self) -> int | None:
        """Id of pad_token."""
        return None if self.pad_token is None else self._ids[self.pad_token]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; a character's bytes may be spread over several tokens. Raises gptfast.Error for an unknown id."""
        try:
            return self._bytes[int(token_id)]
        except KeyError:
            raise Error(f"token id {token_id} is not in the vocabulary; allowed: 0 to {self.vocab_size - 1:,}") from None

    # ---------------------------------------------------------------------------------------------------------- text to ids to text

    def encode(self, text: str, return_tensors: str | None = None, allow_special: bool = False) -> Any:
        """The ids of a text: a list, or with return_tensors="pt" a tensor [1, T] int64."""
        ids = self._encode([text], allow_special)[0]
        return _tensor([ids]) if _wants_tensors(return_tensors) else ids

    def _encode(self, texts: Sequence[str], allow_special: bool = False) -> list[list[int]]:
        if allow_special and self._matching is None:
            self._matching = self._build()
            self._matching.encode_special_tokens = False
        try:
            encoded = (self._matching if allow_special else self._plain).encode_batch_fast(list(texts))  # type: ignore[union-attr]
        except TypeError:
            for text in texts:
                _check_text(text)
            raise
        return [item.ids for item in encoded]

    def __call__(
        self,
        text: str | Sequence[str],
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        allow_special: bool = False,
    ) -> Encoding:
        """input_ids and attention_mask of one text, or of several: lists, or with return_tensors="pt" tensors [B, T] int64.

        padding True or "longest" fills rows up to the longest, "max_length" to max_length; truncation keeps the first max_length
        tokens (default: model_max_length). Raises gptfast.Error where rows of different lengths should become a tensor.
        """
        single = isinstance(text, str)
        rows = self._encode([text] if isinstance(text, str) else text, allow_special)
        limit = max_length if max_length is not None else self.model_max_length
        if (truncation or padding == "max_length") and limit is None:
            raise Error("truncation and padding='max_length' need max_length; this tokenizer has no model_max_length")
        if truncation:
            rows = [row[:limit] for row in rows]
        masks = [[1] * len(row) for row in rows]
        if padding not in (False, "do_not_pad"):
            rows, masks = self._pad_rows(rows, padding, limit)
        if _wants_tensors(return_tensors):
            return Encoding(input_ids=_tensor(rows), attention_mask=_tensor(masks))
        return Encoding(input_ids=rows[0] if single else rows, attention_mask=masks[0] if single else masks)

    def _pad_rows(self, rows: list[list[int]], padding: bool | str, limit: int | None) -> tuple[list[list[int]], list[list[int]]]:
        if padding not in (True, "longest", "max_length") or self.padding_side not in ("left", "right"):
            given = f"padding is {padding!r} on side {self.padding_side!r}"
            raise Error(f"{given}; allowed: True, 'longest', 'max_length' on side 'left' or 'right'")
        if self.pad_token_id is None:
            raise Error("padding needs a pad_token; this tokenizer has neither that nor an end token")
        width = max((len(row) for row in rows), default=0)
        if padding == "max_length" and limit is not None:
            width = max(width, limit)
        left = self.padding_side == "left"
        filled, masks = [], []
        for row in rows:
            pad, none, ones = [self.pad_token_id] * (width - len(row)), [0] * (width - len(row)), [1] * len(row)
            filled.append(pad + row if left else row + pad)
            masks.append(none + ones if left else ones + none)
        return filled, masks

    def decode(self, token_ids: int | Sequence[int] | Tensor, skip_special_tokens: bool = False) -> str:
        """The text of ids [T]; bytes that are not UTF-8 (a character cut in the middle) become U+FFFD."""
        ids = token_ids.tolist() if isinstance(token_ids, Tensor) else token_ids
        ids = [ids] if isinstance(ids, int) else ids
        if any(not isinstance(index, int) for index in ids):
            raise Error("decode takes the ids of one text; batch_decode takes several")
        hidden = {self._special[token] for token in self._special.keys() - self._ordinary} if skip_special_tokens else set()
        return b"".join(self.token_bytes(index) for index in ids if index not in hidden).decode("utf-8", errors="replace")

    def batch_decode(self, sequences: Iterable[Sequence[int]] | Tensor, skip_special_tokens: bool = False) -> list[str]:
        """The texts of several rows of ids."""
        return [self.decode(row, skip_special_tokens) for row in sequences]


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise Error(f"text is a {type(text).__name__}; a string is needed")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"U+{ord(text[error.start]):04X} at character {error.start}"
        raise Error(f"text holds half of a surrogate pair, {found}, which is no Unicode text") from None


def _wants_tensors(return_tensors: str | None) -> bool:
    if return_tensors not in (None, "pt"):
        raise Error(f"return_tensors is {return_tensors!r}; allowed: None, 'pt'")
    return return_tensors == "pt"


def _tensor(rows: list[list[int]]) -> Tensor:
    lengths = {len(row) for row in rows}
    if len(lengths) > 1:
        raise Error(f"rows of {min(lengths)} and {max(lengths)} tokens make no tensor; padding=True fills them up")
    return torch.tensor(rows, dtype=torch.int64).view(len(rows), -1 if rows and rows[0] else 0)
