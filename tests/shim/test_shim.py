"""The shim itself: it computes what CUDA defines, reports what CUDA leaves undefined, and turns red on planted mistakes."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parent
BARRIER = ("probe.cu", "__syncthreads();  // mutant: missing barrier", "")
WAIT = ("probe.cu", "ptx::cp_async_wait<1>();  // mutant: missing wait", "")
REUSE = ("probe.cu", "[other * 4 + j];\n    __syncthreads();", "[other * 4 + j];")


def load(shim: ModuleType, replace: tuple[tuple[str, str, str], ...] = ()) -> ctypes.CDLL:
    library: ctypes.CDLL = shim.build("probe.cu", replace, FOLDER)
    for name in ("reverse_block", "pipeline", "product", "matrices", "collectives", "numbers", "mistake", "block"):
        getattr(library, f"probe_{name}").restype = ctypes.c_char_p
    return library


@pytest.fixture(scope="module")
def probe(shim: ModuleType) -> ctypes.CDLL:
    return load(shim)


def run(function: Callable[..., bytes | None], *arguments: object) -> str | None:
    error = function(*(ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments))
    return None if error is None else error.decode()


def reverse_block(library: ctypes.CDLL) -> bool:
    x, y = torch.randn(3, 96), torch.full((3, 96), torch.nan)
    return run(library.probe_reverse_block, x, y, 3, 96) is None and torch.equal(y, x.flip(1))


def pipeline(library: ctypes.CDLL) -> bool:
    x, y = torch.randn(5, 64, 4), torch.full((64, 4), torch.nan)
    expected = x.clone()
    expected[-1, :, 2:] = 0  # only half of the last tile is read, the rest arrives as zeros
    error = run(library.probe_pipeline, x, y, 5)
    return error is None and torch.allclose(y, expected.sum(0).flip(0), rtol=1e-5, atol=1e-6)


def test_barriers_and_asynchronous_copies(shim: ModuleType, probe: ctypes.CDLL) -> None:
    for order in shim.orders(probe):
        assert reverse_block(probe), order
        assert pipeline(probe), order


@pytest.mark.parametrize(
    ("mutant", "case"),
    [(BARRIER, reverse_block), (WAIT, pipeline), (REUSE, pipeline)],
    ids=["missing barrier", "missing wait", "missing barrier before reuse"],
)
def test_planted_mistake_turns_red(shim: ModuleType, mutant: tuple[str, str, str], case: Callable[[ctypes.CDLL], bool]) -> None:
    library = load(shim, (mutant,))
    assert not all(case(library) for _ in shim.orders(library))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_tensor_core_product(shim: ModuleType, probe: ctypes.CDLL, dtype: torch.dtype) -> None:
    a, b = torch.randint(-8, 9, (16, 16)).to(dtype), torch.randint(-8, 9, (16, 8)).to(dtype)  # integers: every sum is exact
    for order in shim.orders(probe):
        d = torch.full((16, 8), torch.nan)
        assert run(probe.probe_product, a, b, d, int(dtype == torch.bfloat16)) is None
        assert torch.equal(d, a.float() @ b.float()), order


def test_matrix_loads(shim: ModuleType, probe: ctypes.CDLL) -> None:
    """Lane l, register m: row l/4 of matrix m, columns 2 (l % 4) and the next (PTX ISA, ldmatrix); of its transpose with .trans."""
    words = torch.arange(256, dtype=torch.int16).view(4, 8, 8)
    for order in shim.orders(probe):
        got = torch.full((4, 32, 4), -1, dtype=torch.int32)
        assert run(probe.probe_matrices, words, got) is None
        for form, count in enumerate((4, 4, 2, 2)):
            source = words[:count].transpose(1, 2) if form % 2 else words[:count]
            pairs = source.reshape(count, 32, 2).int()
            expected = (pairs[..., 0] | pairs[..., 1] << 16).T
            assert torch.equal(got[form, :, :count], expected), (order, form)


def test_warp_collectives(shim: ModuleType, probe: ctypes.CDLL) -> None:
    lane = torch.arange(32)
    rows = [
        torch.full((32,), 15), torch.where(lane < 2, lane, lane - 2), torch.where(lane % 16 > 13, lane, lane + 2), lane ^ 9,
        torch.full((32,), sum(1 << i for i in range(0, 32, 3))), torch.full((32,), 2), torch.where(lane < 16, lane ^ 1, lane ^ 2),
    ]  # fmt: skip
    for order in shim.orders(probe):
        got = torch.full((2, 32, 8), -1, dtype=torch.int32)
        assert run(probe.probe_collectives, got) is None
        for warp in range(2):
            expected = torch.stack([*rows, lane + 32 * warp]).to(torch.int32).T
            assert torch.equal(got[warp], expected), (order, warp)


def test_number_conversions(probe: ctypes.CDLL) -> None:
    """The host forms of cvt round as PyTorch does: random bits, ties, subnormals, infinities."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 60_000, dtype=np.uint32)
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite = halves[halves.isfinite()].float()
    edges = torch.tensor([65504.0, 65519.99, 65520.0, 2.0**-25, 2.0**-24 * 1.5, -(2.0**-26)])
    ties = torch.cat([(finite[:-1] + finite[1:]) / 2, edges])
    values = torch.cat([torch.from_numpy(bits.view(np.float32)), finite, ties, torch.tensor([torch.inf, -torch.inf])])
    values = values[: len(values) // 2 * 2].contiguous()
    bf16, fp16 = torch.zeros(len(values), dtype=torch.bfloat16), torch.zeros(len(values), dtype=torch.float16)
    widened = torch.zeros(65536)
    assert run(probe.probe_numbers, values, bf16, fp16, widened, len(values)) is None
    for got, expected in ((bf16, values.bfloat16()), (fp16, values.half()), (widened, halves.float())):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (0, "access of 16 bytes at .* is not aligned"),
        (1, "misaligned access to .*probe.cu"),
        (2, "index 64 outside its array at .*probe.cu"),
        (3, "deadlock: thread 40 waits at __syncwarp for lanes 0xffffffff, which never come"),
        (4, "which is not in its mask 0xff"),
        (5, "a write past the end of dynamic shared memory"),
    ],
)
def test_reports_what_cuda_leaves_undefined(probe: ctypes.CDLL, which: int, message: str) -> None:
    probe.shim_set_order(0, ctypes.c_uint64(0))
    error = run(probe.probe_mistake, which, torch.zeros(256))
    assert error is not None and re.search(message, error), error


