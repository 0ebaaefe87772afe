"""gptfast._C_cuda as it was built: architectures, registrations, what it links, and that warnings and spills would have stopped it.

Nothing here needs a GPU, and nothing here runs a kernel.
"""

from __future__ import annotations

import re
import shlex
import struct
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import gptfast
import gptfast.backend as backend
from gptfast import ops, testing

ROOT = Path(__file__).parent.parent
ARCHITECTURES = {"sm_80", "sm_90a", "sm_100"}
OPS = sorted(path.stem for path in (ROOT / "csrc/cuda").glob("*.cu"))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MAY_INCLUDE = r"torch/library\.h|ATen/core/Tensor\.h|ATen/ops/\w+\.h|c10/core/(DeviceGuard|impl/VirtualGuardImpl)\.h|Python\.h|c\w+"


@pytest.fixture(scope="module")
def extension() -> Path:
    """The built library. Skipped with the reason where there is none, a failure where GPTFAST_REQUIRE names cuda-build."""
    testing.requires("cuda-build", backend.EXTENSIONS["_C_cuda"])
    missing = ARCHITECTURES - set(backend.build_record()["extensions"]["_C_cuda"])
    testing.requires("cuda-build", f"built without {', '.join(sorted(missing))} (TORCH_CUDA_ARCH_LIST)" if missing else None)
    return Path(gptfast.__file__).parent / f"_C_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"


@pytest.fixture(scope="module")
def compile_command(extension: Path) -> list[str]:
    """nvcc and the flags that layer_norm.cu was compiled with, for one architecture: the others would say the same, later."""
    ninja = ROOT / "build" / f"ninja-{sysconfig.get_python_version()}" / "build.ninja"
    testing.requires("cuda-build", None if ninja.exists() else f"{ninja} is not there: not built in this checkout")
    edge = re.search(r"^build \S*/layer_norm\.cu\.o: nvcc .*\n((?:  .*\n)+)", ninja.read_text(), re.MULTILINE)
    assert edge is not None
    values = dict(line.strip().split(" = ", 1) for line in edge[1].splitlines())
    flags = [flag for flag in shlex.split(values["flags"]) if not flag.startswith("-gencode")]
    return [values["compiler"], *flags, "-gencode=arch=compute_80,code=sm_80"]


def compile_source(command: list[str], source: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    arguments = [*command, f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", str(folder / "out.o")]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300)


def embedded(library: bytes) -> set[tuple[str, int]]:
    """('ptx' | 'elf', architecture number) of every device image in a library, by the fat binary's container format."""
    found, start = set(), 0
    magic = struct.pack("<I", 0xBA55ED50)
    while (start := library.find(magic, start)) >= 0:
        _, _, header, size = struct.unpack_from("<IHHQ", library, start)
        at = start + header
        while at < start + header + size:
            kind, _, entry, payload = struct.unpack_from("<HHIQ", library, at)
            found.add(({1: "ptx", 2: "elf"}[kind], struct.unpack_from("<I", library, at + 28)[0]))
            at += entry + payload
        start += header + size
    return found


def test_every_architecture_is_in_the_library(extension: Path) -> None:
    images = embedded(extension.read_bytes())
    assert {("elf", 80), ("elf", 90), ("elf", 100), ("ptx", 80)} <= images


@pytest.mark.parametrize("op", OPS)
def test_kernels_are_registered(extension: Path, op: str) -> None:
    for name in (op, f"{op}_backward"):
        if hasattr(torch.ops.gptfast, name):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"gptfast::{name}", "CUDA"), name
    assert backend.supports(op, "cuda") is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_on_fake_cuda_tensors(extension: Path, dtype: torch.dtype) -> None:
    """The front door chooses cuda for CUDA tensors; fake kernels give shapes, dtypes and devices of forward and backward.

    Without grad: PyTorch's autograd engine itself needs a CUDA build for CUDA tensors.
    """
    with FakeTensorMode():
        x = torch.empty(2, 5, 768, dtype=dtype, device="cuda")
        weight, bias = (torch.empty(768, device="cuda") for _ in range(2))
        assert backend.choose("layer_norm", x, weight, bias) == "cuda"
        with backend.use(layer_norm="cuda"):
            y = ops.layer_norm(x, weight, bias)
        assert (y.shape, y.dtype, y.device.type) == (x.shape, dtype, "cuda")
        rows, statistics = x.view(10, 768), torch.empty(10, device="cuda")
        grads = backend.impl("layer_norm", "cuda").backward(rows, rows, weight, statistics, statistics)
        for grad, leaf in zip(grads, (rows, weight, bias), strict=True):
            assert (grad.shape, grad.dtype, grad.device) == (leaf.shape, leaf.dtype, leaf.device)


def test_carries_its_runtime_and_shows_nothing_of_it(extension: Path) -> None:
    """The CUDA runtime is linked statically and privately: the one that a CUDA build of torch loads stays a stranger."""
    dynamic = subprocess.run(["readelf", "-d", extension], capture_output=True, text=True, check=True).stdout
    assert "NEEDED" in dynamic and "cudart" not in dynamic
    symbols = subprocess.run(["nm", "-D", "--defined-only", extension], capture_output=True, text=True, check=True).stdout
    assert "PyInit__C_cuda" in symbols and not re.search(r"\bcuda[A-Z]|gptfast_", symbols)


def test_headers_stay_apart() -> None:
    """Kernels and launchers see no torch header, bindings none of CUDA's: that is what lets both compile anywhere."""
    for path in sorted((ROOT / "csrc/cuda").iterdir()):
        included = re.findall(r"#include <([^>]+)>", path.read_text())
        if path.suffix == ".cpp":
            assert all(re.fullmatch(MAY_INCLUDE, name) for name in included), included
        else:
            assert not [name for name in included if re.match("torch|ATen|c10", name)], path


PLANTED = {
    "a spill": (
        "__global__ void __launch_bounds__(1024, 2) f(float* p) {\n  float v[64];\n"
        "#pragma unroll\n  for (int i = 0; i < 64; ++i) v[i] = p[i * 1024 + threadIdx.x];\n  __syncthreads();\n"
        "#pragma unroll\n  for (int i = 0; i < 64; ++i) p[i * 1024 + threadIdx.x] = v[i] * v[63 - i] + v[(i * 7) % 64];\n}\n",
        "spill",
    ),
    "a warning": ("__global__ void f(float* p) {\n  int unused;\n  *p = 1.0f;\n}\n", "unused"),
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_the_build_stops_at(compile_command: list[str], tmp_path: Path, mistake: str) -> None:
    text, complaint = PLANTED[mistake]
    source = tmp_path / "planted.cu"
    source.write_text(text)
    done = compile_source(compile_command, source, tmp_path)
    assert done.returncode != 0 and complaint in done.stdout + done.stderr, done.stdout + done.stderr


def test_every_instruction_of_ptx_assembles(compile_command: list[str], tmp_path: Path) -> None:
    """The shim executes the host forms; here nvcc and ptxas accept the instructions they stand for."""
    done = compile_source(compile_command, ROOT / "tests/shim/probe.cu", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
