"""The memory that a training step keeps: what comes from it, what is joined again, what outlives it."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch

import gptfast.backend as backend
from gptfast import testing
from gptfast.config import GPT2Config
from gptfast.model import GPT2LMHeadModel
from gptfast.training.loader import Batch
from gptfast.training.optimizer import AdamW, groups
from gptfast.training.step import Step

MIB = 1 << 20


@pytest.fixture
def memory() -> Any:
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    return backend.step_memory(torch.device("cpu"))


def block(mebibytes: int) -> torch.Tensor:
    return torch.empty(mebibytes * MIB, dtype=torch.uint8)


def test_what_is_freed_is_used_again(memory: Any) -> None:
    with memory:
        address = block(3).data_ptr()
        assert memory.bytes_held == 3 * MIB
        assert block(3).data_ptr() == address
        assert memory.bytes_held == 3 * MIB


def test_neighbours_are_joined_and_the_smallest_fit_is_taken(memory: Any) -> None:
    with memory:
        pieces = [block(n) for n in (2, 3, 1, 4, 1)]
        starts = [piece.data_ptr() for piece in pieces]
        pieces[1] = pieces[3] = None  # type: ignore[call-overload]
        kept = block(3)
        assert kept.data_ptr() == starts[1], "the gap of 3 fits better than that of 4"
        half = block(2)
        assert half.data_ptr() == starts[3], "the rest of a gap stays free"
        assert block(2).data_ptr() == starts[3] + 2 * MIB
        del kept, half
        pieces[2] = None  # type: ignore[call-overload]
        assert block(8).data_ptr() == starts[1], "3 + 1 + 4 are one gap again"
        assert memory.bytes_held == 11 * MIB


def test_small_tensors_and_those_outside_come_from_pytorch(memory: Any) -> None:
    outside = block(3)
    with memory:
        small = torch.empty(1000)
    later = block(3)
    assert memory.bytes_held == 0
    del outside, small, later


def test_tensors_outlive_the_memory(memory: Any) -> None:
    with memory:
        kept, row = block(2).fill_(7), block(1)
        row.resize_(5 * MIB)
        array = row.fill_(3).numpy()
    del memory, row
    gc.collect()
    assert int(kept[-1]) == 7 and int(array[-1]) == 3
    clone = kept.clone()
    del kept
    assert int(clone[0]) == 7


def test_values_are_not_shared_between_live_tensors(memory: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    with memory:
        live: dict[int, torch.Tensor] = {}
        for number in range(300):
            size = int(torch.randint(1, 9, (1,), generator=generator)) * MIB // 2 + number
            live[number] = torch.full((size,), number % 251, dtype=torch.uint8)
            if len(live) > 12:
                oldest = list(live)[int(torch.randint(0, len(live), (1,), generator=generator))]
                assert int(live[oldest].min()) == int(live[oldest].max()) == oldest % 251
                del live[oldest]
        for number, tensor in live.items():
            assert int(tensor.min()) == int(tensor.max()) == number % 251


def test_it_holds_for_one_thread_and_for_one_entry(memory: Any) -> None:
    with memory:
        other: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: other.append(block(2)))
        thread.start()
        thread.join()
        assert memory.bytes_held == 0
        with pytest.raises(RuntimeError, match="entered a StepMemory already"):
            memory.__enter__()
    with pytest.raises(ZeroDivisionError), memory:
        raise ZeroDivisionError
    block(2)
    assert memory.bytes_held == 0, "left after an exception too"


PROGRAM = """
import resource
import torch
from gptfast import _C
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
memory = _C.StepMemory()
with memory:
    print(int(torch.ones(1 << 20).sum()), memory.bytes_held)
"""


def test_a_limit_on_address_space_leaves_all_memory_to_pytorch() -> None:
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=os.environ)
    assert done.stdout.split() == [str(1 << 20), "0"], done.stderr


def test_a_second_step_needs_no_new_memory() -> None:
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=5000, n_positions=64, n_embd=128, n_layer=2, n_head=2))
    step = Step(model, AdamW(groups(model.named_parameters(), 0.1), 1e-3), torch.bfloat16)
    ids = torch.randint(0, 5000, (8, 64))
    held = []
    for _ in range(5):
        step([Batch(ids, ids)], 1e-3)
        held.append(step._memory.bytes_held)  # type: ignore[attr-defined]
    assert held[0] > 2 * MIB
    assert held[2] == held[3] == held[4]
    assert not [p.grad for p in model.parameters() if p.grad is not None]
