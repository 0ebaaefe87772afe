"""The C++ op suite under AddressSanitizer and UndefinedBehaviorSanitizer: `make asan`, or

    python -P tests/asan.py [pytest arguments]          default: tests/ops without Triton and CUDA
    python -P tests/asan.py --plant [arguments]         with a planted write past a row: must end with a report

The checkout is copied to build/asan/ and built in place there, so nothing that was built is touched, and a second run compiles only
what changed. Python and torch are not instrumented: what is watched is gptfast's own code, and every allocation that it gets. The
compiler does not instrument masked intrinsics, so the kernels run in their plain form but for the tests that name an instruction
set: those watch whole registers, and the plain form watches every element of a tail. Ends with 1 on a report, else with pytest's
status; 3 where nothing was proven. The whole default run is recorded in tests/campaigns.json.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from gptfast.testing.campaigns import copy_checkout, sanitizer_environment, sanitizer_library, write

ROOT = Path(__file__).resolve().parent.parent
COPY = ROOT / "build" / "asan"
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
# -O1: the stack of a report stays readable, and a loop that -O3 would have turned into wide loads is watched element by element
CXXFLAGS = [*SANITIZE, "-O1", "-g1", "-fno-omit-frame-pointer"]
DEFAULT = ["tests/ops", "-k", "not triton and not cuda"]
SECONDS = "3 to 10 minutes to build the first time, about 10 for tests/ops; ARGS=tests/ops/test_layer_norm.py is a part of it"
# store_or_stream(y + i, ...) of the forward pass: the last store of the last row ends one element past the tensor
PLANT = ("csrc/cpu/layer_norm_kernel.h", "store_or_stream(y + i, normal", "store_or_stream(y + i + 1, normal")


def build() -> None:
    """The extension, instrumented, in the copy."""
    flags = {"CXXFLAGS": shlex.join(CXXFLAGS), "LDFLAGS": shlex.join(SANITIZE), "BUILD_EXTENSIONS": "_C", "PYTHONPATH": str(COPY)}
    command = [sys.executable, "-P", "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=COPY, env={**os.environ, **flags}, check=True)


def record(summary: str, reports: int) -> None:
    """Writes the counts of pytest's last line and the number of reports to tests/campaigns.json."""
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", summary)}
    sources = [path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/cpu/**/*.*")]
    write("asan", {"command": "python -P tests/asan.py", **counts, "reports": reports}, sources)


def run(arguments: list[str]) -> int:
    """pytest in the copy under the sanitizers; prints the reports. Undefined behaviour is reported on stderr and not in the file,
    so pytest only captures what Python prints."""
    log = COPY / "report"
    for old in COPY.glob("report.*"):
        old.unlink()
    environment = {**os.environ, "GPTFAST_REQUIRE": "cpp", "PYTHONPATH": str(COPY), **sanitizer_environment(log)}
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--capture=sys", *arguments]
    last, undefined = "", 0
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    with subprocess.Popen(command, cwd=COPY, env=environment, **pipes) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            undefined += ": runtime error: " in line
            last = line.strip() or last
    status = process.returncode
    reports = sorted(COPY.glob("report.*"))
    count = len(reports) + undefined
    if arguments == DEFAULT:
        record(last, count)
    for report in reports:
        print(f"\n{report.name}\n{report.read_text(errors='replace')[:6000]}")
    if count:
        print(f"asan: {count} report(s)")
        return 1
    print("asan: no report" if status == 0 else f"asan: no report, but pytest ended with {status}")
    return 3 if status == 5 else abs(status)


def main(arguments: list[str]) -> int:
    planted = "--plant" in arguments
    arguments = [argument for argument in arguments if argument != "--plant"] or DEFAULT
    print(f"asan: {SECONDS}", flush=True)
    if sanitizer_library() is None:
        print("asan: the compiler has no libasan.so", file=sys.stderr)
        return 3
    copy_checkout(COPY)
    if planted:
        name, before, after = PLANT
        text = (ROOT / name).read_text()
        assert text.count(before) == 1, f"{name} has changed: {before!r} is not there"
        (COPY / name).write_text(text.replace(before, after))
    build()
    status = run(arguments)
    if planted:  # what stays is an extension of the checkout's sources
        copy_checkout(COPY)
        build()
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
