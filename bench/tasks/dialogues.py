"""A generated set of dialogues: a user tells what colours his things have, and asks for one of them.

    python bench/tasks/dialogues.py --out dialogues [--train 4000] [--test 400]
    gptfast finetune MODEL --task dialogue --data dialogues/train.jsonl --out runs/dialogue --epochs 4
    gptfast evaluate runs/dialogue --data dialogues/test.jsonl

Which thing has which colour is drawn anew in every dialogue, so that an answer has to be read, not remembered; a thing with its
colour is either in the training or in the test dialogues. A perplexity near 1 is reached by reading alone: whoever guesses among
the eight colours is far from it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from pathlib import Path

THINGS = ("bike", "coat", "door", "lamp", "bowl", "boat", "hat", "chair", "cup", "kite", "ring", "sofa")
COLOURS = ("red", "blue", "green", "white", "black", "brown", "yellow", "grey")


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def dialogues(count: int, seed: int, test: bool) -> list[list[dict[str, str]]]:
    """`count` conversations of the test's or of the training's pairs of thing and colour."""
    draw = random.Random(seed)
    pairs = list(itertools.product(THINGS, COLOURS))
    random.Random(0).shuffle(pairs)
    held_out = set(pairs[: len(pairs) // 4])
    mine = {thing: [colour for colour in COLOURS if ((thing, colour) in held_out) == test] for thing in THINGS}
    usable = [thing for thing in THINGS if mine[thing]]
    made = []
    for _ in range(count):
        facts = {thing: draw.choice(mine[thing]) for thing in draw.sample(usable, 2)}
        messages: list[dict[str, str]] = []
        for thing, colour in facts.items():
            messages += [_turn("user", f"my {thing} is {colour}"), _turn("assistant", f"a {colour} {thing}")]
        asked = draw.choice(list(facts))
        messages += [_turn("user", f"which colour has my {asked}?"), _turn("assistant", f"it is {facts[asked]}")]
        made.append(messages)
    return made


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and test.jsonl")
    parser.add_argument("--train", type=int, default=4000, help="dialogues to learn from")
    parser.add_argument("--test", type=int, default=400, help="dialogues to measure on")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", given.train), ("test", given.test)):
        lines = (json.dumps({"messages": messages}) for messages in dialogues(count, given.seed, name == "test"))
        (given.out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
