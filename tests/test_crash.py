"""tests/crash.py: twelve kills at system calls of a save, and a save that would not survive them; `make crash` is the long form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FRAGILE = """
import os, shutil, sys
sys.path.insert(0, sys.argv[1])
import crash
from gptfast import checkpoint

def save(run, step, fill, keep=2):  # writes in place, and removes the oldest before there is a new one
    final = run / f"checkpoints/step_{step:09d}"
    for _, old in list(checkpoint.steps(run))[keep - 2:]:
        shutil.rmtree(old, ignore_errors=True)
    final.mkdir(parents=True)
    folder = checkpoint.Folder(final)
    fill(folder)
    checkpoint.write_json(final / "manifest.json", {"version": checkpoint.VERSION, "step": step, "files": folder.files})
    return final

checkpoint.save = save
crash.PHASES = ("weights", "optimizer", "state", "manifest")
facts = crash.campaign(crash.Path(sys.argv[2]), 5, 0)
assert facts["resumed"] < facts["runs"], facts
"""


@pytest.fixture(scope="module")
def traceable() -> None:
    """In a process of its own: this one has threads and is not forked."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import crash; print(crash.unavailable() or '')"
    done = subprocess.run([sys.executable, "-P", "-c", code, str(ROOT / "tests")], capture_output=True, text=True, check=True)
    if done.stdout.strip():
        pytest.skip(done.stdout.strip())


@pytest.mark.usefixtures("traceable")
def test_twelve_kills(tmp_path: Path) -> None:
    record = tmp_path / "campaigns.json"
    command = [sys.executable, "-P", str(ROOT / "tests/crash.py"), "--runs", "12", "--seed", "1", "--output", str(record)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads(record.read_text())["campaigns"]["crash"]
    assert facts["resumed"] == facts["runs"] == sum(facts["kills"].values()) == 12
    assert facts["calls"] > 60 and min(facts["kills"].values()) >= 1, "every phase of a save is killed in"


@pytest.mark.usefixtures("traceable")
def test_a_save_without_a_rename_is_noticed(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-c", FRAGILE, str(ROOT / "tests"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resume would start from" in done.stdout
