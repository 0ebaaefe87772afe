"""What the long proofs share (`make asan`, `make mutate`): a private copy of the checkout to work in, and the record of a campaign.

tests/campaigns.json: {"version": 1, "campaigns": {name: {"command", "seed", counts ..., "commit", "source", "when"}}}. `source` is
the hash of the files that the campaign was about: where it differs from the checkout's, the record is stale.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gptfast import proof
from gptfast.errors import LoadError

VERSION = 1
ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "tests" / "campaigns.json"
_PARTS = ("csrc", "gptfast", "kernels", "tests", "bench")


def listed() -> list[str]:
    """Every file of the checkout that git tracks or does not ignore, so that what was just written is proven too."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    return [name for name in names if name and (ROOT / name).is_file()]


def copy_checkout(target: Path) -> None:
    """Brings `target` up to date: a file is written only if its contents differ, so that a build there compiles only what changed.
    What the checkout no longer has goes, but for what was built."""
    names = set(listed())
    for path in [path for part in _PARTS for path in (target / part).rglob("*")]:
        if path.is_file() and path.suffix != ".so" and path.name != "_build.json" and str(path.relative_to(target)) not in names:
            path.unlink()
    for name in sorted(names):
        source, copy = ROOT / name, target / name
        if not copy.exists() or copy.read_bytes() != source.read_bytes():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)


def sanitizer_library() -> str | None:
    """What has to be loaded before python: the compiler's (CXX or g++) libasan, and the C++ library, whose exceptions libasan looks
    for when it starts. None where the compiler has no libasan."""
    found = []
    for name in ("libasan.so", "libstdc++.so.6"):
        command = [*shlex.split(os.environ.get("CXX", "g++")), f"-print-file-name={name}"]
        try:
            path = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
        except (OSError, subprocess.CalledProcessError):
            return None
        if not (path.is_absolute() and path.exists()):
            return None
        found.append(str(path.resolve()))
    return " ".join(found)


def sanitizer_environment(log: Path) -> dict[str, str]:
    """For a python that loads an instrumented extension. Reports go to files `log`.<pid>, since pytest keeps what a test prints; a
    process that has one ends with 99. Kernels run in their plain form: masked intrinsics are not instrumented."""
    library = sanitizer_library()
    assert library is not None
    common = f"log_path={log}:exitcode=99:halt_on_error=1"
    # leaks: python frees little at its end; mismatches and duplicates: torch's libraries have them
    address = f"detect_leaks=0:alloc_dealloc_mismatch=0:detect_odr_violation=0:{common}"
    watch = {"ASAN_OPTIONS": address, "UBSAN_OPTIONS": f"print_stacktrace=1:{common}"}
    return {"LD_PRELOAD": library, "GPTFAST_CPU_ISA": "plain", **watch}


def source_hash(names: Iterable[str]) -> str:
    """First 16 hex digits of sha256 over these files of the checkout, names included."""
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(f"{name}\0".encode() + (ROOT / name).read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def read(path: Path = FILE) -> dict[str, Any]:
    """Name -> record. Raises gptfast.LoadError where the file is none of this version."""
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LoadError(f"{path}: not a file of campaigns ({error})") from error
    if not isinstance(data, dict) or data.get("version") != VERSION or not isinstance(data.get("campaigns"), dict):
        raise LoadError(f"{path}: not a file of campaigns of version {VERSION}")
    return dict(data["campaigns"])


def write(name: str, facts: Mapping[str, Any], sources: Iterable[str], path: Path = FILE) -> None:
    """Records a campaign (command, seed, counts, ...) under `name`, in place of an older one, with commit, source hash and day."""
    commit, clean = proof.commit()
    when = time.strftime("%Y-%m-%d", time.gmtime())
    stamp = {"commit": commit if clean else f"{commit}+", "source": source_hash(sources), "when": when}
    records = {**read(path), name: {**facts, **stamp}}
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    text = json.dumps({"version": VERSION, "campaigns": dict(sorted(records.items()))}, indent=1)
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)
