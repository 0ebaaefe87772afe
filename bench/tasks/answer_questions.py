"""Question answering on the generated set (gptfast/tasks/questions.py), from scratch: exact match on the questions that have an
answer, F1 of abstention at the threshold fitted on a split of train, the risk-coverage curve as a picture, seed by seed.

    python bench/tasks/answer_questions.py --out runs/qa                                                  3 seeds
    python bench/tasks/answer_questions.py --out runs/try --seeds 0 --train 400 --test 40 --epochs 1    a minute, to try it

`training_seconds` is the time in training steps alone. No name or value of the test part occurs in training (tests/tasks checks).
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

from gptfast.config import TrainConfig
from gptfast.tasks import questions, squad
from gptfast.tasks.finetune import finetune
from gptfast.tasks.options import FinetuneConfig
from gptfast.tasks.question_answering import QuestionAnswering
from gptfast.tasks.run import evaluate


def _common() -> Any:  # bench/ is no package: the file beside this one
    spec = importlib.util.spec_from_file_location("gptfast_bench_tasks_common", Path(__file__).parent / "common.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train", type=int, default=60000, help="questions, a twentieth of them held out")
    parser.add_argument("--test", type=int, default=2000)
    parser.add_argument("--epochs", type=float, default=5.0)
    for name, value in (("vocabulary", 1024), ("layers", 4), ("width", 192), ("heads", 6), ("context", 128), ("batch", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    given, common = options(), _common()
    train, test = questions.write(given.out, (given.train, given.test))
    texts = [f"question: {q.question}\ncontext: {q.context}\nanswer:" for q in QuestionAnswering().read(train)]

    def run(seed: int) -> dict[str, float]:
        shape = {"n_layer": given.layers, "n_head": given.heads, "n_embd": given.width, "n_positions": given.context}
        shape |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), given.dropout)
        start = common.untrained(given.out / f"start-{seed}", texts, given.vocabulary, seed, **shape)
        config = TrainConfig(
            str(train), str(given.out / f"seed-{seed}"), str(start), batch=given.batch, lr=given.lr, min_lr=0.02, weight_decay=0.1,
            beta2=0.98, dtype=given.dtype, device="cpu", threads=given.threads, seed=seed, save_every=0,
        )
        result = finetune(QuestionAnswering(), config, FinetuneConfig(epochs=given.epochs, val=0.05), quiet=False)
        found = evaluate(config.out, test, device="cpu")
        squad.draw(found["risk_coverage"], Path(config.out, "risk-coverage.png"))
        return {
            "training_seconds": float(result["seconds"]), "threshold": found["threshold"], "aurc": found["aurc"],
            "exact_match_with_answer": found["exact_match_with_answer"], "f1_with_answer": found["f1_with_answer"],
            "exact_match": found["exact_match"], "f1": found["f1"], "abstention_f1": found["abstention"]["f1"],
        }  # fmt: skip

    common.over_seeds(given.seeds, run, train=given.train, test=given.test)


if __name__ == "__main__":
    main()
