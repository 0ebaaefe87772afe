"""What `make asan` relies on: the sanitizer sees one element written past a row. The long form plants that in a copy of the kernel
and runs the op's tests on it: pytest tests/test_asan.py (minutes, so it is left out of the whole suite)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import gptfast.backend as backend
from gptfast import testing
from gptfast.testing import campaigns

ROOT = Path(__file__).parent.parent
BEFORE, AFTER = "store_or_stream(y + i, normal", "store_or_stream(y + i + 1, normal"
PROGRAM = """
#define GPTFAST_ISA plain
#include "layer_norm_kernel.h"
#include <vector>
int main() {
  const int rows = 2, columns = 7;
  std::vector<float> x(rows * columns, 1.0f), weight(columns, 1.0f), bias(columns), y(rows * columns), mean(rows), rstd(rows);
  gptfast::cpu::LayerNorm args{};
  args.columns = columns, args.x = x.data(), args.weight = weight.data(), args.bias = bias.data();
  args.y = y.data(), args.mean = mean.data(), args.rstd = rstd.data();
  gptfast::cpu::plain::layer_norm_forward(args, 0, rows);
}
"""


@pytest.fixture
def compiler() -> list[str]:
    found = testing.cxx()
    if campaigns.sanitizer_library() is None:
        testing.unavailable("cpp", "the compiler has no libasan.so")
    return found


@pytest.mark.parametrize("planted", [False, True])
def test_a_write_past_a_row_is_seen(tmp_path: Path, compiler: list[str], planted: bool) -> None:
    source = (ROOT / "csrc/cpu/layer_norm_kernel.h").read_text()
    assert source.count(BEFORE) == 1
    (tmp_path / "layer_norm_kernel.h").write_text(source.replace(BEFORE, AFTER) if planted else source)
    (tmp_path / "main.cpp").write_text(PROGRAM)
    flags = ["-std=c++20", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", f"-I{ROOT / 'csrc'}", "-w"]
    subprocess.run([*compiler, *flags, "main.cpp", "-o", "main"], cwd=tmp_path, check=True)
    done = subprocess.run([tmp_path / "main"], capture_output=True, text=True)
    assert (done.returncode != 0) == planted, done.stderr
    assert ("heap-buffer-overflow" in done.stderr) == planted


def test_the_command_reports_it(request: pytest.FixtureRequest, compiler: list[str]) -> None:
    if "test_asan.py" not in " ".join(map(str, request.config.args)):
        pytest.skip("compiles the extension with sanitizers, which takes minutes: pytest tests/test_asan.py")
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    arguments = ["--plant", "tests/ops/test_layer_norm.py", "-k", "shapes and cpp"]
    command = [sys.executable, "-P", str(ROOT / "tests/asan.py"), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    assert "ERROR: AddressSanitizer" in done.stdout and "layer_norm_kernel.h" in done.stdout and "asan: 1 report(s)" in done.stdout
