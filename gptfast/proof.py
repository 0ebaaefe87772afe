"""Where each op was last executed on each backend: the committed file behind `gptfast backends --proof`.

bench/results/proof.json, written by the test session (gptfast/testing.py) and by `make gpu`:

    {"version": 1, "records": [{"op": "layer_norm", "backend": "cuda", "where": "cpu shim", "executed": true, "when": "2026-11-24",
                                "commit": "1a2b3c4d5e6f", "source": "0123456789abcdef"}, ...]}

One record for each (op, backend, where). `where` is a device's name, "cpu shim" (CUDA C++ on the CPU, tests/shim), "interpreter"
(Triton on the CPU), or for `executed: false` the architecture it was compiled for ("sm_90a"). `source` is the hash of the kernel's
files: where it differs from the checkout's, the record is stale. A `+` behind the commit: the tree had changes. No torch here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from gptfast._environment import BACKENDS, OPS, check_backend, check_op
from gptfast.errors import LoadError

VERSION = 1
ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "bench" / "results" / "proof.json"
_SOURCES = {
    "eager": ("gptfast/ops/{op}.py",),
    "cpp": ("csrc/cpu/{op}.cpp", "csrc/cpu/{op}_kernel.h"),
    "cuda": ("csrc/cuda/{op}.cu", "csrc/cuda/{op}.cuh"),
    "triton": ("kernels/{op}.py",),
}
_INCLUDE = re.compile(r'^\s*#include "([^"]+)"', re.MULTILINE)


@dataclass(frozen=True)
class Record:
    """One line of the file; the fields are explained in the module's docstring."""

    op: str
    backend: str
    where: str
    executed: bool
    when: str
    commit: str
    source: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What a newer record of the same replaces this one by."""
        return self.op, self.backend, self.where


def sources(op: str, backend: str, root: Path = ROOT) -> list[Path]:
    """The files that make `op` on `backend`, and those they include; empty where the op has no kernel there or where this is an
    installed package without the sources."""
    root = root.resolve()
    waiting = [path for pattern in _SOURCES[backend] if (path := root / pattern.format(op=op)).is_file()]
    found: set[Path] = set(root.glob("kernels/_*.py")) if waiting and backend == "triton" else set()
    while waiting:
        path = waiting.pop()
        found.add(path)
        names = _INCLUDE.findall(path.read_text(encoding="utf-8")) if backend in ("cpp", "cuda") else []
        included = [(folder / name).resolve() for name in names for folder in (path.parent, root / "csrc")]
        waiting += [header for header in included if header.is_file() and header not in found]
    return sorted(found)


def source_hash(op: str, backend: str, root: Path = ROOT) -> str | None:
    """First 16 hex digits of sha256 over sources(), names included; None where there are none."""
    digest, paths = hashlib.sha256(), sources(op, backend, root)
    for path in paths:
        digest.update(f"{path.relative_to(root.resolve()).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16] if paths else None


@cache
def commit(root: Path = ROOT) -> tuple[str, bool]:
    """The checkout's commit (12 hex digits; 'unknown' outside a checkout) and whether the tree, bench/results aside, is clean."""
    if not (root / ".git").exists():
        return "unknown", False
    try:
        names = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
        head = subprocess.run(names, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
        command = ["git", "-C", str(root), "status", "--porcelain", "--", ".", ":!bench/results"]
        status = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown", False
    return head, not status.strip()


def record(op: str, backend: str, where: str, executed: bool = True) -> Record:
    """A record of now: this commit, this source. Raises gptfast.Error for a name that is no op or backend."""
    check_op(op)
    check_backend(backend)
    today = time.strftime("%Y-%m-%d", time.gmtime())
    head, clean = commit()
    return Record(op, backend, where, executed, today, head if clean else f"{head}+", source_hash(op, backend) or "unknown")


def cpu_model() -> str:
    """The CPU's name as the kernel tells it."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", path.read_text() if path.exists() else "", re.MULTILINE)
    return found.group(1) if found else platform.processor() or platform.machine()


def from_tests(executed: Iterable[tuple[str, str]]) -> list[Record]:
    """Records of now for a test session's (op, proof) pairs; a proof is one of GPTFAST_REQUIRE's names, other ops are left out."""
    places: dict[str, tuple[str, str, bool]] = {
        "cpp": ("cpp", cpu_model(), True),
        "triton-interpret": ("triton", "interpreter", True),
        "triton-aot": ("triton", "sm_80, sm_90, sm_100", False),
        "cuda-build": ("cuda", "sm_80, sm_90a, sm_100", False),
        "cuda-emulated": ("cuda", "cpu shim", True),
    }
    pairs = {pair for pair in executed if pair[0] in OPS}
    if any(name in ("cuda", "triton") for _, name in pairs):
        import torch

        places |= {name: (name, torch.cuda.get_device_name(), True) for name in ("cuda", "triton")}
    made = []
    for op, name in sorted(pairs):
        backend, where, ran = places[name]
        made.append(record(op, backend, where, ran))
    return made


def read(path: Path = FILE) -> list[Record]:
    """The records of a proof file, none if there is no file. Raises gptfast.LoadError for another version or malformed content."""
    if not path.exists():
        return []
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("version") != VERSION:
            raise LoadError(f"{path}: version {data.get('version')!r}; this gptfast reads version {VERSION}")
        return [Record(**entry) for entry in data["records"]]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, LoadError):
            raise
        raise LoadError(f"{path}: not a proof file ({type(error).__name__}: {error})") from error


def write(records: Iterable[Record], path: Path = FILE) -> bool:
    """Adds `records` to the file, whole or not at all, and returns whether it changed.

    A record whose source hash the file already has for the same (op, backend, where) is not written again, so a test run on
    unchanged sources leaves the committed file as it is.
    """
    known = {entry.key: entry for entry in read(path)}
    news = [entry for entry in records if entry.key not in known or known[entry.key].source != entry.source]
    if not news:
        return False
    known.update({entry.key: entry for entry in news})
    entries = [json.dumps(dataclasses.asdict(known[key])) for key in sorted(known)]
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(f'{{"version": {VERSION}, "records": [\n ' + ",\n ".join(entries) + "\n]}\n", encoding="utf-8")
    temporary.replace(path)
    return True


def table(records: Iterable[Record], root: Path = ROOT) -> list[dict[str, Any]]:
    """One row an op, {"op": name, backend: text}: where it was executed with date and commit, "compiled, not executed", or "-"."""
    by_cell: dict[tuple[str, str], list[Record]] = {}
    for entry in records:
        by_cell.setdefault((entry.op, entry.backend), []).append(entry)
    rows = []
    for op in OPS:
        row: dict[str, Any] = {"op": op}
        for backend in BACKENDS:
            source, entries = source_hash(op, backend, root), by_cell.get((op, backend), [])
            executed = [entry for entry in entries if entry.executed]
            if executed:
                row[backend] = "; ".join(_describe(entry, source) for entry in executed)
            elif entries:
                targets = ", ".join(entry.where for entry in entries)
                stale = " (stale)" if source and any(entry.source != source for entry in entries) else ""
                row[backend] = f"compiled, not executed: {targets}{stale}"
            else:
                row[backend] = "the definition" if backend == "eager" else "-"
        rows.append(row)
    return rows


def _describe(entry: Record, source: str | None) -> str:
    stale = " (stale)" if source and entry.source != source else ""  # without sources nothing can be said
    return f"{entry.where} {entry.when} {entry.commit}{stale}"
