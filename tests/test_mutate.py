"""tests/mutate.py: which changes it draws, and that two of them are noticed; `make mutate` is the long form."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import gptfast.backend as backend
from gptfast import testing
from gptfast.errors import LoadError
from gptfast.testing import campaigns

ROOT = Path(__file__).parent.parent
KERNEL = "csrc/cpu/layer_norm_kernel.h"
TEXT = """// a < b + c
#include "cpu/isa.h"
#ifdef GPTFAST_ISA
constexpr int kTile = 4;
static_assert(kTile < 8, "x + y");
template <int N> void f() {
  for (int i = 0; i < n; ++i) {
    y[i] = 0.5f * x[i] + min(z[i], 3.0f);  // + 1
  }
  y[0] += x[0];
}
#endif
"""


@pytest.fixture(scope="module")
def mutate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gptfast_mutate", ROOT / "tests/mutate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_changes_are_of_one_place_in_code(mutate: ModuleType) -> None:
    made = mutate.mutants("csrc/cpu/f_kernel.h", TEXT, 0)
    lines = TEXT.splitlines()
    for one in made:
        changed = one.apply(TEXT).splitlines()
        assert [number for number, (a, b) in enumerate(zip(lines, changed, strict=True), 1) if a != b] == [one.line]
        assert 7 <= one.line <= 10 and (lines[one.line - 1].strip(), changed[one.line - 1].strip()) == (one.before, one.after)
    after = {one.after for one in made}
    assert {
        "for (int i = 0; i <= n; ++i) {", "for (int i = 0 + 1; i < n; ++i) {", "y[i] = 0.5f * x[i] + max(z[i], 3.0f);  // + 1",
        "y[i] = 0.5f * x[i];  // + 1", "y[i] = 0.5f * x[i] - min(z[i], 3.0f);  // + 1", "y[0] -= x[0];",
        "y[i] = (1.01f * 0.5f) * x[i] + min(z[i], 3.0f);  // + 1",
    } - after <= {"y[i] = 0.5f * x[i];  // + 1", "y[i] = 0.5f * x[i] - min(z[i], 3.0f);  // + 1"}, "one change a place"


def test_the_seed_draws_the_same_list(mutate: ModuleType) -> None:
    source = (ROOT / KERNEL).read_text()
    first = mutate.mutants(KERNEL, source, 0)
    assert first == mutate.mutants(KERNEL, source, 0) and first != mutate.mutants(KERNEL, source, 1)
    assert len(first) >= 12 and len({one.kind for one in first[:12]}) >= 6
    assert len({one.start for one in first}) == len(first)


@pytest.mark.parametrize("name", ["kernels/layer_norm.py", "csrc/cuda/layer_norm.cuh"])
def test_other_kernels_have_changes_too(mutate: ModuleType, name: str) -> None:
    source = (ROOT / name).read_text()
    made = mutate.mutants(name, source, 0)
    assert len(made) >= 12
    if name.endswith(".py"):
        for one in made[:40]:
            compile(one.apply(source), name, "exec")


def test_two_changes_are_noticed(tmp_path: Path) -> None:
    """The short form of `make mutate`: one instruction set, kinds that are never an equal program, a record of its own."""
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    testing.cxx()
    if shutil.which("ninja") is None and importlib.util.find_spec("ninja") is None:
        testing.unavailable("cpp", "ninja is not installed")
    from gptfast import _C

    record = tmp_path / "campaigns.json"
    command = [sys.executable, "-P", str(ROOT / "tests/mutate.py"), "--file", KERNEL, "--count", "2", "--output", str(record)]
    narrow = ["--kind", "call", "--kind", "statement", "--isa", _C.build_info()["isas"][-1], "--select", "test_shapes and cpp-fp32"]
    done = subprocess.run([*command, *narrow], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    facts = campaigns.read(record)[f"mutate {KERNEL}"]
    assert (facts["killed"], facts["survived"], facts["seed"]) == (2, 0, 0) and len(facts["source"]) == 16
    assert KERNEL in facts["command"] and facts["commit"]


def test_explanations_are_of_lines_that_exist() -> None:
    for known in json.loads((ROOT / "tests/mutants.json").read_text())["mutants"]:
        assert known["before"] in {line.strip() for line in (ROOT / known["file"]).read_text().splitlines()}, known
        assert known["reason"] and known["before"] != known["after"]


def test_a_record_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "campaigns.json"
    assert campaigns.read(path) == {}
    for text in ("{", "[]", '{"version": 2, "campaigns": {}}'):
        path.write_text(text)
        with pytest.raises(LoadError, match="campaigns"):
            campaigns.read(path)
