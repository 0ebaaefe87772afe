"""The trainer: it learns, what it leaves on disk, resume bit for bit, and what kills, signals and full disks do to a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptfast import Error, LoadError, checkpoint, data
from gptfast.config import GPT2Config, TrainConfig
from gptfast.model import GPT2LMHeadModel
from gptfast.training import Trainer
from gptfast.training.log import read
from gptfast.training.run import recorded, train

TINY: dict[str, Any] = {"vocab_size": 64, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "eos_token_id": 0}


def tokens(count: int = 4000) -> torch.Tensor:
    """A text that can be learned: each id follows from the one before it."""
    return torch.arange(count) ** 2 % 61


def trainer(out: Path | str = "", steps: int = 6, dropout: float = 0.1, **options: Any) -> Trainer:
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(**TINY, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout))
    base = {"batch": 4, "lr": 1e-2, "warmup": 2, "save_every": 2, "eval_every": 0, "log_every": 2}
    return Trainer(model, tokens(), tokens(200), TrainConfig(out=str(out), steps=steps, **{**base, **options}), quiet=True)


def state(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run / f"checkpoints/step_{step:09d}"
    files = ("model", "optimizer", "random")
    return {f"{file}.{name}": t for file in files for name, t in checkpoint.read_tensors(folder / f"{file}.safetensors").items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_loss_falls(dtype: str) -> None:
    run = trainer(steps=50, dropout=0.0, batch=8, microbatch=5, dtype=dtype)
    before = run.evaluate()["val_loss"]
    result = run.fit()
    assert before == pytest.approx(np.log(64), rel=0.05)
    assert result["val_loss"] < 0.5 * before and result["loss"] < 0.5 * before and result["skipped"] == 0
    assert result["step"] == 50 and result["tokens"] == 50 * 8 * 16


@pytest.mark.parametrize("options", [{}, {"dtype": "bf16", "microbatch": 3}, {"document_mask": True}])
def test_a_resumed_run_is_bit_equal(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = trainer(tmp_path / "whole", **options)
    whole.fit()
    stopped = trainer(tmp_path / "stopped", **options)
    stopped._signal = 15  # as if SIGTERM came during the first step
    with pytest.raises(SystemExit) as code:
        stopped.fit()
    assert code.value.code == 75 and stopped.done == 1
    torch.manual_seed(99)
    again = trainer(tmp_path / "stopped", **options)
    again.fit(resume=True)
    assert_equal(state(tmp_path / "whole", 6), state(tmp_path / "stopped", 6))
    steps = {r["step"]: r["loss"] for r in read(tmp_path / "whole/log.jsonl") if r["event"] == "step"}
    resumed = {r["step"]: r["loss"] for r in read(tmp_path / "stopped/log.jsonl") if r["event"] == "step"}
    assert resumed[4] == steps[4] and resumed[6] == steps[6]


def test_what_a_resume_refuses(tmp_path: Path) -> None:
    trainer(tmp_path / "run").fit()
    with pytest.raises(Error, match=r"not empty.*--resume.*--out"):
        trainer(tmp_path / "run").fit()
    with pytest.raises(Error, match="batch was 4"):
        trainer(tmp_path / "run", batch=8).fit(resume=True)
    other = trainer(tmp_path / "run", steps=8)
    other.loader.fingerprint = "another"
    with pytest.raises(Error, match="training data is not"):
        other.fit(resume=True)
    longer = trainer(tmp_path / "run", steps=8).fit(resume=True)
    assert longer["step"] == 8
    with pytest.warns(UserWarning, match="no checkpoint"):
        trainer(tmp_path / "new", steps=1).fit(resume=True)


def test_bad_input() -> None:
    model = GPT2LMHeadModel(GPT2Config(**TINY))
    with pytest.raises(Error, match="context of 16 needs at least 17"):
        Trainer(model, torch.arange(16))
    with pytest.raises(Error, match="token id 64 in the data"):
        Trainer(model, torch.arange(65))
    with pytest.raises(Error, match="context is 32"):
        Trainer(model, tokens(), config=TrainConfig(context=32))
    with pytest.raises(Error, match="is not fp32"):
        Trainer(GPT2LMHeadModel(GPT2Config(**TINY)).bfloat16(), tokens())
    with pytest.warns(UserWarning, match="no evaluation: the held-out text has 10 tokens"):
        Trainer(model, tokens(), tokens(10))
    for wrong in ({"lr": float("nan")}, {"lr": -1.0}, {"steps": 0}, {"dtype": "fp8"}, {"batch": 1.5}, {"beta2": 1.0}, {"keep": 1}):
        with pytest.raises(Error, match=f"training: {next(iter(wrong))} is"):
            TrainConfig(**wrong)


def test_steps_that_are_not_finite_are_skipped_and_reported(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", steps=4, dropout=0.0, log_every=1)
    run.quiet = False
    real, calls = run.step.loss_sum, []

    def poisoned(batch: Any) -> Any:
        calls.append(1)
        loss, count = real(batch)
        return (loss * float("nan") if len(calls) == 2 else loss), count

    run.step.loss_sum = poisoned  # type: ignore[method-assign]
    result = run.fit()
    assert result["skipped"] == 1 and result["step"] == 4
    assert "1 of the last 1 steps were skipped" in capsys.readouterr().err
    losses = {r["step"]: r["loss"] for r in read(tmp_path / "run/log.jsonl") if r["event"] == "step"}
    assert losses[2] is None and losses[3] < 6


CHILD = """
import os, random, resource, signal, sys, threading, warnings
import torch
torch.set_num_threads(1)
from pathlib import Path
from gptfast import checkpoint
sys.path.insert(0, sys.argv[1])
from test_trainer import trainer
root = Path(sys.argv[2])
trainer(steps=1, save_every=0).fit()  # PyTorch imports much at the first optimizer: once here, not in every child

