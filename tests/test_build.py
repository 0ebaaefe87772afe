"""What setup.py builds: one object per instruction set without a symbol that another could pick up, and a record of it all."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import gptfast.backend as backend
from gptfast import testing

ROOT = Path(__file__).parent.parent
OBJECTS = ROOT / "build" / f"ninja-{sysconfig.get_python_version()}" / "cpu"
ISAS = ("plain", "avx2", "avx512")
UNITS = {"kernels": "layer_norm_forward", "exact": "sample_rows"}  # kind of kernel unit -> a function that it defines


@pytest.fixture(scope="module")
def objects() -> Path:
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    if not OBJECTS.is_dir():
        testing.unavailable("cpp", f"no objects in {OBJECTS}: the extension was not built in this checkout")
    if shutil.which("nm") is None:
        testing.unavailable("cpp", "nm is not installed")
    return OBJECTS


def symbols(path: Path) -> list[tuple[str, str]]:
    """(type letter, demangled name) of every symbol that the linker sees."""
    listing = subprocess.run(["nm", "--demangle", "--extern-only", path], capture_output=True, text=True, check=True).stdout
    return [(match[1], match[2]) for line in listing.splitlines() if (match := re.match(r"[0-9a-f ]{16} (\w) (.+)", line))]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("isa", ISAS)
def test_a_kernel_unit_defines_nothing_outside_its_namespace(objects: Path, isa: str, unit: str) -> None:
    """A weak symbol compiled for AVX-512 could be the one the linker keeps for everybody: SIGILL on an older CPU."""
    found = symbols(objects / f"{unit}_{isa}.o")
    defined = [name for kind, name in found if kind not in "Uvw"]
    assert any(UNITS[unit] in name for name in defined)
    assert all(name.startswith(f"gptfast::cpu::{isa}::") for name in defined), defined
    assert not [name for kind, name in found if kind in "VWu"], "weak symbols"
    assert not [name for kind, name in found if kind == "U" and re.match(r"(at|c10|torch|std)::", name)]


def test_the_check_for_weak_symbols_sees_one(tmp_path: Path) -> None:
    """The planted mistake: a kernel unit that uses an inline function of the standard library."""
    compiler = testing.cxx()
    if shutil.which("nm") is None:
        testing.unavailable("cpp", "nm is not installed")
    source = tmp_path / "kernels_plain.cpp"
    source.write_text("#include <vector>\nfloat f(int n) { std::vector<float> v(n, 1.0f); v.resize(2 * n); return v[n]; }\n")
    subprocess.run([*compiler, "-std=c++20", "-c", source, "-o", tmp_path / "x.o"], check=True)
    assert [name for kind, name in symbols(tmp_path / "x.o") if kind in "VWu"]


def instructions(path: Path) -> str:
    if shutil.which("objdump") is None:
        testing.unavailable("cpp", "objdump is not installed")
    return subprocess.run(["objdump", "-d", "--no-show-raw-insn", path], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("isa", ISAS)
def test_a_kernel_unit_uses_its_instructions_only(objects: Path, isa: str, unit: str) -> None:
    text = instructions(objects / f"{unit}_{isa}.o")
    assert bool(re.search(r"%ymm", text)) == (isa != "plain")
    assert bool(re.search(r"%zmm", text)) == (isa == "avx512")


@pytest.mark.parametrize("isa", ISAS)
def test_an_exact_unit_rounds_every_step(objects: Path, isa: str) -> None:
    """Products and sums that became one FMA would have other bits on another instruction set."""
    assert not re.search(r"\bvf[n]?m(add|sub)", instructions(objects / f"exact_{isa}.o"))


def test_other_units_use_the_baseline(objects: Path) -> None:
    for path in objects.glob("*.o"):
        if path.stem.rpartition("_")[0] not in UNITS:
            assert not re.search(r"%[yz]mm", instructions(path)), path.name


def test_kernel_headers_see_no_torch_and_no_library() -> None:
    allowed = re.compile(r'#include ("cpu/.*"|"philox.h"|<stdint\.h>|<immintrin\.h>)')
    folder = ROOT / "csrc/cpu"
    shared = ("kernels.h", "exact.h", "paged.h", "sample_row.h", "sample_filters.h", "sample_draw.h")
    for header in [*folder.rglob("*_kernel.h"), *folder.glob("*vec*.h"), *(folder / name for name in shared)]:
        includes = re.findall(r"^#include.*", header.read_text(), re.MULTILINE)
        assert all(allowed.match(line) for line in includes), header.name


def test_the_record_says_what_runs() -> None:
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    import torch

    from gptfast import _C

    record, info = backend.build_record(), _C.build_info()
    assert record["torch"] == torch.__version__
    assert torch.__version__.startswith(info["torch"])
    assert set(info["isas"]) <= set(record["extensions"]["_C"])
    assert info["isas"][0] == "plain" and info["isa"] in info["isas"] and info["openmp"]


def test_another_torch_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "build_record", lambda: {"extensions": {"_C": ["plain"]}, "torch": "2.0.0"})
    assert re.fullmatch(r"built for torch 2\.0\.0, running .*", str(backend._load_extension("_C")))
    monkeypatch.setattr(backend, "build_record", lambda: {"extensions": {}, "skipped": {"_C": "no working C++ compiler (g++)"}})
    assert backend._load_extension("_C") == "not built: no working C++ compiler (g++)"


def build(tmp_path: Path, **environment: str) -> tuple[str, dict[str, object]]:
    """`setup.py build_ext` into a folder of its own; returns what it printed and the record it wrote."""
    (tmp_path / "gptfast").mkdir()
    command = [sys.executable, str(ROOT / "setup.py"), "-q", "build_ext", "--build-lib", str(tmp_path)]
    done = subprocess.run(command, env=os.environ | environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((tmp_path / "gptfast/_build.json").read_text())


def test_without_a_compiler_the_build_succeeds_and_says_so(tmp_path: Path) -> None:
    printed, record = build(tmp_path, CXX="no-such-compiler")
    assert record["extensions"] == {}
    assert record["skipped"]["_C"] == "no working C++ compiler (no-such-compiler)"  # type: ignore[index]
    assert "gptfast._C: not built, no working C++ compiler" in printed


def test_a_compiler_that_lies_is_found_out(tmp_path: Path) -> None:
    fake = tmp_path / "fake-g++"
    fake.write_text("#!/bin/sh\nexit 0\n")
    fake.chmod(0o755)
    _, record = build(tmp_path, CXX=str(fake))
    assert record["extensions"] == {}
