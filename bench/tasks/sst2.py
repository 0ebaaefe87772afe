"""SST-2 on two cores: pre-train on its train text and WikiText's, fine-tune, and read the development set once per seed.

    python bench/tasks/sst2.py --out runs/sst2 [--seeds 3] [--quick]

Needs GPTFAST_DATA with sst2/train.tsv, sst2/dev.tsv and wikitext2-valid.txt. Sentences of the development set are taken out of
the text for pre-training and out of the training examples, so that none is in any shard. For each seed: a model is pre-trained;
learning rate and dropout are chosen once, with the first seed, by the accuracy on a tenth of train, the epoch on each seed's own
tenth; the development set is read once. Beside it the same model from random weights, its settings chosen in the same way, and
scikit-learn's logistic regression on bags of one and two words. Prints a table and writes OUT/sst2.json. Each step is kept: the
same command goes on where it was stopped. --quick: a model and times far too small for the accuracy to mean anything.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from gptfast import data
from gptfast.benchmark import machine
from gptfast.config import GPT2Config, TrainConfig
from gptfast.model import GPT2LMHeadModel
from gptfast.tasks.finetune import finetune
from gptfast.tasks.options import FinetuneConfig
from gptfast.tasks.run import evaluate
from gptfast.tokenizer import GPT2Tokenizer
from gptfast.training.run import padded, train

LONG = 20  # letters: a shorter sentence stands in other texts by chance
GRID = [{"lr": lr, "dropout": dropout} for lr in (2e-4, 5e-4, 1e-3) for dropout in (0.1, 0.3)]


@dataclasses.dataclass
class Plan:
    """Sizes of the models and of their training."""

    vocabulary: int = 4096
    layers: int = 4
    width: int = 256
    heads: int = 4
    context: int = 64
    pretrain_steps: int = 6000
    pretrain_batch: int = 32
    epochs: float = 6.0
    grid: list[dict[str, float]] = dataclasses.field(default_factory=lambda: list(GRID))
    examples: int | None = None  # of train; None: all


QUICK = Plan(1024, 2, 64, 2, 64, 60, 8, 1.0, GRID[:1], 600)


def sentences(path: Path) -> list[tuple[str, str]]:
    """(text, label) of each line."""
    pairs = (line.rstrip("\n").rpartition("\t") for line in path.read_text(encoding="utf-8").splitlines())
    return [(text, label) for text, _, label in pairs]


def plain(text: str) -> str:
    """A sentence without what two editions of it may differ in."""
    return re.sub(r"[^a-z0-9]+", "", text.lower())


def texts(folder: Path) -> Iterator[str]:
    """What is pre-trained on: each sentence of train, and each paragraph of WikiText, but for those that hold a sentence of dev."""
    dev = {plain(text) for text, _ in sentences(folder / "sst2/dev.tsv")}
    beginnings: dict[str, list[str]] = {}
    for sentence in dev:
        if len(sentence) >= LONG:
            beginnings.setdefault(sentence[:LONG], []).append(sentence)

    def holds(text: str) -> bool:
        spans = (text[place : place + LONG] for place in range(len(text) - LONG + 1))
        return any(sentence in text for span in spans for sentence in beginnings.get(span, ()))

    paragraphs = (folder / "wikitext2-valid.txt").read_text(encoding="utf-8").splitlines()
    for text in (*(text for text, _ in sentences(folder / "sst2/train.tsv")), *filter(str.strip, paragraphs)):
        bare = plain(text)
        if bare and bare not in dev and not holds(bare):
            yield text.strip()


def labelled(folder: Path, limit: int | None) -> list[tuple[str, str]]:
    """The examples of train that are no sentence of dev."""
    dev = {plain(text) for text, _ in sentences(folder / "sst2/dev.tsv")}
    return [(text, label) for text, label in sentences(folder / "sst2/train.tsv") if plain(text) not in dev][:limit]


def once(path: Path, make: Callable[[], Any]) -> Any:
    """The JSON value in `path`; made and written there if there is none."""
    if not path.exists():
        value = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tmp").write_text(json.dumps(value, indent=1))
        path.with_suffix(".tmp").rename(path)
    return json.loads(path.read_text())


def prepare(folder: Path, out: Path, plan: Plan) -> None:
    """OUT/shards and OUT/train.tsv."""
    out.mkdir(parents=True, exist_ok=True)
    lines = [f"{text}\t{label}\n" for text, label in labelled(folder, plan.examples)]
    (out / "train.tsv").write_text("".join(lines), encoding="utf-8")
    if not (out / "shards/dataset.json").exists():
        documents = (json.dumps({"text": text}) for text in texts(folder))
        (out / "text.jsonl").write_text("\n".join(documents), encoding="utf-8")
        data.prepare([out / "text.jsonl"], out / "shards", train_tokenizer=plan.vocabulary, val=0.02, progress=False)


def shape(plan: Plan) -> GPT2Config:
    """The model's architecture."""
    return GPT2Config(
        n_positions=plan.context, n_embd=plan.width, n_layer=plan.layers, n_head=plan.heads, resid_pdrop=0.1, embd_pdrop=0.1,
        attn_pdrop=0.1,
    )  # fmt: skip


