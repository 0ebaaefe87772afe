"""Language modelling: any text, the loss on every token, measured as perplexity and bits per byte by generation/score.py."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from gptfast.config import option
from gptfast.errors import Error, LoadError
from gptfast.tasks.answers import continuations, target_loss, texts
from gptfast.tasks.files import Examples, Record, collect, suffix, text_lines
from gptfast.tasks.task import Encoded, Example, Task

if TYPE_CHECKING:
    from gptfast import data as shards
    from gptfast.model import GPT2LMHeadModel
    from gptfast.tokenizer import GPT2Tokenizer


@dataclass(frozen=True, kw_only=True)
class Document(Example):
    """A text."""

    text: str


@dataclass
class LanguageModelling(Task):
    """.jsonl lines {"text": ...}, each a document, or a .txt file, which is one."""

    name: ClassVar[str] = "lm"
    columns: ClassVar[tuple[str, ...]] = ("text",)

    continue_tokens: int = option(40, "longest continuation that predict writes, in tokens", low=1)

    def parse(self, record: Record, labelled: bool = True) -> Document:
        """Raises gptfast.LoadError where there is no text."""
        return Document(line=record.line, text=record.text("text"))

    def read(self, path: str | Path, labelled: bool = True, skip_bad: bool = False) -> Examples[Document]:
        """Raises gptfast.LoadError for a malformed line and for a file without text."""
        path = Path(path)
        if suffix(path) != ".txt" or not labelled:
            return collect(path, self.columns, self.parse, skip_bad)
        text = "".join(text_lines(path))
        if not text:
            raise LoadError(f"data {path}: no examples in it")
        return Examples(path, [Document(text=text)])

    def example(self, text: str) -> Document:
        """A text to go on from."""
        return Document(text=text)

    def encode(self, example: Document, tokenizer: GPT2Tokenizer, context: int) -> Encoded:
        """The beginning of a document, between two <|endoftext|>."""
        return self._windows(example, tokenizer, context)[0]

    def _windows(self, example: Document, tokenizer: GPT2Tokenizer, context: int) -> list[Encoded]:
        if tokenizer.eos_token_id is None:
            raise Error("the tokenizer has no <|endoftext|>, which separates documents")
        ids = [tokenizer.eos_token_id, *tokenizer.encode(example.text), tokenizer.eos_token_id]
        spans = (ids[start : start + context + 1] for start in range(0, len(ids) - 1, context))
        return [Encoded(span[:-1], span[1:]) for span in spans]

    def encode_all(
        self, examples: Examples[Document], tokenizer: GPT2Tokenizer, context: int, skip_bad: bool = False
    ) -> list[Encoded]:
        """Every document in windows, so that each of its tokens is predicted once."""
        return [window for example in examples for window in self._windows(example, tokenizer, context)]

    def answer(self, model: Any, tokenizer: GPT2Tokenizer, examples: Sequence[Document]) -> list[dict[str, Any]]:
        """What the model writes behind each text, greedily."""
        prompts = [tokenizer.encode(example.text) for example in examples]
        return [{"answer": text} for text in texts(tokenizer, continuations(model, prompts, self.continue_tokens))]

    def measure(self, model: Any, tokenizer: GPT2Tokenizer, examples: Sequence[Document]) -> dict[str, Any]:
        """loss (nats a token, windows without overlap), perplexity, tokens; evaluate() measures a folder with overlap."""
        encoded = [window for example in examples for window in self._windows(example, tokenizer, model.config.n_positions)]
        total, count = target_loss(model, encoded)
        return {"tokens": count, "loss": total / count, "perplexity": math.exp(min(total / count, 700.0))}


def nats(model: GPT2LMHeadModel, data: shards.TokenData, stride: int | None = None) -> float:
    """-log P of every token of `data` but the first, which is given, summed. Windows as in generation/score.py."""
    import torch

    from gptfast.generation.score import token_logprobs

    return -float(token_logprobs(model, torch.from_numpy(data.read(0, len(data))), stride).double().sum())


def _texts(path: Path, tokenizer: GPT2Tokenizer) -> Iterator[tuple[list[int], int]]:
    """(ids after <|endoftext|>, bytes) of each document in a .jsonl file, or of a text file as one document."""
    from gptfast.data import read_texts

    if tokenizer.eos_token_id is None:
        raise Error("the tokenizer has no <|endoftext|>, which the first token of a text is predicted from")
    for text in read_texts(path):
        yield [tokenizer.eos_token_id, *tokenizer.encode(text)], len(text.encode("utf-8", "surrogatepass"))


def evaluate(
    model: str | Path, data: str | Path, stride: int | None = None, dtype: str = "fp32", device: str = "auto",
    threads: int | None = None,
) -> dict[str, Any]:
    """Perplexity and bits per byte of a model on text it was not trained on; of another dtype than fp32 beside fp32's.

    model: a folder, a hub id or a packed file. data: a folder from `gptfast prepare` (its held-out split), a text file (one
    document) or a .jsonl file of {"text": ...}. Each document is scored from <|endoftext|> on; a longer one in windows `stride`
    tokens apart (default: half the context). Returns task, dtype, engine, tokens, bytes, loss (nats a token), perplexity,
    bits_per_byte, stride, and for another dtype of a model whose fp32 weights are there `fp32` {loss, perplexity, bits_per_byte}
    and difference_percent of the perplexities. Raises gptfast.Error where there is no text, or data is of another tokenizer.
    """
    from gptfast.packed import is_packed

    found = _measure(model, data, stride, dtype, device, threads)
    if dtype != "fp32" and not is_packed(model):
        whole = _measure(model, data, stride, "fp32", device, threads)
        found["fp32"] = {key: whole[key] for key in ("loss", "perplexity", "bits_per_byte")}
        found["difference_percent"] = 100 * (math.exp(found["loss"] - whole["loss"]) - 1)
    return found


def _measure(
    model: str | Path, data: str | Path, stride: int | None, dtype: str, device: str, threads: int | None
) -> dict[str, Any]:
    """evaluate() in one dtype."""
    import torch

    from gptfast import data as shards
    from gptfast.generation import Engine
    from gptfast.packed import config_of

    path, total, tokens, size = Path(data), 0.0, 0, 0
    with Engine(model, dtype, threads, device=device) as engine:
        how = engine.describe()
        if path.is_dir():
            if engine.tokenizer.fingerprint() != shards.read_meta(path)["vocabulary"]:
                raise LoadError(f"data {data}: prepared with another tokenizer than the model {model} has")
            split = shards.load(path, "val")
            if len(split):
                total -= float(engine.token_logprobs(torch.from_numpy(split.read(0, len(split))), stride).double().sum())
                tokens, size = len(split) - 1, split.bytes
        else:
            for ids, length in _texts(path, engine.tokenizer):
                total -= float(engine.token_logprobs(ids, stride).double().sum())
                tokens, size = tokens + len(ids) - 1, size + length
    if tokens < 1 or size < 1:
        raise Error(f"data {data}: no text to evaluate on")
    return {
        "task": "lm", "dtype": dtype, "engine": how, "tokens": tokens, "bytes": size, "loss": total / tokens,
        "perplexity": math.exp(min(total / tokens, 700.0)), "bits_per_byte": total / math.log(2) / size,
        "stride": stride or max(config_of(model).n_positions // 2, 1),
    }
