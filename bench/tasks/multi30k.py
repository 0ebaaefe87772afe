"""Multi30k from scratch as prompt -> target: trained on all but the last 1,000 pairs of train, by whose BLEU the epoch is chosen;
sacreBLEU on the whole of val, greedy and with a beam of 4, seed by seed.

    python bench/tasks/multi30k.py --data $GPTFAST_DATA/multi30k --out runs/multi30k                 German to English, 3 seeds
    python bench/tasks/multi30k.py --data $GPTFAST_DATA/multi30k --out runs/multi30k-fr --source fr  French to English
    python bench/tasks/multi30k.py --data ... --out runs/try --seeds 0 --epochs 0.02 --limit 20      a minute, to see that it runs

The files are train and val in two languages, one sentence a line, .gz. `training_seconds` is the time in training steps alone.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

from gptfast.config import TrainConfig
from gptfast.model import GPT2LMHeadModel
from gptfast.tasks.finetune import finetune
from gptfast.tasks.options import FinetuneConfig
from gptfast.tasks.translation import Translation, scores
from gptfast.tokenizer import GPT2Tokenizer

HELD_OUT = 1000


def _common() -> Any:  # bench/ is no package: the file beside this one
    spec = importlib.util.spec_from_file_location("gptfast_bench_tasks_common", Path(__file__).parent / "common.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def lines(path: Path) -> list[str]:
    return gzip.decompress(path.read_bytes()).decode("utf-8").splitlines()


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--source", default="de")
    parser.add_argument("--target", default="en")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=24.0)
    parser.add_argument("--limit", type=int, help="only so many pairs of val, and of those held out")
    for name, value in (("vocabulary", 8000), ("layers", 4), ("width", 256), ("heads", 8), ("context", 192), ("batch", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--dropout", type=float, default=0.15)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def prepare(given: argparse.Namespace) -> tuple[list[tuple[str, str]], str, str]:
    """The pairs to train on, and the two parts of train as `FILE,FILE`."""
    names = given.source, given.target
    both = [lines(given.data / f"train.{name}.gz") for name in names]
    given.out.mkdir(parents=True, exist_ok=True)
    files = []
    for part, cut in (("train", slice(None, -HELD_OUT)), ("held-out", slice(-HELD_OUT, None))):
        for name, texts in zip(names, both, strict=True):
            texts = texts[cut][: given.limit if part == "held-out" else None]
            (given.out / f"{part}.{name}").write_text("\n".join(texts) + "\n", encoding="utf-8")
        files.append(",".join(str(given.out / f"{part}.{name}") for name in names))
    return list(zip(*(texts[:-HELD_OUT] for texts in both), strict=True)), files[0], files[1]


def main() -> None:
    given, common = options(), _common()
    pairs, train, held_out = prepare(given)
    val = [lines(given.data / f"val.{name}.gz")[: given.limit] for name in (given.source, given.target)]
    texts = [text for pair in pairs for text in pair]

    def run(seed: int) -> dict[str, float]:
        shape = {"n_layer": given.layers, "n_head": given.heads, "n_embd": given.width, "n_positions": given.context}
        shape |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), given.dropout)
        start = common.untrained(given.out / f"start-{seed}", texts, given.vocabulary, seed, **shape)
        config = TrainConfig(
            train, str(given.out / f"seed-{seed}"), str(start), batch=given.batch, lr=given.lr, min_lr=0.02, weight_decay=0.1,
            beta2=0.98, dtype=given.dtype, device="cpu", threads=given.threads, seed=seed, save_every=0,
        )
        result = finetune(Translation(), config, FinetuneConfig(epochs=given.epochs, val_data=held_out), quiet=False)
        model, tokenizer = GPT2LMHeadModel.from_pretrained(config.out), GPT2Tokenizer.from_pretrained(config.out)
        task = Translation()
        examples = [task.example(source) for source in val[0]]
        found: dict[str, Any] = {"training_seconds": float(result["seconds"]), "held_out_bleu": result["best"].get("bleu")}
        with torch.no_grad():
            for name, beams in (("greedy", 1), ("beam 4", 4)):
                made = scores(task.translate(model, tokenizer, examples, beams), val[1])
                found |= {f"{name} BLEU": made["bleu"], f"{name} chrF": made["chrf"], "signature": made["signature"]}
        return found

    common.over_seeds(given.seeds, run, pairs=len(pairs), val=len(val[0]), source=given.source, target=given.target)


if __name__ == "__main__":
    main()
