"""Compiles the Triton kernels ahead of time for GPUs that are not here: `python -m gptfast._aot [--full] [--record] [OP ...]`.

A kernel file lists its launches: `launches(dtype)` yields (label, function, arguments) with tensors on the meta device. Calling the
function runs its launcher; the launch itself is intercepted, so what is compiled is what the launcher would start, with the block
sizes and warps it chose. Per launch: PTX by triton.compile for a GPUTarget, then `ptxas -v` for registers and spilled bytes.

Triton reads TRITON_INTERPRET when a kernel is defined, and a test session interprets: everything here happens in child processes.
Results are kept in build/aot/ under a hash of the kernels' sources, the Triton version and this file. tests/aot.json holds the
registers and shared memory of each Triton version (`--record` writes it); more registers than recorded is a failure of the test.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels"
RECORD = ROOT / "tests/aot.json"
ARCHITECTURES = (80, 90, 100)
DTYPES = ("bf16", "fp16", "fp32")


def ops() -> list[str]:
    """The ops that have Triton kernels."""
    return sorted(path.stem for path in KERNELS.glob("*.py") if not path.stem.startswith("_"))


def jobs(full: bool) -> list[tuple[int, str, bool, bool]]:
    """(architecture, dtype, odd pointers, first launch of each kernel only). Short: each kernel once per architecture, all of sm_90
    with divisible pointers, and each kernel once with odd ones; full: everything with both."""
    if full:
        return [(arch, dtype, odd, False) for arch in ARCHITECTURES for dtype in DTYPES for odd in (False, True)]
    once = [(arch, "bf16", False, True) for arch in ARCHITECTURES if arch != 90]
    return [*once, (90, "bf16", True, True), *[(90, dtype, False, False) for dtype in DTYPES]]


def source_key(op: str, full: bool) -> str:
    """Changes with everything a result depends on: the op's file, the helpers, Triton, this file."""
    digest = hashlib.sha256(f"{importlib.metadata.version('triton')} {full}".encode())
    for path in (KERNELS / f"{op}.py", *sorted(KERNELS.glob("_*.py")), Path(__file__)):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def compile_op(op: str, full: bool = False) -> list[dict[str, Any]]:
    """Compiles the launches of one op, in child processes, or returns what an earlier call found for the same sources.

    Each result: {"kernel", "launch", "arch", "dtype", "odd", "registers", "spill" (bytes), "shared" (bytes)}. A kernel that does
    not compile raises RuntimeError with the compiler's last lines.
    """
    cache = ROOT / "build/aot" / f"{op}-{source_key(op, full)}.json"
    if cache.exists():
        return list(json.loads(cache.read_text()))
    workers = min(4, os.cpu_count() or 1)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "gptfast._aot", "--child", op, *(["--full"] if full else [])]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tempfile.gettempdir()}
    children = [subprocess.Popen([*command, "--share", f"{i}/{workers}"], env=environment, **pipes) for i in range(workers)]
    results, failures = [], []
    for child in children:
        out, err = child.communicate()
        if child.returncode:
            failures.append("\n".join(err.splitlines()[-8:]))
        else:
            results += json.loads(out.splitlines()[-1])
    if failures:
        raise RuntimeError(f"{op} does not compile ahead of time:\n" + "\n".join(failures))
    cache.parent.mkdir(parents=True, exist_ok=True)
    temporary = cache.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(results))
    temporary.replace(cache)
    return results


def name_of(result: dict[str, Any]) -> str:
    """The result's line in tests/aot.json."""
    return f"{result['launch']} {result['kernel']} {result['dtype']} sm_{result['arch']}{' odd' if result['odd'] else ''}"


def recorded() -> dict[str, dict[str, list[int]]]:
    """tests/aot.json: Triton version -> name -> [registers, shared bytes]."""
    return dict(json.loads(RECORD.read_text())["triton"]) if RECORD.exists() else {}


# ------------------------------------------------------------------------------------------------------------- in the child process


def _intercept() -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """From now on a launch is noted (kernel, arguments, keywords) instead of made."""
    from triton.runtime.jit import JITFunction

    noted: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        noted.append((self, arguments, keywords))

    JITFunction.run = run
    return noted


