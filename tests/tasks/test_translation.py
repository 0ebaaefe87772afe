"""Translation: files of pairs, what is trained on, the metric beside sacreBLEU's command, and a language that is learned."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gptfast import Error, LoadError
from gptfast.config import GPT2Config, TrainConfig
from gptfast.model import GPT2LMHeadModel
from gptfast.tasks import recorded
from gptfast.tasks.finetune import finetune
from gptfast.tasks.options import FinetuneConfig
from gptfast.tasks.run import evaluate
from gptfast.tasks.task import IGNORED
from gptfast.tasks.translation import Pair, Translation, scores
from gptfast.tokenizer import GPT2Tokenizer

WORDS = {
    "eins": "one", "zwei": "two", "drei": "three", "vier": "four", "rot": "red", "blau": "blue", "haus": "house", "baum": "tree",
}  # fmt: skip


def pairs(count: int, seed: int) -> list[tuple[str, str]]:
    draw = random.Random(seed)
    sentences = [[draw.choice(list(WORDS)) for _ in range(draw.randint(1, 5))] for _ in range(count)]
    return [(" ".join(words), " ".join(WORDS[word] for word in reversed(words))) for words in sentences]


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("translation") / "base"
    tokenizer = GPT2Tokenizer.train([f"{source} => {target}" for source, target in pairs(500, 0)], 340)
    end = tokenizer.eos_token_id
    torch.manual_seed(0)
    config = GPT2Config(
        len(tokenizer), 48, 64, 2, 2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=end, eos_token_id=end,
        initializer_range=0.08,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_every_form_of_file_gives_the_same_pairs(tmp_path: Path) -> None:
    expected = [("ein Haus", "a house"), ("Bäume", "trees")]
    files = {
        "a.tsv": "ein Haus\ta house\nBäume\ttrees\n", "b.csv": 'target,source\na house,ein Haus\n"trees",Bäume\n',
        "c.jsonl": "".join(json.dumps({"source": s, "target": t}) + "\n" for s, t in expected),
        "d.de": "ein Haus\nBäume\n", "d.en": "a house\r\ntrees",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    for name in ("d.de", "d.en"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    names = [str(tmp_path / name) for name in ("a.tsv", "b.csv", "c.jsonl")]
    for path in (*names, f"{tmp_path}/d.de,{tmp_path}/d.en", f"{tmp_path}/d.de.gz,{tmp_path}/d.en.gz"):
        assert [(pair.source, pair.target) for pair in Translation().read(path)] == expected, path


def test_bad_files_are_named(tmp_path: Path) -> None:
    task = Translation()
    for name, text in (("a", "x\ny\n"), ("b", "1\n"), ("c", "1\n\n"), ("d.tsv", "x\ty\nz\t \n")):
        (tmp_path / name).write_text(text)
    with pytest.raises(LoadError, match=r"a has 2 lines, .*b 1; equally many are needed"):
        task.read(f"{tmp_path}/a,{tmp_path}/b")
    with pytest.raises(LoadError, match="line 2: target is empty"):
        task.read(f"{tmp_path}/a,{tmp_path}/c")
    with pytest.raises(LoadError, match=r"d\.tsv, line 2: target is empty"):
        task.read(tmp_path / "d.tsv")
    with pytest.warns(UserWarning, match="1 bad lines are skipped"):
        assert task.read(f"{tmp_path}/a,{tmp_path}/c", skip_bad=True).skipped == 1
    with pytest.raises(LoadError, match="no such file"):
        task.read(f"{tmp_path}/a,{tmp_path}/none")
    with pytest.raises(LoadError, match="two parallel files FILE,FILE are needed"):
        task.read("a,b,c")
    with pytest.raises(Error, match="the text to translate is empty"):
        task.example(" ")


def test_the_loss_is_on_the_target_and_its_end(untrained: Path) -> None:
    tokenizer = GPT2Tokenizer.from_pretrained(untrained)
    task = Translation()
    ids, targets = task.encode(Pair(source="rot haus", target="house red"), tokenizer, 48)
    assert tokenizer.decode(ids) == "rot haus => house red"
    prompt = len(tokenizer.encode("rot haus =>"))
    assert targets[: prompt - 1] == [IGNORED] * (prompt - 1)
    assert targets[prompt - 1 :] == [*ids[prompt:], tokenizer.eos_token_id] and len(targets) == len(ids)
    with pytest.raises(Error, match=r"the pair has \d+ tokens, the model's context is 4"):
        task.encode(Pair(source="rot haus", target="house red"), tokenizer, 4)


def test_bleu_and_chrf_are_sacrebleus_command(tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
    draw = random.Random(0)
    words = ["the", "a", "dog,", "cat", "runs", ".", "over", "under", "two", "men"]
    references = [" ".join(draw.choices(words, k=12)) for _ in range(50)]
    texts = [" ".join(word for word in line.split() if draw.random() < 0.8) for line in references]
    for name, lines in (("ref", references), ("sys", texts)):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "sacrebleu", tmp_path / "ref", "-i", tmp_path / "sys", "-m", "bleu", "chrf", "-w", "6"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    bleu, chrf = json.loads(done.stdout)
    found = scores(texts, references)
    assert found["bleu"] == pytest.approx(bleu["score"], abs=1e-6) and found["chrf"] == pytest.approx(chrf["score"], abs=1e-6)
    assert found["signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp")
    assert scores(references, references)["bleu"] == pytest.approx(100) and 20 < found["bleu"] < 80


def test_without_sacrebleu_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(Error, match=r"pip install 'gptfast-torch\[translation\]'"):
        Translation().prepare([])


def test_a_language_is_learned_and_beams_are_those_of_generate(untrained: Path, tmp_path: Path, run: Any) -> None:
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
    for name, count, seed in (("train.tsv", 480, 1), ("val.tsv", 30, 2)):
        (tmp_path / name).write_text("".join(f"{source}\t{target}\n" for source, target in pairs(count, seed)))
    out = tmp_path / "run"
    config = TrainConfig(
        str(tmp_path / "train.tsv"), str(out), str(untrained), lr=5e-3, batch=32, save_every=0, device="cpu", threads=1
    )
    result = finetune("translation", config, FinetuneConfig(epochs=12, val_data=str(tmp_path / "val.tsv")), quiet=True)
    assert result["bleu"] > 80 and recorded(out) == Translation()
    measured = evaluate(out, tmp_path / "val.tsv", device="cpu")
    assert measured["bleu"] > 80 and measured["beams"] == 4 and measured["pairs"] == 30 and "chrf_signature" in measured
    code, text, _ = run("predict", out, "zwei blau", "eins", "--beams", 1)
    assert code == 0 and text.splitlines()[1] == "one"
    model, tokenizer = GPT2LMHeadModel.from_pretrained(out), GPT2Tokenizer.from_pretrained(out)
    task = Translation(beams=3, answer_tokens=9)
    pair = Pair(source="drei vier haus")
    ids = torch.tensor([task.prompt(pair, tokenizer)])
    alone = model.generate(ids, num_beams=3, max_new_tokens=9)[0, ids.shape[1] :].tolist()
    alone = alone[: alone.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in alone else alone
    others = [Pair(source=source) for source, _ in pairs(9, 4)]
    assert task.translate(model, tokenizer, [*others, pair])[-1] == tokenizer.decode(alone).strip()
    with pytest.raises(Error, match=r"the source has \d+ tokens with its prompt; the model's context leaves 47"):
        task.translate(model, tokenizer, [Pair(source="haus " * 60)])
