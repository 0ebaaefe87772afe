"""`gptfast prepare` as a pipeline: killed and repeated, in one process or several, with little memory, through a pipe."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gptfast import Error, GPT2Tokenizer, LoadError, data, encoding

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs", "run", "over", "hills"]


def lines(count: int) -> str:
    draw = random.Random(0)
    return "".join(json.dumps({"text": " ".join(draw.choices(WORDS, k=30)) + f" {n}"}) + "\n" for n in range(count))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    GPT2Tokenizer.train([lines(50)], 300).save_pretrained(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's folder on sys.path, which a started process is given and which tests keep it off."""
    monkeypatch.syspath_prepend(str(Path(data.__file__).parent.parent))


@pytest.mark.usefixtures("importable")
def test_the_number_of_processes_changes_nothing(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text(lines(3000))
    monkeypatch.setattr(data, "_BATCH_CHARS", 20_000)
    data.prepare([tmp_path / "a.jsonl"], tmp_path / "one", tokenizer, progress=False)
    data.prepare([tmp_path / "a.jsonl"], tmp_path / "two", tokenizer, progress=False, processes=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    monkeypatch.setattr(encoding, "cores", lambda asked: asked or 2)
    opened: list[int] = []
    monkeypatch.setattr(encoding, "ALONE", 100_000)
    monkeypatch.setattr(encoding.Encoder, "_open", lambda self: opened.append(1) or (_ for _ in ()).throw(Error("opened")))
    with pytest.raises(Error, match="opened"):
        data.prepare([tmp_path / "a.jsonl"], tmp_path / "three", tokenizer, progress=False, processes=None)
    assert opened == [1], "others are started once the text is long enough"


KILLED = """
import os, signal, sys
from gptfast import data
data.COMMIT_EVERY, data._BATCH_CHARS, left = 0.0, 20_000, [int(sys.argv[4])]
commit = data.Partial.commit
def counted(self, **progress):
    commit(self, **progress)
    left[0] -= "place" in progress
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
data.Partial.commit = counted
data.prepare([sys.argv[1]], sys.argv[2], sys.argv[3], progress=False)
"""


def test_a_killed_run_goes_on_and_ends_bit_equal(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    source.write_text(lines(3000))
    data.prepare([source], tmp_path / "whole", tokenizer, progress=False)
    done = subprocess.run([sys.executable, "-c", KILLED, source, out, tokenizer, "5"], capture_output=True, text=True, timeout=100)
    assert done.returncode == -signal.SIGKILL, done.stderr
    partial = tmp_path / "out.partial"
    assert not out.exists() and (partial / "progress.json").exists()
    with open(partial / "train_00000.bin", "ab") as file:
        file.write(b"written after the last commit")
    place = json.loads((partial / "progress.json").read_text())["place"]
    encoded: list[int] = []
    encode = encoding.encode
    monkeypatch.setattr(encoding, "encode", lambda p, task, end: encoded.append(len(task.texts)) or encode(p, task, end))
    data.prepare([source], out, tokenizer, progress=False)
    assert sum(encoded) == 3000 - place["pieces"] < 3000, "what was finished is not done again"
    assert contents(out) == contents(tmp_path / "whole") and not partial.exists()


def interrupted(folder: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A run that a malformed line ended after it had committed some progress."""
    source, out = folder / "a.jsonl", folder / "out"
    source.write_text(lines(400) + "{\n" + lines(3))
    monkeypatch.setattr(data, "COMMIT_EVERY", 0.0)
    monkeypatch.setattr(data, "_BATCH_CHARS", 5_000)
    with pytest.raises(LoadError, match="line 401: not JSON"):
        data.prepare([source], out, tokenizer, progress=False)
    assert not out.exists() and (folder / "out.partial/progress.json").exists(), "what is finished stays"
    return source, out


def test_after_a_bad_line_it_goes_on_without_it(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = interrupted(tmp_path, tokenizer, monkeypatch)
    with pytest.raises(Error, match="of an interrupted run whose val differ"):
        data.prepare([source], out, tokenizer, val=0.3, progress=False)
    meta = data.prepare([source], out, tokenizer, progress=False, skip_bad=True)
    whole = data.prepare([source], tmp_path / "whole", tokenizer, progress=False, skip_bad=True)
    assert meta == whole and meta["skipped"] == 1 and contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("harm", ["input", "shard", "journal", "stranger"])
def test_what_cannot_go_on_is_refused_in_one_line(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    source, out = interrupted(tmp_path, tokenizer, monkeypatch)
    partial = tmp_path / "out.partial"
    message = {"input": "changed since", "shard": "not what was written", "journal": "not the progress", "stranger": "is not what"}
    if harm == "input":
        facts = source.stat()
        source.write_text(source.read_text().replace("cat", "dog", 1))
        os.utime(source, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    elif harm == "shard":
        with open(partial / "train_00000.bin", "r+b") as file:
            file.seek(data.HEADER + 10)
            file.write(b"\xff\xff")
    elif harm == "journal":
        (partial / "progress.json").write_text("[]")
    else:
        (partial / "progress.json").unlink()
    before = sorted(path.name for path in partial.iterdir())
    with pytest.raises(Error, match=message[harm]):
        data.prepare([source], out, tokenizer, progress=False, skip_bad=True)
    assert sorted(path.name for path in partial.iterdir()) == before and not out.exists()


def test_two_runs_into_one_folder(tmp_path: Path, tokenizer: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "a.txt").write_text("text")
    lock = os.open(tmp_path / "out.partial", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(Error, match="another gptfast prepare is writing it"):
        data.prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer, progress=False)
    os.close(lock)
    data.prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer, val=0, progress=False)


def test_standard_input_with_a_new_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def give(content: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))

    give(lines(300))
    piped = data.prepare(["-"], tmp_path / "piped", train_tokenizer=290, progress=False, format="jsonl")
    (tmp_path / "a.jsonl").write_text(lines(300))
    assert piped == data.prepare([tmp_path / "a.jsonl"], tmp_path / "file", train_tokenizer=290, progress=False)
    assert contents(tmp_path / "piped") == contents(tmp_path / "file"), "what was kept of the pipe is gone"


LIMITED = """
import resource, sys
from gptfast import data, encoding
from gptfast.tokenizer import GPT2Tokenizer
encode = encoding.encode
encoding.encode = lambda p, task, end: encode(p, task._replace(texts=[t[:20] for t in task.texts]), end)
tokenizer = GPT2Tokenizer.from_pretrained(sys.argv[3])
data.prepare([sys.argv[4]], sys.argv[2] + "-small", tokenizer, progress=False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
data.prepare([sys.argv[1]], sys.argv[2], tokenizer, progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_input(tmp_path: Path, tokenizer: Path) -> None:
    """Of each document only the beginning is encoded, which is the slow part and sees a batch at a time."""
    part = "".join(json.dumps({"text": f"{n} " + "the cat sat " * 400}) + "\n" for n in range(1_000))
    (tmp_path / "small.jsonl").write_text(part)
    with open(tmp_path / "large.jsonl", "w") as file:
        for _ in range(10):
            file.write(part)
    size = (tmp_path / "large.jsonl").stat().st_size
    command = [sys.executable, "-c", LIMITED, tmp_path / "large.jsonl", tmp_path / "out", tokenizer, tmp_path / "small.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout) << 10
    assert grown < size / 2, f"{grown:,} bytes more for {size:,} of text"


@pytest.mark.usefixtures("importable")
def test_a_process_that_dies_is_an_error(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines(100))
    spec = GPT2Tokenizer.from_pretrained(tokenizer).to_json()
    with encoding.Encoder(spec, 1, 2) as encoder, pytest.raises(Error, match="was killed"):
        task = encoding.Task(["text"], ["train"], [True])
        results = encoder.map((task, n) for n in range(100))
        next(results)
        for process in encoder._pool._processes.values():  # type: ignore[union-attr]
            process.kill()
        time.sleep(0.2)
        list(results)
