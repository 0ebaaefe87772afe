"""Every code block of README.md is executed, in order, in one folder; one that cannot be says why in a comment before it."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from gptfast.backend import EXTENSIONS

ROOT = Path(__file__).parent.parent
REASONS = ("gpu", "several machines", "download", "long")
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>[^>]*?) -->\n+)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.S | re.M)


class Block(NamedTuple):
    line: int
    language: str
    code: str
    reason: str | None


def blocks(text: str) -> list[Block]:
    return [
        Block(text.count("\n", 0, m.start("code")), m["language"], m["code"], m["reason"])
        for m in BLOCK.finditer(text)
        if m["language"] in ("sh", "python")
    ]


def run(block: Block, folder: Path) -> None:
    tools = folder / "bin"
    if not tools.exists():
        tools.mkdir()
        modules = {"gptfast": "-P -m gptfast", "python": "", "torchrun": "-P -m torch.distributed.run"}
        for name, arguments in modules.items():
            target = f"{sys.executable} {arguments}".strip()
            (tools / name).write_text(f'#!/bin/sh\nexec {target} "$@"\n')
            (tools / name).chmod(0o755)
    command = ["bash", "-euo", "pipefail", "-c", block.code] if block.language == "sh" else [sys.executable, "-P", "-c", block.code]
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "NO_COLOR": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    printed = f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    if done.returncode and EXTENSIONS["_C"] is not None and "the C++ engine computes, and it does not run here" in done.stderr:
        print(f"README.md:{block.line} ends with: {done.stderr.strip().splitlines()[-1]}")
        return
    assert done.returncode == 0, f"README.md:{block.line} exits {done.returncode}\n{block.code}\n{printed}"


def test_every_block_runs(tmp_path: Path) -> None:
    found = blocks((ROOT / "README.md").read_text())
    assert len(found) >= 8, "README.md has lost its code blocks, or the pattern no longer finds them"
    for block in found:
        if block.reason is None:
            run(block, tmp_path)
        else:
            print(f"README.md:{block.line} not run ({block.reason}): {block.code.strip().splitlines()[0]}")


def test_reasons_are_allowed() -> None:
    for block in blocks((ROOT / "README.md").read_text()):
        assert block.reason is None or block.reason in REASONS, f"README.md:{block.line}: {block.reason!r} is not one of {REASONS}"


def test_a_failing_block_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="exits 3"):
        run(Block(1, "sh", "exit 3", None), tmp_path)
    with pytest.raises(AssertionError, match="exits 1"):
        run(Block(1, "python", "raise SystemExit(1)", None), tmp_path)
    assert blocks("<!-- not run: gpu -->\n```sh\nmake gpu\n```\n```python\npass\n```\n") == [
        Block(2, "sh", "make gpu\n", "gpu"),
        Block(5, "python", "pass\n", None),
    ]
