"""Translation: a prompt of the source, the loss on the target only, beam search, measured by sacreBLEU and chrF.

A pair is written "source => target". Its two halves are encoded apart, so that the prompt's tokens do not depend on the answer; the
end of the target is <|endoftext|>, as a target only. BLEU is that of Papineni et al. 2002 and chrF that of Popović 2015, both as
sacreBLEU computes them (Post 2018, arXiv:1804.08771), with the signature that says how.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from gptfast.config import option
from gptfast.errors import Error, LoadError
from gptfast.tasks.answers import continuations, texts
from gptfast.tasks.files import Examples, Record, collect, text_lines
from gptfast.tasks.task import IGNORED, Encoded, Example, Task

if TYPE_CHECKING:
    from gptfast.tokenizer import GPT2Tokenizer

SEPARATOR = " =>"


@dataclass(frozen=True, kw_only=True)
class Pair(Example):
    """A text and its translation ("" where it is not known)."""

    source: str
    target: str = ""


@dataclass
class Translation(Task):
    """.tsv, .csv and .jsonl files of source and target, or two files FILE,FILE that say the same line by line."""

    name: ClassVar[str] = "translation"
    columns: ClassVar[tuple[str, ...]] = ("source", "target")
    chosen_by: ClassVar[tuple[str, str]] = ("bleu", "highest")

    beams: int = option(4, "beams of the search for a translation (1: greedy)", low=1, high=64)
    length_penalty: float = option(1.0, "log-probabilities are divided by their length to this power", low=-10.0, high=10.0)
    answer_tokens: int = option(128, "longest translation in tokens", low=1)

    def read(self, path: str | Path, labelled: bool = True, skip_bad: bool = False) -> Examples[Pair]:
        """The pairs of one file, or of two parallel ones FILE,FILE (source first, one text a line, each also as .gz). Raises
        gptfast.LoadError where the two have not as many lines as each other."""
        files = str(path).split(",")
        if len(files) == 1 or Path(path).exists():
            return super().read(path, labelled, skip_bad)
        if len(files) > 2 or not all(files):
            raise LoadError(f"data {path}: one file of pairs, or two parallel files FILE,FILE are needed")
        sources, targets = ([line.rstrip("\r\n") for line in text_lines(Path(file))] for file in files)
        if len(sources) != len(targets):
            counts = f"{files[0]} has {len(sources):,} lines, {files[1]} {len(targets):,}"
            raise LoadError(f"data {path}: {counts}; equally many are needed")
        found = [
            Record(Path(path), number, {"source": source, "target": target})
            for number, (source, target) in enumerate(zip(sources, targets, strict=True), 1)
        ]
        return collect(Path(path), self.columns, lambda record: self.parse(record, labelled), skip_bad, found)

    def parse(self, record: Record, labelled: bool = True) -> Pair:
        """Raises gptfast.LoadError where the source, or with labelled the target, is missing or empty."""
        target = record.text("target") if labelled else record.values.get("target") or ""
        return Pair(line=record.line, source=record.text("source").strip(), target=str(target).strip())

    def example(self, text: str) -> Pair:
        """A text to be translated."""
        if not text.strip():
            raise Error("the text to translate is empty")
        return Pair(source=text.strip())

    def prepare(self, examples: Sequence[Pair]) -> Translation:
        """As it is; raises gptfast.Error where BLEU, which the weights are chosen by, cannot be computed."""
        _sacrebleu()
        return self

    def prompt(self, example: Pair, tokenizer: GPT2Tokenizer) -> list[int]:
        """The ids that a translation follows."""
        ids: list[int] = tokenizer.encode(example.source + SEPARATOR)
        return ids

    def encode(self, example: Pair, tokenizer: GPT2Tokenizer, context: int) -> Encoded:
        """Raises gptfast.Error where source and target are longer than the context: neither can be cut."""
        prompt, target = self.prompt(example, tokenizer), tokenizer.encode(" " + example.target)
        ids = prompt + target
        if len(ids) > context:
            raise Error(f"the pair has {len(ids):,} tokens, the model's context is {context:,}")
        return Encoded(ids, [IGNORED] * (len(prompt) - 1) + [*target, _end(tokenizer)])

    def translate(self, model: Any, tokenizer: GPT2Tokenizer, examples: Sequence[Pair], beams: int | None = None) -> list[str]:
        """The translation of each example by `beams` beams (default: the task's own)."""
        prompts = [self.prompt(example, tokenizer) for example in examples]
        longest = model.config.n_positions - 1
        for example, prompt in zip(examples, prompts, strict=True):
            if len(prompt) > longest:
                place = f"line {example.line}: " if example.line else ""
                raise Error(f"{place}the source has {len(prompt):,} tokens with its prompt; the model's context leaves {longest:,}")
        width = self.beams if beams is None else beams
        return texts(tokenizer, continuations(model, prompts, self.answer_tokens, width, self.length_penalty))

    def answer(self, model: Any, tokenizer: GPT2Tokenizer, examples: Sequence[Pair]) -> list[dict[str, Any]]:
        """The translations; one that was given stands beside the answer as "reference"."""
        made = self.translate(model, tokenizer, examples)
        return [
            {"answer": text} | ({"reference": example.target} if example.target else {})
            for text, example in zip(made, examples, strict=True)
        ]

    def measure(self, model: Any, tokenizer: GPT2Tokenizer, examples: Sequence[Pair]) -> dict[str, Any]:
        """bleu and chrf of 0 to 100 with the signatures of how they were computed, pairs, beams, length_penalty."""
        made = self.translate(model, tokenizer, examples)
        settings = {"pairs": len(examples), "beams": self.beams, "length_penalty": self.length_penalty}
        return settings | scores(made, [example.target for example in examples])

    def validate(self, model: Any, tokenizer: GPT2Tokenizer, examples: Sequence[Pair]) -> dict[str, float]:
        """BLEU of greedy translations."""
        greedy = replace(self, beams=1).measure(model, tokenizer, examples)
        return {"bleu": greedy["bleu"]}


def scores(translations: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Of the whole set: bleu and chrf (0 to 100), signature and chrf_signature. Raises gptfast.Error without sacrebleu."""
    metrics = _sacrebleu()
    bleu, chrf = metrics.BLEU(), metrics.CHRF()
    found = [metric.corpus_score(list(translations), [list(references)]).score for metric in (bleu, chrf)]
    return {
        "bleu": float(found[0]), "signature": str(bleu.get_signature()),
        "chrf": float(found[1]), "chrf_signature": str(chrf.get_signature()),
    }  # fmt: skip


def _sacrebleu() -> Any:
    try:
        from sacrebleu import metrics
    except ImportError:
        raise Error("translation needs sacrebleu, which is not installed: pip install 'gptfast-torch[translation]'") from None
    return metrics


def _end(tokenizer: GPT2Tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise Error("the tokenizer has no <|endoftext|>, which ends a translation")
    return tokenizer.eos_token_id
