"""Does a run survive SIGKILL anywhere in a save? `make crash`, or

    python -P tests/crash.py --runs 200 --seed 0

A tiny run saves at steps 2, 4, 6 and 8 and keeps two checkpoints, so the save of step 6 is the first that removes one. A
process is forked for each run, stops before that save, and is traced (ptrace) through it: it is killed as it enters a drawn
system call between the first write of the save and the removal of the oldest checkpoint. Two fifths of the kills are drawn
uniformly over all of these calls, the others uniformly within each of the save's phases in turn, since a rename is few calls
and a removal is many. Then the run is resumed in another process. It has to find a checkpoint that verifies, no older than the
last complete one, and to end with the bits of a run that nobody killed: weights, optimizer, random generators. Ends with 1
where one of them does not.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

PHASES = ("weights", "optimizer", "state", "manifest", "rename", "clean-up")
SAVES, KILLED, STEPS, EVERY = 3, 6, 8, 2  # the save that is traced, its step, steps of a run, steps between saves
SOURCES = ("gptfast/checkpoint.py", "gptfast/training/state.py", "gptfast/training/trainer.py", "tests/crash.py")

# ------------------------------------------------------------------------------------------------------------------------ tracing

_TRACEME, _SYSCALL, _SETOPTIONS, _CONT, _INFO = 0, 24, 0x4200, 7, 0x420E
_SYSGOOD = 1  # stops at system calls are told apart from other traps
_OPENAT, _RENAMES, _WRITES = 257, (82, 264, 316), (1, 18, 20, 296)  # x86-64: openat; rename, renameat, renameat2; write, ...
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.ptrace.restype = ctypes.c_long


def unavailable() -> str | None:
    """None where this machine can trace a child, else the reason."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"numbers of system calls are known for Linux on x86-64, this is {sys.platform} on {platform.machine()}"
    child = os.fork()
    if child == 0:
        os._exit(0 if _libc.ptrace(_TRACEME, 0, None, None) == 0 else 1)
    allowed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return None if allowed else "ptrace is not allowed here"


def _ptrace(request: int, child: int, address: int | None = None, data: Any = None) -> int:
    result = int(_libc.ptrace(request, child, address, data))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"ptrace request {request}: {os.strerror(error)}")
    return result


class _Info(ctypes.Structure):
    """struct ptrace_syscall_info of linux/ptrace.h, as far as an entry fills it."""

    _fields_ = (
        ("op", ctypes.c_uint8), ("pad", ctypes.c_uint8 * 3), ("arch", ctypes.c_uint32), ("instruction", ctypes.c_uint64),
        ("stack", ctypes.c_uint64), ("number", ctypes.c_uint64), ("arguments", ctypes.c_uint64 * 6), ("rest", ctypes.c_uint64),
    )  # fmt: skip


def _text(child: int, address: int) -> str:
    """The C string at an address of the child."""
    with open(f"/proc/{child}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(256).split(b"\0")[0].decode(errors="replace")


class Call(NamedTuple):
    """A system call of a save: its number and the phase that it belongs to."""

    number: int
    phase: str


class _Phases:
    """Which phase of a save a system call belongs to, told from the files opened before it; None before the first file."""

    def __init__(self) -> None:
        self.now: str | None = None

    def enter(self, child: int, info: _Info) -> str | None:
        if info.number == _OPENAT and self.now != "clean-up":
            name = _text(child, info.arguments[1]).rpartition("/")[2]
            known = {"model.safetensors": "weights", "optimizer.safetensors": "optimizer", "manifest.json": "manifest"}
            if name in known:
                self.now = known[name]
            elif name.endswith((".safetensors", ".json")):
                self.now = "state"
            elif self.now == "manifest":  # the folder itself, to be synced before it is renamed
                self.now = "rename"
            elif self.now == "rename" and self._renamed and name != "checkpoints":
                self.now = "clean-up"
            elif self.now == "rename" and self._renamed:  # the parent is opened twice: to be synced, and to be listed
                self._parents += 1
                self.now = "clean-up" if self._parents > 1 else "rename"
        if info.number in _RENAMES:
            self._renamed = True
        return self.now

    _renamed, _parents = False, 0


def trace(child: int, stop: tuple[str, int] | None) -> list[Call]:
    """The system calls of a stopped child up to its next SIGSTOP; with `stop` (phase, place in it) it is killed as it enters that
    call, or the first one after that phase."""
    calls: list[Call] = []
    phases, inside = _Phases(), Counter[str]()
    entry = False
    while True:
        _ptrace(_SYSCALL, child)
        _, status = os.waitpid(child, 0)
        if not os.WIFSTOPPED(status):
            raise RuntimeError(f"the traced process ended by itself, status {status}")
        if os.WSTOPSIG(status) == signal.SIGSTOP:
            return calls
        if os.WSTOPSIG(status) != signal.SIGTRAP | 0x80:
            continue
        entry = not entry
        if not entry:
            continue
        info = _Info()
        _ptrace(_INFO, child, ctypes.sizeof(info), ctypes.addressof(info))
        phase = phases.enter(child, info)
        if phase is None:
            continue
        calls.append(Call(int(info.number), phase))
        inside[phase] += 1
        if stop and (inside[phase] - 1 == stop[1] if phase == stop[0] else PHASES.index(phase) > PHASES.index(stop[0])):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return calls


# ----------------------------------------------------------------------------------------------------------------------- the runs


def make(out: Path) -> Any:
    """The trainer of every run, alike to the bit."""
    import torch

    from gptfast.config import GPT2Config, TrainConfig
    from gptfast.model import GPT2LMHeadModel
    from gptfast.training import Trainer

    torch.manual_seed(1)
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, eos_token_id=0)  # with dropout
    options = TrainConfig(out=str(out), steps=STEPS, batch=4, lr=1e-2, warmup=2, save_every=EVERY, eval_every=0, log_every=2)
    return Trainer(GPT2LMHeadModel(config), torch.arange(4000) ** 2 % 61, None, options, quiet=True)


