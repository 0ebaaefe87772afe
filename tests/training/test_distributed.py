"""Several processes: the same curve as one, every sample once, and how they stop, fail and go on together.

One process imports torch and forks the ranks of each scenario, as torchrun would start them; it does so once for all tests. One
scenario is a real torchrun.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptfast import Error, checkpoint
from gptfast.config import GPT2Config, TrainConfig
from gptfast.data import TokenData
from gptfast.model import GPT2LMHeadModel
from gptfast.training import Trainer
from gptfast.training.distributed import start
from gptfast.training.loader import Batch, Loader
from gptfast.training.log import read
from gptfast.training.parallel import Parallel

STEPS, BATCH = 50, 8
EPOCH = 96  # samples


class Ragged(Loader):
    """Windows of which the first tokens, more or fewer, have no target: ranks have unequal counts."""

    def __init__(self) -> None:
        super().__init__(TokenData.from_ids(torch.arange(EPOCH * 16 + 1) ** 2 % 61), 16)

    def samples(self, first: int, count: int) -> Batch:
        """Loader's."""
        batch = super().samples(first, count)
        assert batch.numbers is not None
        targets = batch.targets.clone()  # of one row it shares its memory with the ids
        for row, number in enumerate(batch.numbers.tolist()):
            targets[row, : number * 7 % 15] = -100
        return batch._replace(targets=targets)


def trainer(out: Path | str, steps: int = STEPS, dropout: float = 0.0, width: int = 32, **options: Any) -> Trainer:
    torch.manual_seed(1)
    sizes = {"vocab_size": 61, "n_positions": 16, "n_embd": width, "n_layer": 2, "n_head": 2, "eos_token_id": 0}
    sizes |= {key: options.pop(key) for key in ("n_layer",) if key in options}
    model = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout))
    base = {"batch": BATCH, "lr": 1e-3, "warmup": 10, "save_every": 25, "eval_every": 0, "log_every": 1}
    base |= {"schedule": "constant", "log_samples": True}
    config = TrainConfig(out=str(out), steps=steps, **{**base, **options})
    return Trainer(model, Ragged(), torch.arange(400) % 61, config, quiet=True)


# ------------------------------------------------------------------------------------------------ in a process that forks the ranks


