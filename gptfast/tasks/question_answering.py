"""Question answering: a prompt of question and context, an answer that is written or picked from the context, or none.

The prompt is "question: ...\\ncontext: ...\\nanswer:". A model is trained to go on with the answer and <|endoftext|>, or with
<|endoftext|> at once where the context has no answer. An answer's confidence is its probability with its end, all of it given the
prompt; where that is below the threshold, which is fitted on held-out training examples, the model abstains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from gptfast.config import option
from gptfast.errors import Error, shown
from gptfast.tasks import squad
from gptfast.tasks.answers import BATCH, by_length, texts
from gptfast.tasks.files import Examples, Record, collect, suffix
from gptfast.tasks.squad import Question
from gptfast.tasks.task import IGNORED, Encoded, Task

if TYPE_CHECKING:
    from gptfast.tokenizer import GPT2Tokenizer

CURVE_POINTS = 100


@dataclass
class QuestionAnswering(Task):
    """SQuAD's .json (1.1, 2.0), or .jsonl lines {"context", "question", "answers": [text, ...]}; no answers: it has none."""

    name: ClassVar[str] = "qa"
    columns: ClassVar[tuple[str, ...]] = ("context", "question", "answers")

    mode: str = option("generate", "write the answer, or pick it from the context word for word", choices=("generate", "extract"))
    threshold: float = option(0.0, "answers of a lower probability are withheld (finetune fits it)", low=0.0, high=1.0)
    answer_tokens: int = option(32, "longest answer in tokens", low=1)

    # ------------------------------------------------------------------------------------------------------------------------ data

    def read(self, path: str | Path, labelled: bool = True, skip_bad: bool = False) -> Examples[Question]:
        """The questions of a file. Raises gptfast.LoadError for one that is malformed."""
        if suffix(Path(path)) != ".json":
            return super().read(path, labelled, skip_bad)
        return collect(Path(path), self.columns, lambda question: question, skip_bad, squad.read(Path(path), labelled))

    def parse(self, record: Record, labelled: bool = True) -> Question:
        """answers: a list of texts, a text, or nothing for a question without an answer (labelled: [] or "" has to say so)."""
        given = record.values.get("answers", None if labelled else [])
        given = [given] if isinstance(given, str) and given.strip() else given or ([] if given is not None else None)
        if given is None:
            raise record.error("answers are missing; [] says that there is none")
        if not isinstance(given, list) or not all(isinstance(text, str) and text.strip() for text in given):
            raise record.error(f"answers are {shown(given)}; a list of texts is needed")
        found = {"context": record.text("context").strip(), "question": record.text("question").strip()}
        return Question(line=record.line, answers=tuple(given), id=str(record.values.get("id", "")), **found)

    def example(self, text: str) -> Question:
        """The last line is the question, the lines before it are the context."""
        context, _, question = text.strip().rpartition("\n")
        if not context.strip() or not question.strip():
            raise Error(f"{shown(text)} is no context with a question; give the context, and the question on a line of its own")
        return Question(context=context.strip(), question=question.strip())

    def _prompt(self, example: Question, tokenizer: GPT2Tokenizer, room: int) -> tuple[list[int], list[int]]:
        """The prompt's ids, at most `room`, and those of the context in it, whose end is cut off where it is too long."""
        before, after = tokenizer.encode(f"question: {example.question}\ncontext:"), tokenizer.encode("\nanswer:")
        left = room - len(before) - len(after)
        if left < 1:
            raise Error(f"the question {example.id or shown(example.question)} has {len(before):,} tokens and fills the context")
        context = tokenizer.encode(" " + example.context)[:left]
        return [*before, *context, *after], context

    def encode(self, example: Question, tokenizer: GPT2Tokenizer, context: int) -> Encoded:
        """The first of the right answers is what is learnt. Raises gptfast.Error where a context that had to be cut has lost it."""
        answer = tokenizer.encode(" " + example.answers[0].strip()) if example.answers else []
        prompt, kept = self._prompt(example, tokenizer, context - len(answer))
        if answer and example.answers[0].strip() in example.context and example.answers[0].strip() not in tokenizer.decode(kept):
            raise Error(f"the question {example.id or shown(example.question)}: its answer is beyond the context of {context:,}")
        end = tokenizer.eos_token_id
        if end is None:
            raise Error("the tokenizer has no <|endoftext|>, which ends an answer")
        return Encoded(prompt + answer, [IGNORED] * (len(prompt) - 1) + [*answer, end])

    # --------------------------------------------------------------------------------------------------------------------- answers

    def confident(self, model: Any, tokenizer: GPT2Tokenizer, examples: Sequence[Question]) -> tuple[list[str], list[float]]:
        """The best answer to each question, whether or not there should be one, and its probability."""
        room = model.config.n_positions - min(self.answer_tokens, model.config.n_positions // 2)
        prompts = [self._prompt(example, tokenizer, room) for example in examples]
        rows: list[list[int]] = [[] for _ in prompts]
        confidence = [0.0] * len(prompts)
        for group in by_length([len(ids) for ids, _ in prompts], BATCH):
            if self.mode == "extract":
                from gptfast.tasks.extraction import extract

                found = extract(model, [prompts[n] for n in group], self.answer_tokens)
            else:
                found = _write(model, [prompts[n][0] for n in group], self.answer_tokens)
            for number, (ids, logprob) in zip(group, found, strict=True):
                rows[number], confidence[number] = ids, math.exp(min(logprob, 0.0))
        return texts(tokenizer, rows), confidence

    def answer(self, model: Any, tokenizer: GPT2Tokenizer, examples: Sequence[Question]) -> list[dict[str, Any]]:
        """answer ("" where the model abstains), its probability, abstains, and what it would have said ("withheld")."""
        found = zip(*self.confident(model, tokenizer, examples), examples, strict=True)
        made = []
        for text, confidence, example in found:
            quiet = confidence < self.threshold
            said: dict[str, Any] = {"answer": "" if quiet else text, "probability": confidence, "abstains": quiet}
            said |= {"withheld": text} if quiet else {}
            made.append(said | ({"references": list(example.answers)} if example.answers else {}))
        return made

    def measure(self, model: Any, tokenizer: GPT2Tokenizer, examples: Sequence[Question]) -> dict[str, Any]:
        """SQuAD's exact_match and f1 over all questions, over those with an answer and those without, at the threshold; abstention
        as a finding (precision, recall, f1); the risk-coverage curve (at most 100 points), its area, and threshold. 0 to 1."""
        said, confidence = self.confident(model, tokenizer, examples)
        quiet = [value < self.threshold for value in confidence]
        final = ["" if silent else text for text, silent in zip(said, quiet, strict=True)]
        exact = [squad.exact_match(text, example.answers) for text, example in zip(final, examples, strict=True)]
        words = [squad.f1(text, example.answers) for text, example in zip(final, examples, strict=True)]
        has = [bool(example.answers) for example in examples]
        answered = [squad.exact_match(text, e.answers) if e.answers else 0.0 for text, e in zip(said, examples, strict=True)]
        curve = squad.risk_coverage(confidence, answered)
        every = max(1, -(-len(curve) // CURVE_POINTS))
        return {
            "questions": len(examples), "with_answer": sum(has), "threshold": self.threshold, "mode": self.mode,
            "exact_match": _mean(exact), "f1": _mean(words),
            "exact_match_with_answer": _mean([x for x, there in zip(exact, has, strict=True) if there]),
            "f1_with_answer": _mean([x for x, there in zip(words, has, strict=True) if there]),
            "exact_match_without": _mean([x for x, there in zip(exact, has, strict=True) if not there]),
            "abstention": squad.abstention(quiet, examples), "aurc": squad.area(curve),
            "risk_coverage": [*curve[:-1:every], curve[-1]],
        }  # fmt: skip

    def calibrate(self, model: Any, tokenizer: GPT2Tokenizer, examples: Sequence[Question]) -> QuestionAnswering:
        """With the threshold at which abstention has the largest F1 on these examples."""
        return replace(self, threshold=squad.best_threshold(self.confident(model, tokenizer, examples)[1], examples))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _write(model: Any, prompts: Sequence[Sequence[int]], longest: int) -> list[tuple[list[int], float]]:
    """The greedy answer of at least one token to each prompt, without its end, and the log-probability of both."""
    import torch

    end, width = model.config.eos_token_id, max(map(len, prompts))
    ids, mask = torch.full((len(prompts), width), end), torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    made = model.generate(
        ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=longest, min_new_tokens=1, do_sample=False,
        num_beams=1, return_dict_in_generate=True,
    )  # fmt: skip
    found = []
    for row, logprobs in zip(made.sequences[:, width:].tolist(), made.logprobs, strict=True):
        found.append((row[: row.index(end)] if end in row else row, float(logprobs.double().sum())))
    return found
