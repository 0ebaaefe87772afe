"""Every Triton kernel compiles for GPUs that are not here, spills nothing, and takes no more registers than recorded."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
from pathlib import Path

import pytest

from gptfast import _aot, testing
from gptfast.testing import session

# kernel (as in tests/aot.json) -> spilled bytes allowed, at most 64, beside it the benchmark line that earned it
SPILLS: dict[str, int] = {}


@pytest.fixture(autouse=True)
def triton() -> str:
    if importlib.util.find_spec("triton") is None:
        testing.unavailable("triton-aot", "triton is not installed")
    return importlib.metadata.version("triton")


@pytest.mark.parametrize("op", _aot.ops())
def test_compiles_without_spills(op: str, triton: str) -> None:
    results = _aot.compile_op(op)
    kernels = {result["kernel"] for result in results}
    everywhere = {(kernel, arch) for kernel in kernels for arch in _aot.ARCHITECTURES}
    assert kernels and {(result["kernel"], result["arch"]) for result in results} == everywhere
    assert {result["odd"] for result in results} == {False, True}
    recorded = _aot.recorded().get(triton, {})
    for result in results:
        name = _aot.name_of(result)
        assert result["spill"] <= min(64, SPILLS.get(name, 0)), name
        if name in recorded:
            assert result["registers"] <= recorded[name][0], f"{name}: `python -m gptfast._aot {op} --record` accepts it"
            assert result["shared"] <= recorded[name][1], name
        session.record(op, "triton-aot", result["dtype"], result["launch"].split()[1])


def test_a_recorded_kernel_is_still_there(triton: str) -> None:
    recorded = _aot.recorded().get(triton)
    if recorded is None:
        pytest.skip(f"tests/aot.json has nothing for Triton {triton} (`python -m gptfast._aot --record`)")
    assert set(recorded) >= {_aot.name_of(result) for op in _aot.ops() for result in _aot.compile_op(op)}


def test_the_key_follows_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in _aot.KERNELS.glob("*.py"):
        shutil.copy(path, tmp_path / path.name)
    before = _aot.source_key("layer_norm", False)
    monkeypatch.setattr(_aot, "KERNELS", tmp_path)
    assert _aot.source_key("layer_norm", False) == before
    (tmp_path / "_rows.py").write_text("# changed\n" + (tmp_path / "_rows.py").read_text())
    assert _aot.source_key("layer_norm", False) != before


SPILLING = '''
import torch
import triton
import triton.language as tl


@triton.jit
def _spilling_kernel(x, y, WIDTH: tl.constexpr, BROKEN: tl.constexpr):
    offset = tl.arange(0, WIDTH)
    value = tl.load(x + offset).to(tl.float32)
    if BROKEN:
        value = value + undefined
    total = tl.sum(value, 0)
    for _ in range(3):
        total = tl.sum(value * total, 0)
    tl.store(y + offset, value * total)


def launches(dtype):
    if dtype == torch.float32:
        x = torch.empty(32768, device="meta")
        yield "forward", _spilling_kernel[(1,)], (x, x, 32768, BROKEN)
'''


@pytest.mark.parametrize("broken", [False, True], ids=["spills", "does not compile"])
def test_spills_and_errors_are_seen(broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that holds 256 values a thread spills; one with an unknown name does not compile."""
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "spilling.py").write_text(SPILLING.replace("BROKEN)\n", f"{broken})\n"))
    (tmp_path / "sitecustomize.py").write_text(f"import gptfast.kernels\ngptfast.kernels.__path__ = [{str(folder)!r}]\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setattr(_aot, "KERNELS", folder)
    monkeypatch.setattr(_aot, "ROOT", tmp_path)
    if broken:
        with pytest.raises(RuntimeError, match=r"(?s)spilling does not compile ahead of time:.*undefined is not defined"):
            _aot.compile_op("spilling")
    else:
        assert max(result["spill"] for result in _aot.compile_op("spilling")) > 0