def ranks(folder: Path, world: int, work: Callable[[], None]) -> list[int]:
    """work() in each of `world` processes, with torchrun's variables; their exit codes. What one prints is in folder/rank.N."""
    import torch.distributed as dist

    folder.mkdir(parents=True, exist_ok=True)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's agent has it, so it outlives a rank
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
            os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", **{name: str(value) for name, value in where.items()}}
            printed = os.open(folder / f"rank.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(printed, 1)
            os.dup2(printed, 2)
            code = 1
            try:
                work()
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
            except Error as error:
                print(f"gptfast: error: {error}", file=sys.stderr)
                code = 2
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(code)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def fitted(folder: Path, world: int, resume: bool = False, **options: Any) -> None:
    def work() -> None:
        trainer(folder / "run", **options).fit(resume)

    codes = ranks(folder, world, work)
    assert codes == [0] * world, (folder.name, codes, (folder / "rank.0").read_text()[-2000:])


def curves(root: Path) -> None:
    fitted(root / "one", 1)
    for world in (2, 4):
        for engine in ("ddp", "fsdp"):
            steps = 30 if (engine, world) == ("fsdp", 4) else STEPS  # four processes wait for each other for long on two cores
            fitted(root / f"{engine}{world}", world, parallel=engine, microbatch=2 if world == 2 else None, steps=steps)
    for source, world, engine in (("ddp4", 1, "ddp"), ("fsdp4", 1, "ddp"), ("ddp4", 2, "fsdp"), ("fsdp4", 2, "ddp")):
        target = root / f"{source}-on-{world}"
        middle = "checkpoints/step_000000025"
        shutil.copytree(root / source / "run" / middle, target / "run" / middle)
        fitted(target, world, resume=True, parallel=engine, steps=35)


def once(root: Path) -> None:
    """An epoch of 12 steps in four pieces, each in another number of processes."""
    for count, (world, engine) in enumerate([(1, "ddp"), (2, "fsdp"), (4, "ddp"), (1, "ddp")], 1):
        fitted(root / "once", world, resume=count > 1, steps=3 * count, parallel=engine, save_every=3)


def halves(root: Path) -> None:
    """bf16 on each engine, and dropout with and without a stop."""
    for name, world, engine in (("bf1", 1, "ddp"), ("bf2-ddp", 2, "ddp"), ("bf2-fsdp", 2, "fsdp")):
        fitted(root / name, world, parallel=engine, dtype="bf16", steps=20)
    fitted(root / "whole", 2, dropout=0.2, steps=6)
    for steps in (3, 6):
        fitted(root / "stopped", 2, resume=steps > 3, dropout=0.2, steps=steps, save_every=3)


def stops(root: Path) -> None:
    """SIGTERM on rank 1, a gradient that is not finite on rank 1, an error of rank 1, and its death."""

    def terminated() -> None:
        run = trainer(root / "terminated/run", steps=10**6, save_every=10**6, log_samples=False)
        run.quiet = False
        if run.parallel.rank == 1:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with run.parallel.together():
            run.fit()

    assert ranks(root / "terminated", 2, terminated) == [75, 75]

    for engine in ("ddp", "fsdp"):

        def poisoned(engine: str = engine) -> None:
            run = trainer(root / f"nan-{engine}/run", steps=4, parallel=engine)
            run.quiet = False
            real, calls = run.step.loss_sum, []

            def loss_sum(batch: Batch) -> Any:
                loss, count = real(batch)
                calls.append(1)
                return (loss * float("nan") if len(calls) == 2 and run.parallel.rank == 1 else loss), count

            run.step.loss_sum = loss_sum  # type: ignore[method-assign]
            assert run.fit()["skipped"] == 1

        assert ranks(root / f"nan-{engine}", 2, poisoned) == [0, 0], (root / f"nan-{engine}/rank.1").read_text()

    def failing(name: str, how: Callable[[], None]) -> Callable[[], None]:
        def work() -> None:
            with start(TrainConfig()).together():
                run = trainer(root / name / "run", parallel="fsdp")
                real = run.loader.samples

                def samples(first: int, count: int) -> Batch:
                    if first >= 5 * BATCH + BATCH // 2:
                        how()
                    return real(first, count)

                run.loader.samples = samples  # type: ignore[method-assign]
                run.fit()

        return work

    def broken() -> None:
        raise Error("row 44 of the data is broken")

    assert ranks(root / "error", 2, failing("error", broken)) == [2, 2]
    assert ranks(root / "death", 2, failing("death", lambda: os.kill(os.getpid(), signal.SIGKILL))) == [2, -signal.SIGKILL]


def command(root: Path) -> None:
    """`gptfast train` with a batch that two processes cannot share."""
    from gptfast import data
    from gptfast.cli import main

    (root / "text.txt").write_text("to be or not to be\n" * 400)
    data.prepare([root / "text.txt"], root / "data", train_tokenizer=280, val=0, progress=False)

    def train() -> None:
        raise SystemExit(main(["train", "--data", str(root / "data"), "--out", str(root / "odd/run"), "--batch", "3"]))

    assert ranks(root / "odd", 2, train) == [2, 2]


def memory(root: Path) -> None:
    """How far the resident memory of each rank rises while it builds and trains a model of 6.3 million parameters."""

    def resident(name: str) -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition(f"{name}:")[2].split()[0])

    def work() -> None:
        trainer("", steps=1, parallel="fsdp", log_samples=False).fit()  # what is imported and made once is no part of it
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        before = resident("VmRSS")
        trainer("", steps=2, width=256, n_layer=8, parallel="fsdp", batch=4, microbatch=1).fit()
        print(resident("VmHWM") - before, file=sys.stderr)

    for world in (1, 2):
        codes = ranks(root / f"memory{world}", world, work)
        assert codes == [0] * world, (root / f"memory{world}/rank.0").read_text()


def main(root: Path) -> None:
    torch.set_num_threads(1)
    for heavy in ("torch._dynamo", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "torch.distributed.tensor"):
        importlib.import_module(heavy)  # once here, not in every rank
    trainer("", steps=1).fit()  # PyTorch imports much at the first optimizer
    seconds = {}
    for scenario in (curves, once, halves, stops, command, memory):
        before = time.perf_counter()
        scenario(root)
        seconds[scenario.__name__] = round(time.perf_counter() - before, 1)
    print(json.dumps(seconds))


