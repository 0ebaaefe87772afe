"""bench/tasks/dialogues.py: what the test asks for does not occur in training, and every answer can be read."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def generated() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_dialogues", Path(__file__).parents[2] / "bench/tasks/dialogues.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_pair_of_the_test_occurs_in_training(generated: ModuleType) -> None:
    pairs: list[set[tuple[str, ...]]] = []
    for test in (False, True):
        found = set()
        for messages in generated.dialogues(600, 1, test):
            text = "\n".join(message["content"] for message in messages)
            facts = dict(re.findall(r"my (\w+) is (\w+)", text))
            (asked,) = re.findall(r"which colour has my (\w+)\?", text)
            assert messages[-1] == {"role": "assistant", "content": f"it is {facts[asked]}"} and len(facts) == 2
            found |= set(facts.items())
        pairs.append(found)
    assert not pairs[0] & pairs[1] and min(map(len, pairs)) >= 20
    assert {colour for _, colour in pairs[1]} <= {colour for _, colour in pairs[0]}, "each colour is known from training"