def fork(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""

CRASHES = CHILD + """
def limited():  # the disk fills up after the first save: files of more than 4 KB no longer fit, until the third save
    run, save, calls = trainer(root / "full"), checkpoint.save, []
    run.quiet = False
    def filling(*arguments):
        calls.append(1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096 if len(calls) == 2 else resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return save(*arguments)
    checkpoint.save = filling
    run.fit()
assert fork(limited) == 0

def terminated():
    run = trainer(root / "terminated", steps=100000, save_every=100000)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    try:
        run.fit()
    except SystemExit as end:
        os._exit(end.code)
assert fork(terminated) == 75

events, stop_at = [], None
def hook(event, arguments):  # what Python asks of the file system in a save, just before it happens
    changes = event in ("open", "os.mkdir", "os.rename", "os.rmdir", "os.remove") and "checkpoints" in str(arguments[0])
    if event == "fsync" or changes:
        events.append(event)
        if len(events) == stop_at:
            os.kill(os.getpid(), signal.SIGKILL)
sync = os.fsync
os.fsync = lambda handle: (hook("fsync", ()), sync(handle))[1]
sys.addaudithook(hook)
def whole():
    trainer(root / "whole").fit()
    (root / "events").write_text(str(len(events)))
assert fork(whole) == 0
count = int((root / "events").read_text())
places = sorted(random.Random(0).sample(range(1, count + 1), 20))
for stop_at in places:
    assert fork(lambda: trainer(root / f"killed_{stop_at}").fit()) == -signal.SIGKILL, stop_at
warnings.simplefilter("ignore")
for place in places:
    stop_at = None
    assert fork(lambda: trainer(root / f"killed_{place}").fit(resume=True)) == 0, place
print(count, *places)
"""


@pytest.fixture(scope="module")
def crashes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One process that imports torch once, and forks a child for each run that is killed, stopped or out of disk."""
    folder = tmp_path_factory.mktemp("crashes")
    command = [sys.executable, "-c", CRASHES, str(Path(__file__).parent), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    return folder, result


def test_a_kill_anywhere_in_a_save_loses_nothing(crashes: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, result = crashes
    count, *places = map(int, result.stdout.split())
    assert count > 50 and len(places) == 20
    expected = state(folder / "whole", 6)
    for place in places:
        assert_equal(expected, state(folder / f"killed_{place}", 6))


def test_a_full_disk_is_a_warning_and_the_last_checkpoint_stays(crashes: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, result = crashes
    assert "no checkpoint of step 4: File too large; training goes on" in result.stderr
    assert [r["step"] for r in read(folder / "full/log.jsonl") if r["event"] == "save_failed"] == [4]
    assert [step for step, _ in checkpoint.steps(folder / "full")] == [6, 2]
    assert_equal(state(folder / "whole", 6), state(folder / "full", 6))


def test_sigterm_saves_and_exits_75(crashes: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    found = checkpoint.newest(crashes[0] / "terminated")
    assert found is not None and 0 < found[0] < 100000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"text": f"document {n} says {n * n} and {'words ' * (n % 7)}\n" * 20}) for n in range(60)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    data.prepare([folder / "text.jsonl"], folder / "data", train_tokenizer=300, val=0.2, progress=False)
    return folder / "data"


def small(**options: Any) -> GPT2Config:
    return GPT2Config(n_positions=16, n_embd=16, n_layer=1, n_head=2, **options)


def test_a_run_ends_as_a_hugging_face_folder(tmp_path: Path, corpus: Path) -> None:
    config = TrainConfig(data=str(corpus), out=str(tmp_path / "run"), steps=5, batch=2, save_every=2, eval_every=3)
    result = train(config, small(), quiet=True)
    assert result["val_bits_per_byte"] > 0 and result["step"] == 5
    values = json.loads((tmp_path / "run/config.json").read_text())
    vocabulary = data.read_meta(corpus)["vocab_size"]
    assert vocabulary % 64 and values["vocab_size"] == vocabulary and values["n_ctx"] == 16
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "run")
    assert model.transformer.wte.weight.shape[0] == vocabulary
    padded = checkpoint.read_tensors(tmp_path / "run/checkpoints/step_000000005/model.safetensors")["transformer.wte.weight"]
    assert padded.shape[0] % 64 == 0 and torch.equal(padded[:vocabulary], model.transformer.wte.weight)
    assert {"tokenizer.json", "log.jsonl", "model.safetensors"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert not list((tmp_path / "run").glob("*.tmp*"))
    options = recorded(tmp_path / "run")
    assert options["batch"] == 2 and options["n_embd"] == 16 and options["steps"] == 5 and "real_vocab_size" not in options
    on = train(TrainConfig(data=str(corpus), out=str(tmp_path / "on"), init=str(tmp_path / "run"), steps=1, batch=2), quiet=True)
    assert on["val_loss"] < np.log(vocabulary)


def test_a_run_that_cannot_start(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(Error, match="--out is needed"):
        train(TrainConfig(data=str(corpus)), small(), quiet=True)
    with pytest.raises(LoadError, match=r"no dataset.json.*gptfast prepare"):
        train(TrainConfig(data=str(tmp_path), out=str(tmp_path / "run")), small(), quiet=True)
    GPT2LMHeadModel(GPT2Config(**TINY)).save_pretrained(tmp_path / "other")
    with pytest.raises(Error, match=r"has 64 ids.*--tokenizer"):
        train(TrainConfig(data=str(corpus), out=str(tmp_path / "run"), init=str(tmp_path / "other")), quiet=True)
    with pytest.raises(LoadError, match="no such folder"):
        recorded(tmp_path / "nothing")