@pytest.mark.parametrize(("which", "message"), [(8, "a read of 4 bytes"), (9, "a write of 4 bytes"), (10, "a read of 16 bytes")])
def test_reports_accesses_outside_the_buffers(shim: ModuleType, probe: ctypes.CDLL, which: int, message: str) -> None:
    out = torch.zeros(128)
    assert run(probe.probe_mistake, which, out) is None
    with shim.Buffers(probe) as memory:
        memory.allow(out[:64], writable=True)
        error = run(probe.probe_mistake, which, out)
        assert error is not None and re.search(f"{message} at .* is outside every buffer", error), error
        memory.allow(out[64:], writable=False)
        error = run(probe.probe_mistake, which, out)
        assert (error is None) == (which != 9), error


def test_shared_memory_starts_as_nan_and_races_show(shim: ModuleType, probe: ctypes.CDLL) -> None:
    out = torch.zeros(64)
    assert run(probe.probe_mistake, 6, out) is None and out.isnan().all()
    results = []
    for _ in shim.orders(probe):
        assert run(probe.probe_mistake, 7, out) is None
        results.append(out.isnan().sum().item())
    assert len(set(results)) > 1, results


def test_refuses_launches_that_a_gpu_refuses(probe: ctypes.CDLL) -> None:
    out = torch.zeros(1)
    assert run(probe.probe_block, 1056, 0, out) == "invalid block: 1 to 1024 threads, z at most 64"
    assert run(probe.probe_block, 0, 0, out) == "invalid block: 1 to 1024 threads, z at most 64"
    assert run(probe.probe_block, 32, 49153, out) == "dynamic shared memory beyond 48 KiB needs cudaFuncSetAttribute"
    assert run(probe.probe_block, 32, 49152, out) is None
