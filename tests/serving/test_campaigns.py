"""The short forms of `make fuzz` and `make soak` for the server: the same programs, fewer requests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("fastapi", reason="the server needs the extra serve")
TESTS = Path(__file__).parents[1]


def program(name: str) -> ModuleType:
    """tests/<name>.py."""
    spec = importlib.util.spec_from_file_location(f"gptfast_{name}", TESTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_requests_made_up_from_the_document() -> None:
    pytest.importorskip("schemathesis", reason="schemathesis makes up the requests")
    facts = program("fuzz_server").fuzz(300, seed=0)
    assert facts["requests"] >= 300 and facts["answered"] >= 60


def test_clients_that_go_away_leave_nothing_behind() -> None:
    facts = program("soak").soak(seconds=6, rate=50, seed=0)
    assert facts["requests"] >= 200 and all(facts.get(way, 0) for way in ("body", "wait", "reset", "close", "stay", "pipelined"))