# --------------------------------------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_distributed as t; t.main(t.Path(sys.argv[2]))"
    # a fixed threshold: resident memory is what is in use, not what glibc keeps of large pieces that were freed
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert result.returncode == 0, result.stderr
    print(result.stdout)
    return folder


def losses(folder: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read(folder / "run/log.jsonl") if r["event"] == "step"}


def samples(folder: Path, step: int) -> list[list[int]]:
    """The sample numbers that each rank logged for a step."""
    logs = [folder / "run/log.jsonl", *sorted(folder.glob("run/log.rank*.jsonl"))]
    found = [[r["numbers"] for r in read(log) if r["event"] == "samples" and r["step"] == step] for log in logs]
    return [numbers for ranks in found for numbers in ranks]


def printed(folder: Path, rank: int) -> str:
    return (folder / f"rank.{rank}").read_text()


@pytest.mark.parametrize("name", ["ddp2", "ddp4", "fsdp2", "fsdp4"])
def test_the_same_curve_in_any_number_of_processes(root: Path, name: str) -> None:
    one, many = losses(root / "one"), losses(root / name)
    assert list(one) == list(range(1, STEPS + 1)) and one[STEPS] < 0.9 * one[1]
    assert list(many) == list(range(1, (30 if name == "fsdp4" else STEPS) + 1))
    assert max(abs(many[step] / one[step] - 1) for step in many) < 1e-5


