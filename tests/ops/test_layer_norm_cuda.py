"""layer_norm's CUDA kernels, executed on the CPU under tests/shim, against the eager definition; and mutants that must turn red."""

from __future__ import annotations

import ctypes
import mmap
from ctypes import c_float, c_int64
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import gptfast.backend as backend
from gptfast import ops
from gptfast.ops.layer_norm import eager
from gptfast.testing import assert_close_to_reference, check_op
from gptfast.testing.checks import DTYPES

# rows, columns; forward takes 8 rows a block, backward 4
GPT2 = [(19, 768), (9, 1024), (5, 1280), (5, 1600)]
ODD = [(0, 64), (11, 1), (2, 7), (1, 8), (5, 65), (9, 264), (2, 600), (1, 2048)]
WIDE = [(2, 2056), (3, 2051), (3, 4104)]  # past what a warp holds, a scalar row, past what a block holds in backward


class Kernels:
    """The launchers of one library as leaves in schema order. `offset` misaligns x, dy, y and dx by so many elements."""

    def __init__(self, shim: ModuleType, library: ctypes.CDLL, offset: int = 0) -> None:
        self.shim, self.library, self.offset = shim, library, offset
        library.gptfast_layer_norm.restype = library.gptfast_layer_norm_backward.restype = ctypes.c_char_p
        library.gptfast_layer_norm_backward_workspace.restype = c_int64

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
        def run() -> tuple[Tensor, ...]:
            with self.shim.Buffers(self.library, self.offset) as memory:
                source, scale, shift = (None if t is None else memory.input(t, aligned=t is not x) for t in (x, weight, bias))
                y = memory.output(x.shape, x.dtype, aligned=False)
                mean, rstd = memory.output(x.shape[:1], torch.float32), memory.output(x.shape[:1], torch.float32)
                arrays = (self.shim.array(t) for t in (source, scale, shift))
                sizes = (c_float(eps), c_int64(x.shape[0]), c_int64(x.shape[1]))
                outputs = (self.shim.pointer(t) for t in (y, mean, rstd))
                self.shim.succeeded(self.library.gptfast_layer_norm(*arrays, *sizes, *outputs, None))
            return y, mean, rstd

        return self.shim.in_all_orders(self.library, run)  # type: ignore[no-any-return]

    def backward(self, dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
        array, pointer, (rows, columns) = self.shim.array, self.shim.pointer, x.shape

        def run() -> tuple[Tensor, ...]:
            with self.shim.Buffers(self.library, self.offset) as memory:
                grads, source = memory.input(dy, aligned=False), memory.input(x, aligned=False)
                scale = None if weight is None else memory.input(weight)
                statistics = [memory.input(t) for t in (mean, rstd)]
                dx = memory.output(x.shape, x.dtype, aligned=False)
                dweight, dbias = (memory.output((columns,), torch.float32 if weight is None else weight.dtype) for _ in range(2))
                sizes = c_int64(rows), c_int64(columns)
                floats = self.library.gptfast_layer_norm_backward_workspace(*sizes, self.shim.TYPES[x.dtype])
                workspace = memory.output((floats,), torch.float32)
                error = self.library.gptfast_layer_norm_backward(
                    pointer(grads), array(source), array(scale), *map(pointer, statistics), *sizes, pointer(dx), array(dweight),
                    array(dbias), pointer(workspace), None,
                )  # fmt: skip
                self.shim.succeeded(error)
            return dx, dweight, dbias

        return self.shim.in_all_orders(self.library, run)  # type: ignore[no-any-return]


def inputs(rows: int, columns: int, dtype: torch.dtype, parameters: str, shift: float = 0.0) -> dict[str, Any]:
    """parameters: 'same' (x's dtype), 'fp32', 'weight' (no bias), 'bias' (no weight), 'none'."""
    kind = torch.float32 if parameters == "fp32" else dtype
    weight, bias = torch.randn(columns).to(kind).requires_grad_(), torch.randn(columns).to(kind).requires_grad_()
    return {
        "x": (torch.randn(rows, columns) + shift).to(dtype).requires_grad_(),
        "weight": None if parameters in ("bias", "none") else weight,
        "bias": None if parameters in ("weight", "none") else bias,
    }


def prove(shim: ModuleType, kernels: Kernels, rows: int, columns: int, precision: str, parameters: str, shift: float = 0.0) -> None:
    target = shim.Emulated("cpp", precision, "cuda-emulated", backend.Leaf(kernels.forward, kernels.backward))
    check_op("layer_norm", ops.layer_norm, eager, inputs(rows, columns, DTYPES[precision], parameters, shift), target)


@pytest.fixture(scope="module")
def library(shim: ModuleType) -> ctypes.CDLL:
    return shim.build("layer_norm.cu")  # type: ignore[no-any-return]


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [*GPT2, *ODD, *WIDE], ids=str)
def test_against_eager(shim: ModuleType, library: ctypes.CDLL, rows: int, columns: int, precision: str) -> None:
    prove(shim, Kernels(shim, library), rows, columns, precision, "same")


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("parameters", ["fp32", "weight", "bias", "none"])
def test_parameters_of_every_kind(shim: ModuleType, library: ctypes.CDLL, parameters: str, precision: str) -> None:
    for rows, columns in [(9, 264), (3, 65)]:
        prove(shim, Kernels(shim, library), rows, columns, precision, parameters)


