"""SQuAD: its JSON files, its two metrics, and how good a model is at knowing when it does not know.

Exact match and F1 are those of SQuAD's scorer (Rajpurkar et al. 2016, arXiv:1606.05250; with questions that have no answer:
Rajpurkar, Jia, Liang 2018, arXiv:1806.03822): answers are compared in lower case, without punctuation and the words a, an, the, and
with single spaces; of several right answers the best counts; F1 is over words, with their counts. A question without an answer is
right where nothing is answered, by both metrics. Risk and coverage: El-Yaniv, Wiener 2010 (JMLR 11).
"""

from __future__ import annotations

import gzip
import json
import re
import string
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptfast.errors import Error, LoadError, shown
from gptfast.tasks.task import Example

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, kw_only=True)
class Question(Example):
    """A question about a context; answers: the texts that are right, none where the context has no answer."""

    context: str
    question: str
    answers: tuple[str, ...] = ()
    id: str = ""


# ------------------------------------------------------------------------------------------------------------------------- files


def read(path: Path, labelled: bool = True) -> Iterator[Question | LoadError]:
    """The questions of a SQuAD .json file (also as .gz), version 1.1 or 2.0, and an error in place of each that is malformed;
    labelled False: answers may be missing. Raises gptfast.LoadError where the file is no such file."""
    articles = _json(path)
    if not isinstance(articles, dict) or not isinstance(articles.get("data"), list):
        raise LoadError(f"{path}: no SQuAD file; an object with a list 'data' is needed")
    for number, article in enumerate(articles["data"]):
        paragraphs = article.get("paragraphs") if isinstance(article, dict) else None
        if not isinstance(paragraphs, list):
            yield LoadError(f"{path}: data[{number}] has no list 'paragraphs'")
            continue
        for place, paragraph in enumerate(paragraphs):
            where = f"{path}: data[{number}].paragraphs[{place}]"
            if not isinstance(paragraph, dict) or not isinstance(paragraph.get("qas"), list):
                yield LoadError(f"{where} has no list 'qas'")
                continue
            for n, qa in enumerate(paragraph["qas"]):
                yield _question(f"{where}.qas[{n}]", paragraph.get("context"), qa, labelled)


def _json(path: Path) -> Any:
    if not path.is_file():
        raise LoadError(f"data {path}: no such file")
    try:
        data = path.read_bytes()
        return json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{path}: not JSON ({error})") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise LoadError(f"{path}: not a whole .gz file ({error})") from error


def _question(where: str, context: Any, qa: Any, labelled: bool) -> Question | LoadError:
    if not isinstance(qa, dict) or not isinstance(qa.get("question"), str) or not qa["question"].strip():
        return LoadError(f"{where}: question is missing")
    if not isinstance(context, str) or not context.strip():
        return LoadError(f"{where}: its paragraph has no context")
    given = qa.get("answers") or []
    if qa.get("is_impossible"):
        given = []
    elif not isinstance(given, list) or (labelled and not given):
        return LoadError(f"{where}: answers are missing, and is_impossible is not true")
    texts: list[Any] = [answer.get("text") if isinstance(answer, dict) else None for answer in given]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        return LoadError(f"{where}: answers hold {shown(given)}; objects with a text are needed")
    return Question(context=context.strip(), question=qa["question"].strip(), answers=tuple(texts), id=str(qa.get("id", "")))


