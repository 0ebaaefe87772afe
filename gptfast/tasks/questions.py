"""A generated set of questions in SQuAD's format: to be answered by reading, as no name or value in its test part was seen before.

Twenty kinds of fact, each with its question. Names and values are drawn from syllables, those of each split from words of its own
(told by a hash of the word). A context has three facts in random order: for a question that can be answered the fact itself and two
distractors, one of the same kind about another name and one of another kind about the same name; for a quarter of the questions the
fact itself is replaced by a third distractor, so that the context has no answer.

    python -m gptfast.tasks.questions --out questions --train 40000 --test 1000
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptfast.errors import Error
from gptfast.tasks import squad
from gptfast.tasks.squad import Question

SPLITS = ("train", "test")
IMPOSSIBLE = 0.25
ONSETS = [*"bdfghjklmnprstvwz", "br", "dr", "fl", "gr", "kl", "pr", "sk", "st", "tr"]
VOWELS = ["a", "e", "i", "o", "u", "ai", "ei", "ou"]
CODAS = ["", "", "", "l", "m", "n", "r", "s", "x"]
TEST_SHARE = 0.2  # of the words


@dataclass(frozen=True)
class Kind:
    """One kind of fact: the sentence, and the question that its value answers; {n} is the name, {v} the value."""

    fact: str
    question: str
    number: bool = False  # the value is a number, else a word


KINDS = (
    Kind("{n} lives in {v}.", "Where does {n} live?"),
    Kind("{n} was born in {v}.", "Where was {n} born?"),
    Kind("{n} works as a {v}.", "What does {n} work as?"),
    Kind("{n} is married to {v}.", "Who is {n} married to?"),
    Kind("The teacher of {n} was {v}.", "Who taught {n}?"),
    Kind("{n} has a dog called {v}.", "What is the dog of {n} called?"),
    Kind("{n} plays the {v}.", "Which instrument does {n} play?"),
    Kind("{n} speaks {v}.", "Which language does {n} speak?"),
    Kind("{n} likes to eat {v}.", "What does {n} like to eat?"),
    Kind("{n} drives a {v}.", "Which car does {n} drive?"),
    Kind("{n} is {v} years old.", "How old is {n}?", True),
    Kind("{n} has {v} cousins.", "How many cousins does {n} have?", True),
    Kind("The house of {n} has {v} rooms.", "How many rooms does the house of {n} have?", True),
    Kind("{n} wrote a book called {v}.", "Which book did {n} write?"),
    Kind("{n} studied at {v} college.", "At which college did {n} study?"),
    Kind("The favourite colour of {n} is {v}.", "What is the favourite colour of {n}?"),
    Kind("{n} founded the company {v}.", "Which company did {n} found?"),
    Kind("{n} travelled to {v} by train.", "Where did {n} travel by train?"),
    Kind("The neighbour of {n} is {v}.", "Who is the neighbour of {n}?"),
    Kind("{n} bought the painting from {v}.", "Who sold the painting to {n}?"),
)


def belongs(word: str) -> str:
    """The split whose words a name or value is one of, by its hash."""
    share = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big") / 2.0**64
    return SPLITS[share < TEST_SHARE]


def _word(rng: random.Random, split: str, number: bool) -> str:
    """A word of two or three syllables, or a number of two to four digits, of the split."""
    while True:
        if number:
            word = str(rng.randrange(10, 10000))
        else:
            parts = (rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(rng.choice((2, 2, 3))))
            word = "".join(parts).capitalize()
        if belongs(word) == split:
            return word


def _facts(rng: random.Random, split: str, answerable: bool) -> tuple[list[str], str, str]:
    """(sentences, question, value)."""
    kind, other, third = rng.sample(KINDS, 3)
    names: list[str] = []
    while len(names) < 3:
        names += [word for word in [_word(rng, split, False)] if word not in names]
    values: list[str] = []
    for one in (kind, kind, other, third):
        word = _word(rng, split, one.number)
        while word in (*names, *values):
            word = _word(rng, split, one.number)
        values.append(word)
    name, another, stranger = names
    first = kind.fact.format(n=name, v=values[0]) if answerable else third.fact.format(n=stranger, v=values[3])
    sentences = [first, kind.fact.format(n=another, v=values[1]), other.fact.format(n=name, v=values[2])]
    rng.shuffle(sentences)
    return sentences, kind.question.format(n=name), values[0]


def generate(split: str, count: int, seed: int = 0) -> Iterator[Question]:
    """`count` questions of a split, train or test; a quarter of them, at random places, cannot be answered."""
    if split not in SPLITS:
        raise Error(f"split is {split!r}; allowed: {', '.join(SPLITS)}")
    rng = random.Random(f"{split} {seed}")
    impossible = set(rng.sample(range(count), round(count * IMPOSSIBLE)))
    for number in range(count):
        sentences, question, value = _facts(rng, split, number not in impossible)
        answers = () if number in impossible else (value,)
        yield Question(context=" ".join(sentences), question=question, answers=answers, id=f"{split}-{seed}-{number}")


def write(folder: Path | str, sizes: Sequence[int], seed: int = 0) -> list[Path]:
    """train.json and test.json of so many questions in a folder."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths = [Path(folder, f"{split}.json") for split in SPLITS]
    for path, split, count in zip(paths, SPLITS, sizes, strict=True):
        squad.write(path, list(generate(split, count, seed)), f"generated-{split}")
    return paths


def main() -> None:
    """The command line of `python -m gptfast.tasks.questions`."""
    import argparse

    parser = argparse.ArgumentParser(description="write a generated set of questions in SQuAD's format")
    parser.add_argument("--out", default="questions", help="folder for train.json and test.json")
    parser.add_argument("--train", type=int, default=40000, help="questions to train on")
    parser.add_argument("--test", type=int, default=1000, help="questions to test with")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for path in write(given.out, (given.train, given.test), given.seed):
        print(path)


if __name__ == "__main__":
    main()