@pytest.mark.parametrize("precision", DTYPES)
def test_rows_that_no_vector_load_may_touch(shim: ModuleType, library: ctypes.CDLL, precision: str) -> None:
    for rows, columns in [(5, 768), (3, 2056)]:
        prove(shim, Kernels(shim, library, offset=1), rows, columns, precision, "same")


@pytest.mark.parametrize("columns", [264, 65])
def test_mean_far_from_zero(shim: ModuleType, library: ctypes.CDLL, columns: int) -> None:
    """sum(x^2) - mean^2 would lose every digit here, and fp32 cannot hold the mean itself to better than 3e-5."""
    prove(shim, Kernels(shim, library), 9, columns, "fp32", "same", shift=1000.0)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("columns", [264, 65, 2056])
def test_statistics(shim: ModuleType, library: ctypes.CDLL, columns: int, precision: str) -> None:
    """mean and rstd are fp32 whatever x is, and right to fp32's precision."""
    x = inputs(9, columns, DTYPES[precision], "none", shift=1.0)["x"].detach()
    _, mean, rstd = Kernels(shim, library).forward(x, None, None, 1e-5)
    for name, got, ref in (("mean", mean, x.double().mean(1)), ("rstd", rstd, (x.double().var(1, correction=0) + 1e-5).rsqrt())):
        assert_close_to_reference(got, ref.float(), ref, name=name)


def test_non_finite_rows_stay_alone(shim: ModuleType, library: ctypes.CDLL) -> None:
    x = inputs(9, 264, torch.float32, "none")["x"].detach()
    x[2, 3], x[5, 7] = torch.nan, torch.inf
    y, _, _ = Kernels(shim, library).forward(x, None, None, 1e-5)
    assert y[[2, 5]].isnan().all() and y[[0, 1, 3, 4, 6, 7, 8]].isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------- mutants

# fp32 alone and rows of at most two spans in registers: these compile in a second
SMALL = (
    ("launch.cuh", "  if (type == Type::bf16) return f(bf16{});\n  if (type == Type::fp16) return f(fp16{});\n", "  (void)type;\n"),
    ("layer_norm.cuh", "kMaxSpans = 8;", "kMaxSpans = 2;"),
    ("layer_norm.cuh", "kMaxBackwardThreads = 512;", "kMaxBackwardThreads = 128;"),
    ("launch.cuh", "kMultiprocessors = 132;", "kMultiprocessors = 1;"),
)
CASES = [(37, 260), (29, 65), (5, 516), (3, 517)]  # with one multiprocessor's grid every block makes several turns
MUTANTS = {
    "forward reads parameters before the barrier": ("layer_norm.cuh", "  __syncthreads();\n\n  const int lane", "  const int lane"),
    "backward reads sums before the barrier": ("layer_norm.cuh", "= sums[0];\n    __syncthreads();", "= sums[0];"),
    "one buffer of sums for all tiles": ("layer_norm.cuh", ", half ^= 1)", ")"),
    "reduce reads before the barrier": ("layer_norm.cuh", "= sum;\n  __syncthreads();", "= sum;"),
    "block_sums leaves its scratch too early": ("reduce.cuh", "* N + i];\n  }\n  __syncthreads();\n}", "* N + i];\n  }\n}"),
    "bias of one column in four ignored": ("layer_norm.cuh", "a.z + b.z;", "a.z;"),
    "variance counts what lies past the row": (
        "layer_norm.cuh", "= span + 1 < SPANS || quad_column<T>(span, i / 4, lane) < columns ? v[span][i] - m : 0.0f", "-= m",
    ),
    "last row unwritten": ("layer_norm.cuh", "+ warp; row < rows;", "+ warp; row + 1 < rows;"),
    "a tile reads the row past the end": ("layer_norm.cuh", "there = first + r < rows;", "there = first + r <= rows;"),
    "dx without the mean of g xhat": ("layer_norm.cuh", "w[e] - mean_g - xhat * mean_gx);", "w[e] - mean_g + 0 * mean_gx);"),
    "dbias of the last row only": ("layer_norm.cuh", "        dbias[e] += g[e];", "        dbias[e] = g[e];"),
    "first partial sum lost": ("layer_norm.cuh", "part = threadIdx.y;", "part = threadIdx.y + 1;"),
    "wide dx without the mean of g": ("layer_norm.cuh", "1.0f) - mean_g - xhat", "1.0f) - 0 * mean_g - xhat"),
}  # fmt: skip