def write(path: str | Path, questions: Sequence[Question], title: str) -> None:
    """A SQuAD 2.0 file, questions of one context side by side in one paragraph. Raises gptfast.Error for an answer that is not in
    its context."""
    paragraphs: list[dict[str, Any]] = []
    for number, question in enumerate(questions):
        missing = next((text for text in question.answers if text not in question.context), None)
        if missing is not None:
            raise Error(f"question {number}: its answer {missing!r} is not in the context")
        if not paragraphs or paragraphs[-1]["context"] != question.context:
            paragraphs.append({"context": question.context, "qas": []})
        answers = [{"text": text, "answer_start": question.context.index(text)} for text in question.answers]
        name = question.id or f"{title}-{number}"
        paragraphs[-1]["qas"].append(
            {"id": name, "question": question.question, "answers": answers, "is_impossible": not question.answers}
        )
    text = json.dumps({"version": "v2.0", "data": [{"title": title, "paragraphs": paragraphs}]}, ensure_ascii=False)
    Path(path).write_text(text + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------- metrics


def normalised(text: str) -> str:
    """An answer as it is compared: lower case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def _right(answers: Sequence[str]) -> list[str]:
    """The right answers, normalised; where none is left after that, nothing is right."""
    return [text for text in map(normalised, answers) if text] or [""]


def exact_match(answer: str, answers: Sequence[str]) -> float:
    """1 where the answer is one of the right ones, else 0; "" is no answer."""
    return float(normalised(answer) in _right(answers))


def f1(answer: str, answers: Sequence[str]) -> float:
    """The largest F1 over words between the answer and a right one; "" is no answer."""
    return max(_f1(normalised(answer).split(), right.split()) for right in _right(answers))


def _f1(answer: list[str], right: list[str]) -> float:
    if not answer or not right:
        return float(answer == right)
    shared = sum((Counter(answer) & Counter(right)).values())
    return 2 * shared / (len(answer) + len(right))


def abstention(silent: Sequence[bool], questions: Sequence[Question]) -> dict[str, float]:
    """precision, recall and f1 of not answering (`silent`) as the finding that a question has no answer."""
    both = sum(quiet and not question.answers for quiet, question in zip(silent, questions, strict=True))
    quiet, impossible = sum(silent), sum(not question.answers for question in questions)
    return {
        "precision": both / quiet if quiet else 0.0, "recall": both / impossible if impossible else 0.0,
        "f1": 2 * both / (quiet + impossible) if quiet + impossible else 0.0,
    }  # fmt: skip


def best_threshold(confidence: Sequence[float], questions: Sequence[Question]) -> float:
    """The threshold below which not answering has the largest F1; 0 where every question has an answer. Between two confidences
    that are told apart it is their geometric mean."""
    order = sorted(range(len(questions)), key=lambda number: confidence[number])
    impossible = sum(not question.answers for question in questions)
    best, found, caught = 0.0, 0.0, 0
    for quiet, number in enumerate(order, 1):
        caught += not questions[number].answers
        above = confidence[order[quiet]] if quiet < len(order) else 1.0
        score = 2 * caught / (quiet + impossible) if impossible else 0.0
        if score > best and above > confidence[number]:
            best, found = score, (confidence[number] * above) ** 0.5 or above
    return found


def risk_coverage(confidence: Sequence[float], right: Sequence[float]) -> list[tuple[float, float]]:
    """(coverage, risk) where the most confident answers are given and all others withheld, from the first answer to all of them:
    coverage is the part that is answered, risk the part of these that is wrong. Equal confidences are one point."""
    order = sorted(range(len(right)), key=lambda number: -confidence[number])
    points, wrong = [], 0.0
    for count, number in enumerate(order, 1):
        wrong += 1 - right[number]
        if count == len(order) or confidence[order[count]] != confidence[number]:
            points.append((count / len(order), wrong / count))
    return points


def area(points: Sequence[tuple[float, float]]) -> float:
    """The mean risk over all coverages (AURC): 0 is perfect."""
    before = (0.0, *(coverage for coverage, _ in points))
    return sum(risk * (coverage - last) for (coverage, risk), last in zip(points, before, strict=False))


def draw(points: Sequence[tuple[float, float]], path: str | Path) -> None:
    """The risk-coverage curve as a picture. Raises gptfast.Error without matplotlib (the plot extra)."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise Error("a picture needs matplotlib, which is not installed: pip install 'gptfast-torch[plot]'") from None
    figure = Figure(figsize=(5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.step([0.0, *(coverage for coverage, _ in points)], [points[0][1], *(risk for _, risk in points)], where="pre", linewidth=1)
    axes.set_xlabel("coverage: part of the questions that is answered")
    axes.set_ylabel("risk: part of the answers that is wrong")
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