@pytest.mark.parametrize("name", ["ddp2", "ddp4", "fsdp2", "fsdp4"])
def test_each_rank_logs_its_samples_and_together_they_are_the_batch(root: Path, name: str) -> None:
    for step in (1, 2, 30):
        (whole,) = samples(root / "one", step)
        parts = samples(root / name, step)
        assert len(parts) == int(name[-1]) and all(len(part) == BATCH // len(parts) for part in parts)
        assert [number for part in parts for number in part] == whole


@pytest.mark.parametrize("name", ["ddp4", "fsdp4"])
@pytest.mark.parametrize("world", [1, 2])
def test_a_checkpoint_of_four_processes_goes_on_in_one_and_two(root: Path, name: str, world: int) -> None:
    whole, resumed = losses(root / "one"), losses(root / f"{name}-on-{world}")
    assert list(resumed) == list(range(26, 36))
    assert max(abs(resumed[step] / whole[step] - 1) for step in resumed) < 1e-5


def test_a_checkpoint_is_the_same_files_whatever_wrote_it(root: Path) -> None:
    def tensors(name: str, file: str) -> dict[str, torch.Tensor]:
        return checkpoint.read_tensors(root / name / "run/checkpoints/step_000000025" / file)

    for file in ("model.safetensors", "optimizer.safetensors"):
        one = tensors("one", file)
        for name in ("ddp4", "fsdp4", "fsdp2"):
            other = tensors(name, file)
            assert list(other) == list(one)
            for key, value in one.items():
                torch.testing.assert_close(other[key], value, rtol=2e-3, atol=1e-4, msg=f"{name}: {key}")


def test_a_run_of_fsdp_ends_as_a_hugging_face_folder(root: Path) -> None:
    one, many = (GPT2LMHeadModel.from_pretrained(root / name / "run") for name in ("one", "fsdp2"))
    assert json.loads((root / "fsdp2/run/config.json").read_text()) == json.loads((root / "one/run/config.json").read_text())
    for (name, p), q in zip(one.named_parameters(), many.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-3, atol=1e-4, msg=name)


def test_an_epoch_over_changing_numbers_of_processes_is_each_sample_once(root: Path) -> None:
    numbers = [number for step in range(1, 13) for part in samples(root / "once", step) for number in part]
    assert sorted(numbers) == list(range(EPOCH))
    assert [len(samples(root / "once", step)) for step in (3, 6, 9, 12)] == [1, 2, 4, 1]


@pytest.mark.parametrize("name", ["bf2-ddp", "bf2-fsdp"])
def test_bf16_has_the_curve_of_one_process_in_bf16(root: Path, name: str) -> None:
    one, many = losses(root / "bf1"), losses(root / name)
    assert max(abs(many[step] / one[step] - 1) for step in one) < 2e-3
    exact = losses(root / "one")
    assert any(many[step] != exact[step] for step in many)


def test_dropout_is_the_same_after_a_stop(root: Path) -> None:
    for file in ("model", "optimizer"):
        paths = [root / name / f"run/checkpoints/step_000000006/{file}.safetensors" for name in ("whole", "stopped")]
        one, other = map(checkpoint.read_tensors, paths)
        assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_sigterm_on_one_rank_saves_once_and_stops_all(root: Path) -> None:
    steps = [step for step, folder in checkpoint.steps(root / "terminated/run") if checkpoint.verify(folder) is None]
    assert len(steps) == 1 and 0 < steps[0] < 10**6
    assert f"stopped at step {steps[0]:,}" in printed(root / "terminated", 0) and printed(root / "terminated", 1) == ""


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(root: Path, engine: str) -> None:
    assert "1 of the last 1 steps were skipped" in printed(root / f"nan-{engine}", 0) and printed(root / f"nan-{engine}", 1) == ""
    curve = losses(root / f"nan-{engine}")
    assert curve[2] is None and 0 < curve[4] < curve[1] * 1.01


def test_the_failure_of_one_rank_is_said_once_and_ends_all(root: Path) -> None:
    assert printed(root / "error", 1) == "gptfast: error: rank 1: row 44 of the data is broken\n"
    assert printed(root / "error", 0) == ""
    assert "rank 0: another process of this run ended without a word" in printed(root / "death", 0)


def test_a_batch_that_the_processes_cannot_share_is_one_line(root: Path) -> None:
    lines = [line for rank in (0, 1) for line in printed(root / "odd", rank).splitlines()]
    assert len(lines) == 1 and lines[0].endswith("batch is 3; 2 processes need a multiple of 2"), lines


def test_a_rank_of_fsdp_needs_less_memory_than_one_process(root: Path) -> None:
    one = int(printed(root / "memory1", 0))
    assert one > 80_000  # kB: parameters, gradients and two moments are 100 MB
    assert max(int(printed(root / "memory2", rank)) for rank in (0, 1)) < 0.8 * one


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    parallel = start(TrainConfig(parallel="fsdp"))
    assert type(parallel) is Parallel and parallel.main and parallel.rows(TrainConfig(batch=3)) == 3
    for rank, world in (("2", "2"), ("-1", "1"), ("x", "2")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", world)
        with pytest.raises(Error, match=rf"RANK is '{rank}' and WORLD_SIZE '{world}'; torchrun"):
            start(TrainConfig())
    with pytest.raises(Error, match="parallel is 'zero'; allowed: ddp, fsdp"):
        TrainConfig(parallel="zero")


def workers(agent: int) -> list[int]:
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    return [pid for pid in map(int, children) if b"gptfast" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_torchrun_restarts_a_run_whose_process_died(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    sizes = "--n-layer 1 --n-head 2 --n-embd 16 --n-positions 16 --batch 4 --log-every 1 --save-every 20 --device cpu"
    train = ["-m", "gptfast", "train", "--data", str(root / "data"), "--out", str(out), "--steps", "300", *sizes.split()]
    launch = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    with open(tmp_path / "printed", "w") as file:
        run = subprocess.Popen([*launch, *train, "--parallel", "fsdp"], stdout=file, stderr=file)
        while run.poll() is None and not list(checkpoint.steps(out)):
            time.sleep(0.05)
        os.kill(workers(run.pid)[-1], signal.SIGKILL)
        code = run.wait(timeout=120)
    text = (tmp_path / "printed").read_text()
    assert code == 0, text
    records = read(out / "log.jsonl")
    assert [r["event"] for r in records if r["event"] in ("start", "resume")] == ["start", "resume"]
    assert next(r for r in records if r["event"] == "resume")["step"] % 20 == 0
    assert sorted(r["step"] for r in records if r["event"] == "step") == list(range(1, 301))
    assert text.count(": step 300, loss") == 1  # only one process prints
    assert GPT2LMHeadModel.from_pretrained(out).config.n_embd == 16
