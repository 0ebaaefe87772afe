"""Every loader on damaged files: it returns, or raises gptfast.Error in one line, in bounded time and memory."""

from __future__ import annotations

import json
import random
import re
import resource
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import gptfast
from gptfast import Error, checkpoint, data, packed
from gptfast.config import TrainConfig
from gptfast.options import keys, read_yaml

PIECES = (b"", b"0", *(bytes([sign]) for sign in b'"{}[],:\n\xff\0'), b"null", b"-1", b"1e999", b"NaN", b"../", b"true")
NUMBERS = tuple(str(number).encode() for number in (0, -1, 1, 7, 2**16, 2**32, 2**63 - 1, 10**40, 0.5))


def damaged(draw: random.Random, good: bytes) -> bytes:
    """Bytes changed, cut, doubled, or numbers in text replaced by others."""
    bad, front = bytearray(good), min(len(good), 2000)  # headers are at the front
    for _ in range(draw.randint(1, 3)):
        kind = draw.randrange(6)
        place = draw.randrange(draw.choice([front, max(len(bad), 1)]) or 1)
        if kind == 0:
            bad[place : place + draw.choice([0, 1, 8, 300])] = draw.choice(PIECES) * draw.choice([1, 1, 2, 3000])
        elif kind == 1:
            bad = bad[: draw.randrange(len(bad) + 1)]
        elif kind == 2:
            bad[place:place] = bad[place : place + draw.choice([4, 60, 3000])]
        elif kind == 3 and len(bad) > place:
            bad[place] ^= 1 << draw.randrange(8)
        else:
            found = [match.span() for match in re.finditer(rb"-?\d+", bytes(bad[:20000]))]
            if found:
                begin, end = draw.choice(found)
                bad[begin:end] = draw.choice(NUMBERS)
    return bytes(bad)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small whole thing of every kind that is loaded."""
    root = tmp_path_factory.mktemp("fuzz")
    torch.manual_seed(0)
    tokenizer = gptfast.GPT2Tokenizer.train(["the cat sat on the mat. " * 20], 270)
    config = gptfast.GPT2Config(vocab_size=len(tokenizer), n_positions=8, n_embd=8, n_layer=1, n_head=1)
    model = gptfast.GPT2LMHeadModel(config)
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    model.save_pretrained(root / "sharded", max_shard_size="5KB")
    packed.write(root / "model", "bf16", root / "packed")
    (root / "text.jsonl").write_text("\n".join(json.dumps({"text": f"the cat {i}"}) for i in range(20)))
    (root / "text.csv").write_text("id,text\n" + "".join(f'{i},"the ""cat"" {i}"\n' for i in range(20)))
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": [f"the cat {i}" for i in range(20)]}), root / "text.parquet")
    data.prepare([root / "text.jsonl"], root / "shards", root / "model", val=0.3, progress=False)
    checkpoint.save(root / "run", 3, lambda folder: (folder.json("a.json", {"x": 1}), folder.tensors("b", {"t": torch.ones(3)}))[0])
    (root / "train.yaml").write_text("steps: 3\nlr: 1e-3\ndtype: bf16\nwarmup: 5\nschedule: cosine\n")
    return root


def read_shards(root: Path) -> None:
    for split in data.SPLITS:
        found = data.load(root / "shards", split)
        found.read(0, len(found))


def read_checkpoint(root: Path) -> None:
    found = checkpoint.newest(root / "run")
    if found is not None:
        checkpoint.read_json(found[1] / "a.json")
        checkpoint.read_tensors(found[1] / "b")


STEP = "run/checkpoints/step_000000003"
LOADERS: dict[str, tuple[tuple[str, ...], Callable[[Path], object]]] = {
    "config": (("model/config.json",), lambda root: gptfast.GPT2LMHeadModel.from_pretrained(root / "model")),
    "safetensors": (("model/model.safetensors",), lambda root: gptfast.GPT2LMHeadModel.from_pretrained(root / "model")),
    "index": (("sharded/model.safetensors.index.json",), lambda root: gptfast.GPT2LMHeadModel.from_pretrained(root / "sharded")),
    "classifier": (("model/config.json",), lambda root: gptfast.GPT2ForSequenceClassification.from_pretrained(root / "model")),
    "tokenizer": (
        ("model/tokenizer.json", "model/tokenizer_config.json"), lambda root: gptfast.GPT2Tokenizer.from_pretrained(root / "model"),
    ),
    "packed": (("packed",), lambda root: gptfast.GPT2Tokenizer.from_pretrained(root / "packed")),
    "verify": (("packed",), lambda root: packed.verify(root / "packed")),
    "shards": (("shards/dataset.json", "shards/train_00000.bin", "shards/val_00000.bin"), read_shards),
    "jsonl": (("text.jsonl",), lambda root: list(data.read_texts(root / "text.jsonl"))),
    "csv": (("text.csv",), lambda root: list(data.read_texts(root / "text.csv"))),
    "parquet": (("text.parquet",), lambda root: list(data.read_texts(root / "text.parquet"))),
    "checkpoint": ((f"{STEP}/manifest.json", f"{STEP}/a.json", f"{STEP}/b"), read_checkpoint),
    "yaml": (("train.yaml",), lambda root: read_yaml(root / "train.yaml", keys(TrainConfig))),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*starts with random weights")
@pytest.mark.parametrize("loader", LOADERS)
def test_damage_gives_one_typed_line_or_a_result(loader: str, good: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    rounds = request.config.getoption("--fuzz-rounds")
    root, (names, load) = Path(shutil.copytree(good, tmp_path / "root")), LOADERS[loader]
    draw, refused, slowest = random.Random(loader), 0, 0.0
    load(root)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(rounds):
        path = root / draw.choice(names)
        whole = path.read_bytes()
        path.write_bytes(damaged(draw, whole))
        start = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a head that is missing starts with random weights; a checkpoint is skipped
            try:
                load(root)
            except Error as error:
                refused += 1
                assert 0 < len(line := str(error)) < 1500 and "\n" not in line, line[:3000]
        slowest = max(slowest, time.process_time() - start)
        path.write_bytes(whole)
    assert refused > rounds // 20 or loader == "checkpoint", "a loader that takes anything checks nothing"
    assert slowest < 5 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 300 << 10
    load(root)