def _source(kernel: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], odd: bool) -> tuple[Any, dict[str, Any]]:
    """What Triton would compile for this launch, and the options it would use (num_warps and the like)."""
    import torch
    from triton.compiler import ASTSource

    pointers = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.int32: "*i32",
                torch.int8: "*i8", torch.uint8: "*u8", torch.bool: "*i1"}  # fmt: skip
    given = dict(zip(kernel.arg_names, arguments, strict=False)) | {k: v for k, v in keywords.items() if k in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = given.get(parameter.name, parameter.default)
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = pointers[value.dtype]
        else:
            signature[parameter.name] = {bool: "i1", int: "i32", float: "fp32"}[type(value)]
        if not odd and (isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0 and not parameter.is_constexpr)):
            attributes[(index,)] = [["tt.divisibility", 16]]
    options = {k: v for k, v in keywords.items() if k not in kernel.arg_names}
    return ASTSource(kernel, signature, constants, attributes), options


def _resources(ptx: str, arch: int) -> tuple[int, int]:
    """Registers and spilled bytes (stores and loads) of the one kernel in `ptx`."""
    from triton import knobs

    tool = knobs.nvidia.ptxas_blackwell if arch >= 100 and hasattr(knobs.nvidia, "ptxas_blackwell") else knobs.nvidia.ptxas
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target is not None
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [tool.path, "-v", f"--gpu-name={target[1]}", file.name, "-o", os.devnull]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", text)
    registers = re.findall(r"Used (\d+) registers", text)
    return max(map(int, registers)), sum(map(int, spills))


def _launches(op: str, dtype: str, once: bool) -> Iterator[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    import torch

    module = importlib.import_module(f"gptfast.kernels.{op}")
    precision = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    noted, seen = _intercept(), set()
    for label, function, arguments in module.launches(precision):
        noted.clear()
        function(*arguments)
        for kernel, values, keywords in noted:
            name = kernel.fn.__name__
            if not (once and name in seen):
                seen.add(name)
                yield label, kernel, values, keywords


def _compile_share(op: str, full: bool, share: str) -> list[dict[str, Any]]:
    import triton
    from triton.backends.compiler import GPUTarget

    index, workers = map(int, share.split("/"))
    results, count, known = [], 0, set()
    for arch, dtype, odd, once in jobs(full):
        for label, kernel, values, keywords in _launches(op, dtype, once):
            source, options = _source(kernel, values, keywords, odd)
            identity = (source.hash(), json.dumps(options, sort_keys=True), arch)
            if identity in known:  # the same kernel with the same constants under another label
                continue
            known.add(identity)
            count += 1
            if count % workers != index:
                continue
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
            registers, spill = _resources(compiled.asm["ptx"], arch)
            results.append({
                "kernel": kernel.fn.__name__, "launch": f"{op} {label}", "arch": arch, "dtype": dtype, "odd": odd,
                "registers": registers, "spill": spill, "shared": compiled.metadata.shared,
            })  # fmt: skip
    return results


def main() -> int:
    """Command line of this module; prints one line a kernel, returns 1 if one spills."""
    parser = argparse.ArgumentParser(description="compile the Triton kernels ahead of time; needs no GPU")
    parser.add_argument("ops", nargs="*", help="ops to compile (default: all that have Triton kernels)")
    parser.add_argument("--full", action="store_true", help="every architecture, dtype and pointer alignment")
    parser.add_argument("--record", action="store_true", help="write registers and shared memory to tests/aot.json")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--share", default="0/1", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(_compile_share(options.ops[0], options.full, options.share)))
        return 0
    spilled, found = 0, {}
    for op in options.ops or ops():
        for result in sorted(compile_op(op, options.full), key=name_of):
            spilled += result["spill"] > 0
            found[name_of(result)] = [result["registers"], result["shared"]]
            print(f"{name_of(result)}: {result['registers']} registers, {result['spill']} bytes spilled, {result['shared']} shared")
    if options.record:
        version = importlib.metadata.version("triton")
        versions = recorded() | {version: dict(sorted((recorded().get(version, {}) | found).items()))}
        RECORD.write_text(json.dumps({"version": 1, "triton": versions}, indent=1) + "\n")
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