def sparse(*shape: int) -> Tensor:
    """fp32 zeros that take memory only where they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, torch.Size(shape).numel() * 4, flags=flags), dtype=torch.float32).view(*shape)


def far_end(shim: ModuleType, *mutants: tuple[str, str, str]) -> None:
    """The last block of each launch over more than 2^31 numbers; the other blocks do not run, and their rows take no memory."""
    many = ("launch.cuh", "kMultiprocessors = 132;", "kMultiprocessors = 4096;")
    library = shim.build("layer_norm.cu", (*SMALL[:-1], many, *mutants))
    Kernels(shim, library)
    rows, columns = 6 * 3 * 2**18, 512  # a multiple of what either grid takes at once: the last row belongs to the last block
    assert rows * columns > 2**31
    pointer, array, sizes = shim.pointer, shim.array, (c_int64(rows), c_int64(columns))
    x, y, dx, mean, rstd = (sparse(*shape) for shape in ((rows, columns),) * 3 + ((rows,),) * 2)
    dweight, dbias, tail = torch.zeros(columns), torch.zeros(columns), torch.randn(columns)
    workspace = sparse(library.gptfast_layer_norm_backward_workspace(*sizes, 0))
    x[-1] = tail
    with shim.Buffers(library) as memory:
        for tensor in (x, y, dx, mean, rstd, dweight, dbias, workspace):
            memory.allow(tensor, writable=tensor is not x)
        library.shim_set_first_block(ctypes.c_uint64(2**40))
        forward = (array(x), array(None), array(None), c_float(1e-5), *sizes, *map(pointer, (y, mean, rstd)), None)
        shim.succeeded(library.gptfast_layer_norm(*forward))
        backward = (pointer(x), array(x), array(None), *map(pointer, (mean, rstd)), *sizes, pointer(dx))
        shim.succeeded(library.gptfast_layer_norm_backward(*backward, array(dweight), array(dbias), pointer(workspace), None))
    leaf = tail.clone().requires_grad_()
    expected = torch.nn.functional.layer_norm(leaf, (columns,))
    expected.backward(tail)
    torch.testing.assert_close(y[-1], expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx[-1], leaf.grad, rtol=1e-4, atol=1e-5)


def test_offsets_beyond_2_to_the_31(shim: ModuleType) -> None:
    far_end(shim)
    with pytest.raises(AssertionError):
        far_end(shim, ("layer_norm.cuh", "const int64_t offset = (first", "const int offset = (first"))


def test_the_small_build_is_right(shim: ModuleType) -> None:
    kernels = Kernels(shim, shim.build("layer_norm.cu", SMALL))
    for rows, columns in CASES:
        prove(shim, kernels, rows, columns, "fp32", "same")


@pytest.mark.parametrize("mutant", MUTANTS)
def test_wrong_kernel_is_rejected(shim: ModuleType, mutant: str) -> None:
    kernels = Kernels(shim, shim.build("layer_norm.cu", (*SMALL, MUTANTS[mutant])))
    for rows, columns in CASES:
        try:
            prove(shim, kernels, rows, columns, "fp32", "same")
        except AssertionError:
            return
    pytest.fail(f"nothing notices: {mutant}")
