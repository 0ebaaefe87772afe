"""Question answering: SQuAD's files and metrics against values by hand, the threshold, extraction, a set that is learned."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from gptfast import Error, LoadError
from gptfast.config import GPT2Config, TrainConfig
from gptfast.model import GPT2LMHeadModel
from gptfast.tasks import questions, recorded, squad
from gptfast.tasks.extraction import extract
from gptfast.tasks.finetune import finetune
from gptfast.tasks.options import FinetuneConfig
from gptfast.tasks.question_answering import QuestionAnswering
from gptfast.tasks.run import evaluate
from gptfast.tasks.squad import Question
from gptfast.tasks.task import IGNORED
from gptfast.tokenizer import GPT2Tokenizer

# answer, right answers, exact match, F1: by hand from the description of the scorer
SCORED: list[tuple[str, list[str], float, float]] = [
    ("Paris", ["Paris"], 1, 1),
    ("the city of Paris", ["Paris"], 0, 2 * (1 / 3) * 1 / (1 / 3 + 1)),  # "city of paris": precision 1/3, recall 1
    ("The Beatles", ["beatles"], 1, 1),
    ("an apple a day", ["apple day"], 1, 1),
    ("theatre", ["atre"], 0, 0),  # "the" only as a word
    ("U.S.A.", ["USA"], 1, 1),
    ("well-known", ["wellknown"], 1, 1),
    ("well known", ["well-known"], 0, 0),
    ("  two   words ", ["two words"], 1, 1),
    ("red red blue", ["red blue blue"], 0, 2 / 3),  # red once, blue once of three each
    ("1,000", ["1000"], 1, 1),
    ("in 1999", ["1999", "in 1999"], 1, 1),
    ("by train", ["by car", "train"], 0, 2 / 3),  # best of 1/2 and 2/3
    ("", [], 1, 1),
    ("something", [], 0, 0),
    ("", ["Paris"], 0, 0),
    ("the", [], 1, 1),  # nothing is left of it
    ("anything", ["the"], 0, 0),
    ("Zürich", ["zürich"], 1, 1),
    ("a b c d", ["c d e f"], 0, 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)),  # "b c d" against four words
]


@pytest.mark.parametrize(("answer", "right", "exact", "overlap"), SCORED)
def test_exact_match_and_f1_by_hand(answer: str, right: list[str], exact: float, overlap: float) -> None:
    assert squad.exact_match(answer, right) == exact and squad.f1(answer, right) == pytest.approx(overlap, abs=1e-12)


class _Says(QuestionAnswering):
    """A model that answers what it is told to."""

    def confident(self, model: Any, tokenizer: Any, examples: Any) -> tuple[list[str], list[float]]:
        return [answer for answer, *_ in SCORED], [0.9 if answer else 0.1 for answer, *_ in SCORED]


def test_a_file_of_twenty_questions_has_the_sums_of_the_scorer(tmp_path: Path) -> None:
    qas = [
        {"id": str(n), "question": "?", "is_impossible": not right, "answers": [{"text": t, "answer_start": 0} for t in right]}
        for n, (_, right, _, _) in enumerate(SCORED)
    ]  # fmt: skip
    file = tmp_path / "twenty.json.gz"
    whole = {"version": "v2.0", "data": [{"paragraphs": [{"context": "c", "qas": qas}]}]}
    file.write_bytes(gzip.compress(json.dumps(whole).encode()))
    task = _Says(threshold=0.5)
    found = task.measure(None, None, task.read(file).items)  # type: ignore[arg-type]
    exact, overlap = sum(row[2] for row in SCORED), sum(row[3] for row in SCORED)
    assert found["exact_match"] == pytest.approx(exact / 20) and found["f1"] == pytest.approx(overlap / 20)
    assert found["with_answer"] == 17 and found["exact_match_without"] == pytest.approx(2 / 3)
    assert found["abstention"] == {"precision": 1 / 2, "recall": 1 / 3, "f1": pytest.approx(2 / 5)}


def test_risk_and_coverage_by_hand(tmp_path: Path) -> None:
    points = squad.risk_coverage([0.9, 0.8, 0.8, 0.3], [1, 0, 1, 0])
    assert points == [(0.25, 0.0), (0.75, pytest.approx(1 / 3)), (1.0, 0.5)]
    assert squad.area(points) == pytest.approx(0.25 * 0 + 0.5 / 3 + 0.25 * 0.5)
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    squad.draw(points, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_the_threshold_is_the_best_of_all() -> None:
    torch.manual_seed(0)
    asked = [Question(context="c", question="q", answers=("x",) if n % 3 else ()) for n in range(60)]
    confidence = [min(float(torch.rand(()) * (1 if q.answers else 0.7)), 0.99) for q in asked]
    found = squad.best_threshold(confidence, asked)
    best = squad.abstention([value < found for value in confidence], asked)["f1"]
    for other in [*confidence, 1.0, 0.0]:
        assert squad.abstention([value < other for value in confidence], asked)["f1"] <= best + 1e-12
    assert squad.best_threshold([0.2, 0.4], [Question(context="c", question="q", answers=("x",))] * 2) == 0


def test_bad_files_are_named(tmp_path: Path) -> None:
    file, task = tmp_path / "x.json", QuestionAnswering()
    qas = [{"question": "q", "answers": [{"text": "c"}]}, {"question": "q"}]
    whole = {"data": [{"paragraphs": [{"context": "c", "qas": qas}]}]}
    for content, message in (
        ("{", "not JSON"), ("[]", "no SQuAD file"), ('{"data": [3]}', r"data\[0\] has no list 'paragraphs'"),
        (json.dumps(whole), r"paragraphs\[0\]\.qas\[1\]: answers are missing, and is_impossible is not true"),
    ):  # fmt: skip
        file.write_text(content)
        with pytest.raises(LoadError, match=message):
            task.read(file)
    with pytest.warns(UserWarning, match="1 bad lines are skipped"):
        assert len(task.read(file, skip_bad=True)) == 1
    assert len(task.read(file, labelled=False)) == 2
    lines = tmp_path / "y.jsonl"
    lines.write_text('{"context": "c", "question": "q", "answers": ["c"]}\n{"context": "c", "question": "q"}\n')
    with pytest.raises(LoadError, match=r"y\.jsonl, line 2: answers are missing; \[\] says that there is none"):
        task.read(lines)
    with pytest.raises(Error, match="the question on a line of its own"):
        task.example("no context")
    asked = task.example("Ann lives in Rome.\nBob too.\nWhere does Ann live?")
    assert (asked.context, asked.question) == ("Ann lives in Rome.\nBob too.", "Where does Ann live?")


# ------------------------------------------------------------------------------------------------------------- the generated set


def words(part: list[Question]) -> set[str]:
    """Every name and value: capitalised words that no template has, and numbers."""
    templates = " ".join(text for kind in questions.KINDS for text in (kind.fact, kind.question))
    known = set(re.findall(r"\w+", templates.replace("{n}", "").replace("{v}", "")))
    return {word for q in part for word in re.findall(r"\w+", f"{q.context} {q.question}")} - known


def test_no_name_or_value_of_the_test_part_occurs_in_training(tmp_path: Path) -> None:
    train, test = (list(questions.generate(split, count)) for split, count in (("train", 4000), ("test", 800)))
    assert len(questions.KINDS) == 20 and len(words(test)) > 500 and not words(train) & words(test)
    for part in (train, test):
        assert sum(not q.answers for q in part) == len(part) // 4
        for q in part:
            sentences = [text for text in re.split(r"(?<=\.) ", q.context) if text]
            forms = {k: re.fullmatch(k.question.replace("{n}", r"(\w+)").replace("?", r"\?"), q.question) for k in questions.KINDS}
            kind, name = next((k, found[1]) for k, found in forms.items() if found is not None)
            stated = [kind.fact.format(n=name, v=value) for value in (q.answers or words([q]))]
            assert len(sentences) == 3 and sum(text in sentences for text in stated) == len(q.answers)
            assert sum(name in text.replace(".", "").split() for text in sentences) >= len(q.answers) + 1  # a distractor has it
    paths = questions.write(tmp_path, (40, 12), seed=3)
    again = QuestionAnswering().read(paths[0])
    assert [(q.context, q.question, q.answers) for q in again] == [
        (q.context, q.question, q.answers) for q in questions.generate("train", 40, 3)
    ]
    with pytest.raises(Error, match="split is 'dev'"):
        next(questions.generate("dev", 3))


# ------------------------------------------------------------------------------------------------------------------------ answers


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qa") / "base"
    tokenizer = GPT2Tokenizer.train([f"question: {q.question}\ncontext: {q.context}\nanswer:" for q in TINY], 360)
    end = tokenizer.eos_token_id
    torch.manual_seed(0)
    config = GPT2Config(
        len(tokenizer), 64, 64, 2, 2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=end, eos_token_id=end,
        initializer_range=0.05,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# one fact each, of words that are all known: what a tiny model learns in seconds
TINY = [
    Question(context=f"{name} has a {thing}.", question=f"What {verb} {name}?", answers=(thing,) if verb == "has" else ())
    for name, thing, verb in itertools.product(("Ann", "Bob"), ("dog", "cat", "hat", "pen"), ("has", "eats"))
]  # fmt: skip


def test_the_loss_is_on_the_answer_and_a_long_context_is_cut(untrained: Path) -> None:
    tokenizer, task = GPT2Tokenizer.from_pretrained(untrained), QuestionAnswering()
    ids, targets = task.encode(TINY[0], tokenizer, 64)
    assert tokenizer.decode(ids) == "question: What has Ann?\ncontext: Ann has a dog.\nanswer: dog"
    answer = tokenizer.encode(" dog")
    assert targets == [IGNORED] * (len(ids) - len(answer) - 1) + [*answer, tokenizer.eos_token_id]
    ids, targets = task.encode(TINY[1], tokenizer, 64)  # no answer: the end at once
    assert targets == [IGNORED] * (len(ids) - 1) + [tokenizer.eos_token_id]
    cut = task.encode(Question(context="dog " * 50, question="What?", answers=("dog",)), tokenizer, 40)
    assert len(cut.ids) == 40 and tokenizer.decode(cut.ids).endswith("\nanswer: dog")
    with pytest.raises(Error, match="its answer is beyond the context of 40"):
        task.encode(Question(context="dog " * 50 + "hat", question="What?", answers=("hat",)), tokenizer, 40)


def test_an_extracted_answer_is_the_best_greedy_one_of_the_context(untrained: Path) -> None:
    """Against the same decoding without cache, a token at a time, one prompt at a time."""
    model, end = GPT2LMHeadModel.from_pretrained(untrained), GPT2Tokenizer.from_pretrained(untrained).eos_token_id
    torch.manual_seed(1)
    prompts = [(torch.randint(0, end, (n,)).tolist(), torch.randint(0, 9, (m,)).tolist()) for n, m in ((9, 12), (20, 5), (3, 30))]
    for (prompt, context), (found, logprob) in zip(prompts, extract(model, prompts, 6), strict=True):
        answer: list[int] = []
        total = 0.0
        while True:
            starts = [s for s in range(len(context)) if context[s : s + len(answer)] == answer and s + len(answer) < len(context)]
            allowed = sorted({context[s + len(answer)] for s in starts} | ({end} if answer else set()))
            logprobs = torch.log_softmax(model(torch.tensor([prompt + answer])).logits[0, -1], 0)
            token = allowed[int(logprobs[allowed].argmax())]
            total += float(logprobs[token])
            if token == end:
                break
            answer.append(token)
            if len(answer) == 6:
                break
        assert found == answer and logprob == pytest.approx(total, abs=1e-4)


def test_a_set_is_learned_with_its_threshold(untrained: Path, tmp_path: Path, run: Any) -> None:
    for name, copies in (("train", 48), ("val", 2)):
        squad.write(tmp_path / f"{name}.json", TINY * copies, "tiny")
    out = tmp_path / "run"
    config = TrainConfig(
        str(tmp_path / "train.json"), str(out), str(untrained), lr=3e-3, batch=24, save_every=0, device="cpu", threads=1
    )
    finetune("qa", config, FinetuneConfig(epochs=7, val_data=str(tmp_path / "val.json")), quiet=True)
    task = recorded(out)
    assert isinstance(task, QuestionAnswering) and 0 < task.threshold < 1
    for mode in ("generate", "extract"):
        found = evaluate(out, tmp_path / "val.json", options={"mode": mode}, device="cpu")
        assert found["exact_match_with_answer"] > 0.95 and found["abstention"]["f1"] > 0.9 and found["mode"] == mode
        assert found["risk_coverage"][-1][0] == 1 and len(found["risk_coverage"]) <= 101
    code, text, _ = run("predict", out, "Bob has a hat.\nWhat has Bob?", "Bob has a hat.\nWhat eats Bob?", "--json")
    answers = json.loads(text)["answers"]
    assert code == 0 and [a["answer"] for a in answers] == ["hat", ""] and [a["abstains"] for a in answers] == [False, True]
    model, tokenizer = GPT2LMHeadModel.from_pretrained(out), GPT2Tokenizer.from_pretrained(out)
    example = QuestionAnswering().example("Bob has a hat.\nWhat has Bob?")
    asked = Question(context=example.context, question=example.question, answers=("hat",))
    encoded = QuestionAnswering().encode(asked, tokenizer, 64)
    loss, _ = model.loss_sum(torch.tensor([encoded.ids]), torch.tensor([encoded.targets]))
    assert answers[0]["probability"] == pytest.approx(math.exp(-float(loss)), rel=1e-3)
