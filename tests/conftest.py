"""Fixtures that tests share and that are no part of the package: the shim, which executes CUDA kernels on the CPU, and the command
line, run in this process."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from gptfast import testing


def _harness() -> ModuleType:
    path = Path(__file__).parent / "shim/harness.py"
    spec = importlib.util.spec_from_file_location("gptfast_shim_harness", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def shim() -> ModuleType:
    """tests/shim/harness.py. Where it cannot be built the test is skipped, and fails if GPTFAST_REQUIRE names cuda-emulated."""
    harness = _harness()
    testing.requires("cuda-emulated", harness.missing())
    return harness


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """run("score", folder, ...) -> (exit code, stdout, stderr) of the gptfast command."""
    from gptfast import cli

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call