def forked(work: Callable[[], object]) -> int:
    """The pid of a child that does this and ends with 0, or with 1 and a traceback."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def _traced(out: Path) -> None:
    """In the child: a run that stops before and behind the save that is traced."""
    from gptfast import checkpoint

    save, calls = checkpoint.save, Counter[str]()

    def stopping(*arguments: Any) -> Path:
        calls["save"] += 1
        if calls["save"] != SAVES:
            return save(*arguments)
        os.kill(os.getpid(), signal.SIGSTOP)
        path = save(*arguments)
        os.kill(os.getpid(), signal.SIGSTOP)
        return path

    checkpoint.save = stopping
    _ptrace(_TRACEME, 0)
    make(out).fit()


def killed(out: Path, stop: tuple[str, int] | None) -> list[Call]:
    """A run that is killed at `stop`, or watched through the save where that is None."""
    child = forked(lambda: _traced(out))
    _, status = os.waitpid(child, 0)
    assert os.WIFSTOPPED(status), f"the run ended before its third save, status {status}"
    _ptrace(_SETOPTIONS, child, None, _SYSGOOD)
    calls = trace(child, stop)
    if stop is None:
        _ptrace(_CONT, child)
        assert os.waitpid(child, 0)[1] == 0
    return calls


def resumed(out: Path) -> None:
    """Goes on in a process of its own, from a checkpoint that verifies."""
    from gptfast import checkpoint

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = checkpoint.newest(out)
    assert found is not None and found[0] in (KILLED - EVERY, KILLED), f"resume would start from {found}"
    child = forked(lambda: make(out).fit(resume=True))
    assert os.waitpid(child, 0)[1] == 0, "the resumed run failed"


def state(out: Path) -> dict[str, Any]:
    """All tensors of the last checkpoint."""
    from gptfast import checkpoint

    folder = out / f"checkpoints/step_{STEPS:09d}"
    assert checkpoint.verify(folder) is None, checkpoint.verify(folder)
    files = ("model", "optimizer", "random")
    return {f"{file}.{name}": t for file in files for name, t in checkpoint.read_tensors(folder / f"{file}.safetensors").items()}


def draws(calls: list[Call], runs: int, seed: int) -> list[tuple[str, int]]:
    """(phase, place in it) of every kill: two fifths of them over all calls, the others over the phases in turn."""
    rng = random.Random(seed)
    counts = Counter(call.phase for call in calls)
    places = [(phase, place) for phase in PHASES for place in range(counts[phase])]
    by_phase = [PHASES[number % len(PHASES)] for number in range(runs * 3 // 5)]
    return [rng.choice(places) for _ in range(runs - len(by_phase))] + [(phase, rng.randrange(counts[phase])) for phase in by_phase]


def campaign(folder: Path, runs: int, seed: int, say: Callable[[str], object] = print) -> dict[str, Any]:
    """Kills and resumes `runs` runs in `folder`; returns seed, runs, resumed, calls in a save, and kills per phase."""
    import torch

    torch.set_num_threads(1)
    for name in ("warm", "whole"):  # PyTorch imports much at the first step: once here, not in every child
        make(folder / name).fit()
    expected = state(folder / "whole")
    calls = killed(folder / "watched", None)
    counts = Counter(call.phase for call in calls)
    say(f"{len(calls)} system calls in a save: " + ", ".join(f"{phase} {counts[phase]}" for phase in PHASES))
    kills, good = Counter[str](), 0
    for number, stop in enumerate(draws(calls, runs, seed)):
        out = folder / f"run-{number}"
        last = killed(out, stop)[-1]
        kills[last.phase] += 1
        try:
            resumed(out)
            found = state(out)
            differ = [name for name in expected if not torch.equal(expected[name], found[name])]
            assert found.keys() == expected.keys() and not differ, f"differs in {', '.join(differ[:3])}"
            good += 1
            shutil.rmtree(out)
        except AssertionError as failure:
            say(f"run {number}, killed in {last.phase} at call {stop[1]} of it (number {last.number}): {failure}")
    return {"seed": seed, "runs": runs, "resumed": good, "calls": len(calls), "kills": {phase: kills[phase] for phase in PHASES}}


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -P tests/crash.py", description="SIGKILL at drawn system calls of a save.")
    parser.add_argument("--runs", type=int, default=200, help="runs that are killed (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="draws the system calls (default: 0)")
    parser.add_argument("--output", type=Path, help="where the record goes (default: tests/campaigns.json)")
    options = parser.parse_args(words)
    from gptfast.testing import campaigns

    reason = unavailable()
    if reason is not None:
        print(f"crash: {reason}", file=sys.stderr)
        return 3
    os.environ["OMP_NUM_THREADS"] = "1"
    print(f"crash: {options.runs} runs, about a second each", flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gptfast-crash-") as folder:
        facts = campaign(Path(folder), options.runs, options.seed, lambda text: print(text, flush=True))
    phases = ", ".join(f"{phase} {count}" for phase, count in facts["kills"].items())
    print(f"{facts['resumed']} of {facts['runs']} resumed and ended bit-equal in {time.monotonic() - start:.0f} s; kills: {phases}")
    command = shlex.join(["python", "-P", "tests/crash.py", "--runs", str(options.runs), "--seed", str(options.seed)])
    campaigns.write("crash", {"command": command, **facts}, SOURCES, options.output or campaigns.FILE)
    return int(facts["resumed"] != facts["runs"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
