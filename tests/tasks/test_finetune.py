"""finetune, predict and evaluate: what is learned and recorded, the best epoch, resume, LoRA, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import gptfast
from gptfast import Error, LoadError, checkpoint, tasks
from gptfast.config import LoraConfig, TrainConfig
from gptfast.hub import read_json
from gptfast.model import GPT2ForSequenceClassification
from gptfast.tasks.classification import Classification
from gptfast.tasks.finetune import finetune, load, read
from gptfast.tasks.options import FinetuneConfig
from gptfast.tasks.run import evaluate, predict
from gptfast.training import log, lora


def config(base: Path, data: Path, out: Path, **more: Any) -> TrainConfig:
    values = {"lr": 1e-2, "batch": 16, "weight_decay": 0.0, "save_every": 20, "device": "cpu", **more}
    return TrainConfig(str(data), str(out), str(base), **values)


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory, sentences: Any) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    data = folder / "moods.tsv"
    data.write_text("".join(f"{text}\t{label}\n" for text, label in sentences(300, 1)))
    finetune("sentiment", config(base, data, folder / "run"), FinetuneConfig(epochs=3), quiet=True)
    return folder / "run"


def weights(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read_tensors(run / "model.safetensors")


def test_what_was_learned(tuned: Path, tmp_path: Path, run: Any, sentences: Any) -> None:
    unseen = tmp_path / "unseen.jsonl"
    unseen.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in sentences(200, 2)))
    code, out, _ = run("evaluate", tuned, "--data", unseen, "--json")
    found = json.loads(out)
    assert code == 0 and found["accuracy"] > 0.95 and found["macro_f1"] > 0.95 and found["examples"] == 200
    assert found["task"] == "classification" and found["ece"] <= found["ece_unscaled"] + 0.02
    assert evaluate(tuned, unseen)["accuracy"] == found["accuracy"]
    code, out, _ = run("predict", tuned, "the cast and the book of it is lovely", "the cast and the book of it is dull")
    answers = [line.split("\t")[0] for line in out.splitlines()]
    assert code == 0 and answers == ["good", "bad"]
    code, out, _ = run("predict", tuned, "--data", unseen, "--json")
    assert [answer["answer"] for answer in json.loads(out)["answers"]].count("good") > 50


def test_what_is_recorded(tuned: Path, tmp_path: Path) -> None:
    task = tasks.recorded(tuned)
    assert isinstance(task, Classification) and task.labels == ["bad", "good"] and task.temperature != 1.0
    assert GPT2ForSequenceClassification.from_pretrained(tuned).config.id2label == {0: "bad", 1: "good"}
    copy = Path(shutil.copytree(tuned, tmp_path / "copy"))
    for values, message in (
        ({"version": 2}, "version 2, this gptfast reads 1"),
        ({"version": 1, "task": "sentment", "settings": {}}, "did you mean sentiment"),
        ({"version": 1, "task": "classification", "settings": {"labels": "ab"}}, "labels are 'ab'"),
        ({"version": 1, "task": "classification", "settings": {"temperature": -1.0}}, "temperature is -1.0"),
        ({"version": 1, "task": "classification", "settings": {"heat": 1}}, "allowed: labels, temperature"),
        ({"version": 1, "task": "dialogue", "settings": {"template": "chatml"}}, "template is 'chatml'"),
        ({"version": 1, "task": "dialogue"}, "the settings of dialogue are None"),
    ):
        (copy / "task.json").write_text(json.dumps(values))
        with pytest.raises(LoadError, match=message) as caught:
            tasks.recorded(copy)
        assert str(copy / "task.json") in str(caught.value)


def test_transformers_reads_the_folder(tuned: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tuned).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tuned)
    text = "the plot and the joke of it is stale"
    with torch.no_grad():
        logits = theirs(**tokenizer(text, return_tensors="pt")).logits
    probability = torch.softmax(logits[0] / tasks.recorded(tuned).temperature, 0)  # type: ignore[union-attr]
    (answer,) = predict(tuned, [text])["answers"]
    assert theirs.config.id2label[int(logits.argmax())] == answer["answer"] == "bad"
    assert float(probability.max()) == pytest.approx(answer["probability"], abs=1e-5)


def test_held_out_examples_are_a_part_of_the_data_and_copies_stay_together(moods: Path, base: Path, tmp_path: Path) -> None:
    moods.write_text(moods.read_text() * 2)
    settings = config(base, moods, tmp_path / "run")
    _, train, held_out = read(Classification(), settings, FinetuneConfig(val=0.2))
    texts = [{example.text for example in part} for part in (train, held_out)]
    assert not texts[0] & texts[1] and len(train) + len(held_out) == 400 and 40 <= len(held_out) <= 120
    again = read(Classification(), settings, FinetuneConfig(val=0.2))
    assert again[1].items == train.items
    other = read(Classification(), config(base, moods, tmp_path / "run", seed=1), FinetuneConfig(val=0.2))
    assert other[2].items != held_out.items
    with pytest.warns(UserWarning, match="none of 3 examples is held out"):
        (tmp_path / "few.tsv").write_text("x\ta\ny\tb\nz\tb\n")
        read(Classification(), config(base, tmp_path / "few.tsv", tmp_path / "run"), FinetuneConfig(val=0.001))


def test_the_weights_of_the_best_epoch_are_kept(
    base: Path, moods: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores, seen = iter([0.5, 0.9, 0.7, 0.9, 0.9]), []  # the last for the weights that are kept

    def validate(self: Any, model: Any, *rest: Any) -> dict[str, float]:
        seen.append(model.score.weight.detach().clone())
        return {"accuracy": next(scores)}

    monkeypatch.setattr(Classification, "validate", validate)
    result = finetune("sentiment", config(base, moods, tmp_path / "run"), FinetuneConfig(epochs=4), quiet=True)
    assert result["accuracy"] == 0.9 and len(seen) == 5 and result["step"] > result["best_step"] + 10
    assert "nats an example" in (tmp_path / "run/README.md").read_text()
    kept = weights(tmp_path / "run")["score.weight"]
    assert torch.equal(kept, seen[1]) and torch.equal(kept, seen[4]) and not torch.equal(kept, seen[3])
    records = [record["accuracy"] for record in log.read(tmp_path / "run/log.jsonl") if record["event"] == "eval"]
    assert records == [0.5, 0.9, 0.7, 0.9]


@pytest.mark.parametrize("adapters", [None, LoraConfig(lora_rank=4, lora_targets=("c_attn", "c_fc"))])
def test_a_resumed_run_is_bit_equal(
    base: Path, moods: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapters: LoraConfig | None
) -> None:
    options = FinetuneConfig(epochs=2, lora=adapters is not None, dropout=0.1)
    whole = finetune("sentiment", config(base, moods, tmp_path / "whole"), options, adapters, quiet=True)
    plain, stopped = Classification.validate, []

    def validate(self: Any, *rest: Any) -> dict[str, float]:
        if not stopped:
            stopped.append(os.kill(os.getpid(), signal.SIGTERM))
        return plain(self, *rest)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(Classification, "validate", validate)
        finetune("sentiment", config(base, moods, tmp_path / "run"), options, adapters, quiet=True)
    assert caught.value.code == 75 and not (tmp_path / "run/config.json").exists()
    with pytest.raises(Error, match="is not empty"):
        finetune("sentiment", config(base, moods, tmp_path / "run"), options, adapters, quiet=True)
    again = finetune("sentiment", config(base, moods, tmp_path / "run"), options, adapters, resume=True, quiet=True)
    same = ("accuracy", "val_loss", "best_step", "settings")
    assert [again[key] for key in same] == [whole[key] for key in same]
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert a.keys() == b.keys() and [name for name in a if not torch.equal(a[name], b[name])] == []


def test_resume_takes_what_the_run_recorded(tuned: Path, base: Path, moods: Path, tmp_path: Path, run: Any) -> None:
    out = tmp_path / "run"
    options = ("--task", "sentiment", "--data", moods, "--out", out, "--lr", "1e-2", "--batch", "16", "--epochs", "1")
    assert run("finetune", base, *options)[0] == 0
    code, _, err = run("finetune", base, "--data", moods, "--out", out, "--resume", "--epochs", "2")
    start = [record for record in log.read(out / "log.jsonl") if record["event"] == "finetune"][-1]
    assert code == 0 and start["training"]["lr"] == 1e-2 and start["training"]["batch"] == 16 and start["options"]["epochs"] == 2
    code, _, err = run("finetune", tuned, "--data", moods, "--out", out, "--resume")
    assert code == 2 and f"resume: MODEL was {base}" in err
    moods.write_text(moods.read_text() + "one more\tgood\n")
    code, _, err = run("finetune", base, "--data", moods, "--out", out, "--resume", "--epochs", "3")
    assert code == 2 and "the training data is not what" in err


@pytest.mark.parametrize("name", ["classification", "dialogue", "lm"])
def test_lora_for_every_task(base: Path, moods: Path, tmp_path: Path, name: str) -> None:
    data = moods
    if name != "classification":
        data = tmp_path / "data.jsonl"
        turns = [{"role": "user", "content": "the film"}, {"role": "assistant", "content": "is warm"}]
        data.write_text((json.dumps({"text": "the film is warm", "messages": turns}) + "\n") * 40)
        data.write_text(data.read_text() + json.dumps({"text": "the plot is dull", "messages": turns * 2}))
    adapters = LoraConfig(lora_rank=4, lora_targets=("c_attn", "mlp.c_proj"))
    result = finetune(name, config(base, data, tmp_path / "run", lr=2e-2), FinetuneConfig(epochs=3, val=0.0), adapters, quiet=True)
    model = getattr(gptfast, tasks.find(name).head).from_pretrained(tmp_path / "run")
    before, after = checkpoint.read_tensors(base / "model.safetensors"), weights(tmp_path / "run")
    changed = {key.split(".", 3)[-1] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"attn.c_attn.weight", "mlp.c_proj.weight"} and result["loss"] < 4.5
    fresh = load(tasks.recorded(tmp_path / "run"), str(base))  # type: ignore[arg-type]
    lora.load(fresh, tmp_path / "run/adapter")
    ids = torch.randint(0, 300, (1, 20))
    with torch.no_grad():
        assert torch.allclose(fresh.eval()(ids).logits, model(ids).logits, atol=1e-5)
    assert read_json(tmp_path / "run/adapter/adapter_config.json")["base_model_name_or_path"] == str(base)


def test_packed_rows_learn_too(base: Path, moods: Path, tmp_path: Path) -> None:
    options = FinetuneConfig(epochs=6, pack=True)
    result = finetune("sentiment", config(base, moods, tmp_path / "run", batch=4), options, quiet=True)
    assert result["accuracy"] > 0.9 and result["step"] < 6 * 200 / 4 / 2


REFUSED = {
    "no task": (("--data", "moods.tsv"), "--task is needed; allowed: lm, dialogue, classification"),
    "unknown task": (("--data", "moods.tsv", "--task", "sentimnt"), "did you mean sentiment"),
    "no label": (("--data", "bad.jsonl", "--task", "sentiment"), "bad.jsonl, line 2: label is missing"),
    "malformed": (("--data", "cut.jsonl", "--task", "dialogue"), "cut.jsonl, line 1: not JSON"),
    "empty": (("--data", "empty.tsv", "--task", "sentiment"), "no examples in it"),
    "one class": (("--data", "one.tsv", "--task", "sentiment"), "at least two classes are needed"),
    "no file": (("--data", "absent.tsv", "--task", "sentiment"), "absent.tsv: no such file"),
    "another's option": (("--data", "moods.tsv", "--task", "sentiment", "--template", "plain"), "--template is no option"),
    "lora's option": (("--data", "moods.tsv", "--task", "sentiment", "--lora-rank", "4"), "--lora-rank describes adapters"),
    "target": (
        ("--data", "moods.tsv", "--task", "sentiment", "--lora", "--lora-targets", "q"), "is 'q'; allowed: attn.c_attn"
    ),
    "resume": (("--data", "moods.tsv", "--resume"), "no fine-tuning to resume"),
    "context": (("--data", "moods.tsv", "--task", "sentiment", "--context", "400"), "context is 400; the model has 64"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_finetune_refuses(
    base: Path, moods: Path, tmp_path: Path, run: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text('{"text": "x", "label": "a"}\n{"text": "y"}\n{"text": "z", "label": "b"}\n')
    Path("cut.jsonl").write_text('{"messages": [\n')
    Path("empty.tsv").write_text("\n")
    Path("one.tsv").write_text("x\ta\ny\ta\n")
    options, message = REFUSED[name]
    code, out, err = run("finetune", base, "--out", "run", *options)
    assert code == 2 and out == "" and message in err.splitlines()[-1] and "Traceback" not in err
    assert not Path("run").exists() or not any(Path("run").iterdir())


def test_skip_bad_counts(base: Path, moods: Path, tmp_path: Path, run: Any, tuned: Path) -> None:
    moods.write_text("no label here\n" + moods.read_text() + "\tgood\n")
    options = ("--task", "sentiment", "--data", moods, "--out", tmp_path / "run", "--skip-bad", "--epochs", "1", "--json")
    code, out, err = run("finetune", base, *options)
    assert code == 0 and json.loads(out)["skipped_lines"] == 2 and "2 bad lines are skipped" in err
    assert run("evaluate", tuned, "--data", moods)[0] == 2
    code, out, _ = run("evaluate", tuned, "--data", moods, "--skip-bad", "--json")
    assert code == 0 and json.loads(out)["skipped_lines"] == 2


def test_what_predict_and_evaluate_refuse(base: Path, tuned: Path, moods: Path, tmp_path: Path, run: Any) -> None:
    (tmp_path / "other.tsv").write_text("x\tawful\n")
    for arguments, message in (
        (("predict", base, "x"), "records no task"),
        (("predict", tuned), "predict needs texts"),
        (("predict", tuned, "x", "--data", moods), "predict needs texts"),
        (("predict", tuned, " "), "text is empty"),
        (("predict", tuned, "x", "--dtype", "int8"), "dtype is 'int8'; the task classification is computed in fp32, bf16, fp16"),
        (("predict", base, "x", "--task", "sentiment"), "no names of classes are recorded"),
        (("predict", tuned, "x", "--template", "plain"), "--template is no option of the task classification"),
        (("evaluate", tuned, "--data", tmp_path / "other.tsv"), "line 1: label is 'awful'; the model's classes: bad, good"),
        (("evaluate", tuned, "--data", moods, "--stride", "3"), "--stride is no option of the task"),
        (("evaluate", base, "--data", moods, "--template", "plain"), "--template is no option of the task lm"),
        (("evaluate", tuned, "--data", moods, "--task", "chess"), "task is 'chess'"),
    ):
        code, out, err = run(*arguments)
        assert code == 2 and out == "" and message in err.splitlines()[-1], (arguments, err)