def start(out: Path, plan: Plan, seed: int, pretrained: bool) -> tuple[Path, float]:
    """The folder that fine-tuning starts from, and the seconds it took to make."""
    folder = out / f"{'pretrained' if pretrained else 'random'}-{seed}"

    def make() -> dict[str, float]:
        begun = time.perf_counter()
        if pretrained:
            config = TrainConfig(
                str(out / "shards"), str(folder), steps=plan.pretrain_steps, batch=plan.pretrain_batch, context=plan.context,
                lr=1e-3, warmup=plan.pretrain_steps // 20, document_mask=True, seed=seed, eval_every=1000, save_every=1000,
            )  # fmt: skip
            train(config, shape(plan), resume=folder.exists() and any(folder.iterdir()), quiet=False)
        else:
            tokenizer = GPT2Tokenizer.from_pretrained(out / "shards")
            torch.manual_seed(seed)
            assert tokenizer.eos_token_id is not None
            GPT2LMHeadModel(padded(shape(plan), len(tokenizer), tokenizer.eos_token_id)).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return {"seconds": time.perf_counter() - begun}

    return folder, once(out / f"{folder.name}.json", make)["seconds"]


def tune(out: Path, plan: Plan, base: Path, name: str, seed: int, choice: dict[str, float]) -> dict[str, Any]:
    """Fine-tunes; returns what finetune() does, with its seconds. A run that was stopped begins again."""
    run = out / "tuned" / name
    shutil.rmtree(run, ignore_errors=True)
    begun = time.perf_counter()
    config = TrainConfig(
        str(out / "train.tsv"), str(run), str(base), batch=32, lr=choice["lr"], min_lr=0.0, weight_decay=0.01, seed=seed,
        save_every=0,
    )  # fmt: skip
    result = finetune("sentiment", config, FinetuneConfig(epochs=plan.epochs, dropout=choice["dropout"]))
    return {**result, "total_seconds": time.perf_counter() - begun}


def choose(out: Path, plan: Plan, base: Path) -> dict[str, Any]:
    """The settings with the best accuracy on the first seed's tenth of train."""

    def make() -> dict[str, Any]:
        tried = [(tune(out, plan, base, f"{base.name}-choice", 0, settings)["accuracy"], settings) for settings in plan.grid]
        return {"tried": tried, "settings": max(tried, key=lambda pair: pair[0])[1]}

    return dict(once(out / f"{base.name}-choice.json", make))


def seed_results(folder: Path, out: Path, plan: Plan, seed: int, pretrained: bool) -> dict[str, Any]:
    """One row: the development set after pre-training or not, and fine-tuning."""
    kind = "pretrained" if pretrained else "random"
    settings = choose(out, plan, start(out, plan, 0, pretrained)[0])["settings"]
    base, seconds = start(out, plan, seed, pretrained)

    def make() -> dict[str, Any]:
        tuned = tune(out, plan, base, f"{kind}-{seed}", seed, settings)
        found = evaluate(out / "tuned" / f"{kind}-{seed}", folder / "sst2/dev.tsv")
        times = {"pretrain_seconds": seconds if pretrained else 0.0, "finetune_seconds": tuned["total_seconds"]}
        return {"seed": seed, "kind": kind, "held_out": tuned["accuracy"], **settings, **times, **found}

    return dict(once(out / f"{kind}-{seed}-dev.json", make))


def bigrams(folder: Path, plan: Plan) -> dict[str, Any]:
    """scikit-learn's logistic regression on words and pairs of words, its strength chosen by cross-validation on train."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline

    pairs, dev = labelled(folder, plan.examples), sentences(folder / "sst2/dev.tsv")
    words = CountVectorizer(ngram_range=(1, 2), token_pattern=r"\S+", binary=True)
    plain_model = make_pipeline(words, LogisticRegression(max_iter=2000))
    model = GridSearchCV(plain_model, {"logisticregression__C": [0.1, 0.3, 1.0, 3.0]}, cv=5)
    model.fit([text for text, _ in pairs], [label for _, label in pairs])
    return {"accuracy": float(model.score([text for text, _ in dev], [label for _, label in dev]))}


def table(rows: list[dict[str, Any]], base: dict[str, Any]) -> list[str]:
    """The lines to print: means over the seeds, with the spread (largest - smallest) of the accuracy."""
    lines = ["| model | accuracy on dev, % | spread | macro F1, % | ECE before | after | minutes, pre-training and fine-tuning |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for kind in ("pretrained", "random"):
        mine = [row for row in rows if row["kind"] == kind]
        mean = {key: statistics.mean(row[key] for row in mine) for key in ("accuracy", "macro_f1", "ece_unscaled", "ece")}
        spread = max(row["accuracy"] for row in mine) - min(row["accuracy"] for row in mine)
        minutes = max(row["pretrain_seconds"] + row["finetune_seconds"] for row in mine) / 60
        numbers = f"{100 * mean['accuracy']:.2f} | {100 * spread:.2f} | {100 * mean['macro_f1']:.2f}"
        title = "pre-trained, fine-tuned" if kind == "pretrained" else "the same from random weights"
        lines.append(f"| {title}, {len(mine)} seeds | {numbers} | {mean['ece_unscaled']:.3f} | {mean['ece']:.3f} | {minutes:.1f} |")
    lines.append(f"| bag of bigrams, logistic regression | {100 * base['accuracy']:.2f} | | | | | |")
    return lines


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for shards, models and results")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tiny model, for a look at the program itself")
    given = parser.parse_args()
    folder, plan = Path(os.environ.get("GPTFAST_DATA", "")), QUICK if given.quick else Plan()
    out = given.out
    if once(out / "plan.json", lambda: dataclasses.asdict(plan)) != dataclasses.asdict(plan):
        parser.error(f"{out} holds results of another plan; name another folder")
    prepare(folder, out, plan)
    rows = [seed_results(folder, out, plan, seed, kind) for seed in range(given.seeds) for kind in (True, False)]
    base = once(out / "bigrams.json", lambda: bigrams(folder, plan))
    lines = table(rows, base)
    result = {"machine": machine(), "plan": dataclasses.asdict(plan), "rows": rows, "bigrams": base}
    (out / "sst2.json").write_text(json.dumps(result, indent=1))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
