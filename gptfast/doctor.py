"""`gptfast doctor`: what this installation has, what it lacks, and the one command that adds it. Works without a working torch.

Each finding is a dict {"group", "name", "value", "ok", "fix"}: `ok` False marks what keeps something from running or from running
fast, and `fix` is the command or sentence that helps, or None.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
EXTRAS = {  # extra -> (modules that it brings, what they are for)
    "plot": (("matplotlib",), "pictures of training curves"),
    "data": (("pyarrow",), "Parquet files and dataset folders as input"),
    "triton": (("triton",), "GPU kernels in Triton"),
    "build": (("ninja", "pybind11"), "building the C++ and CUDA extensions"),
    "test": (("pytest", "transformers", "tiktoken", "hypothesis"), "the test suite"),
}
PLATFORM = "Linux x86-64 is what gptfast is run on; elsewhere the pure-Python package installs and nothing else was ever run"


def _finding(group: str, name: str, value: str, ok: bool = True, fix: str | None = None) -> dict[str, Any]:
    return {"group": group, "name": name, "value": value, "ok": ok, "fix": fix}


def version(package: str) -> str | None:
    """The installed distribution's version, or None. Imports nothing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_line(*command: str) -> str | None:
    """The line of a `--version` output that holds a version number, or None where the program does not run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = (done.stdout or done.stderr).strip().splitlines()
    return next((line for line in lines if re.search(r"\d+\.\d+", line)), lines[0] if lines else "")


def build_command() -> str:
    """The one command that builds the extensions here: in place in a checkout, else by reinstalling from the source."""
    if (PACKAGE.parent / "setup.py").exists() and (PACKAGE.parent / "csrc").is_dir():
        return f"cd {shlex.quote(str(PACKAGE.parent))} && python setup.py build_ext --inplace"
    return "pip install --no-build-isolation --no-deps --force-reinstall <folder or archive of gptfast's source>"


def _torch() -> tuple[Any, str | None]:
    """(module, None), or (None, why it cannot be imported)."""
    try:
        return importlib.import_module("torch"), None
    except Exception as error:  # a broken installation raises anything: OSError, AttributeError, RuntimeError
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _versions(torch: Any, reason: str | None) -> Iterator[dict[str, Any]]:
    group = "versions"
    yield _finding(group, "gptfast", f"{version('gptfast-torch') or 'not installed'} in {PACKAGE}")
    yield _finding(group, "python", f"{platform.python_version()} ({sys.executable})")
    if torch is not None:
        yield _finding(group, "torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    else:
        yield _finding(group, "torch", f"cannot be imported ({reason})", False, "pip install 'torch>=2.11'")
    for name in ("numpy", "safetensors", "tokenizers", "typer", "rich"):
        found = version(name)
        yield _finding(group, name, found or "not installed", found is not None, None if found else f"pip install {name}")


def cuda_home() -> Path | None:
    """The CUDA toolkit that a build would use: CUDA_HOME, nvcc on PATH, /usr/local/cuda or the nvidia-cuda-nvcc package."""
    nvcc = shutil.which("nvcc")
    folders = [os.environ.get("CUDA_HOME"), str(Path(nvcc).resolve().parent.parent) if nvcc else None, "/usr/local/cuda"]
    folders += [str(path) for entry in sys.path for path in Path(entry, "nvidia").glob("cu1*")]
    return next((Path(folder) for folder in folders if folder and Path(folder, "bin", "nvcc").exists()), None)


def _tools() -> Iterator[dict[str, Any]]:
    group, compiler = "build tools", shlex.split(os.environ.get("CXX", "g++"))
    found = _first_line(*compiler, "--version")
    fix = None if found else "install g++ >= 11"
    yield _finding(group, "C++ compiler", found or f"{compiler[0]} does not run", found is not None, fix)
    home = cuda_home()
    nvcc = _first_line(str(home / "bin" / "nvcc"), "--version") if home else None
    packages = " ".join(f"nvidia-cuda-{part}" for part in ("nvcc", "crt", "runtime", "nvvm", "cccl"))
    fix = None if nvcc else f"only for CUDA C++ kernels: set CUDA_HOME, or pip install {packages}"
    yield _finding(group, "nvcc", f"{nvcc} in {home}" if nvcc else "not found", nvcc is not None, fix)


def cpu_isa() -> tuple[str, list[str]]:
    """The best instruction set of the C++ kernels that this CPU has (plain, avx2, avx512), and the flags that decide it."""
    path = Path("/proc/cpuinfo")
    line = re.search(r"^flags\s*:\s*(.+)$", path.read_text() if path.exists() else "", re.MULTILINE)
    flags = set(line.group(1).split()) if line else set()
    needs = {
        "avx512": ["avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16", "fma", "f16c"],
        "avx2": ["avx2", "fma", "f16c"],
    }
    best = next((name for name, wanted in needs.items() if flags.issuperset(wanted)), "plain")
    return best, sorted(flag for flag in {*needs["avx512"], *needs["avx2"], "amx_bf16", "amx_int8"} if flag in flags)


def _hardware(torch: Any) -> Iterator[dict[str, Any]]:
    group = "hardware"
    is_home = (platform.system(), platform.machine()) == ("Linux", "x86_64")
    yield _finding(group, "platform", f"{platform.platform()}. {PLATFORM}", is_home)
    best, flags = cpu_isa()
    asked = os.environ.get("GPTFAST_CPU_ISA")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    chosen = f"{asked} (GPTFAST_CPU_ISA)" if asked else best
    yield _finding(group, "CPU", f"{cores} cores, kernels for {chosen}; it has {' '.join(flags) or 'no flag that they use'}")
    if torch is None:
        return
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            size = f"{facts.total_memory / 2**30:.0f} GiB"
            yield _finding(group, f"GPU {index}", f"{facts.name}, sm_{facts.major}{facts.minor}, {size}")
    else:
        why = "no CUDA device" if torch.version.cuda else f"torch {torch.__version__} has no CUDA"
        yield _finding(group, "GPU", f"none ({why})")


def _extensions(torch: Any) -> Iterator[dict[str, Any]]:
    group, path = "extensions", PACKAGE / "_build.json"
    try:
        record = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError):
        record = {}
    loaded: dict[str, str | None] = {}
    if torch is not None:
        loaded = importlib.import_module("gptfast.backend").EXTENSIONS
    for name, what in (("_C", "C++ kernels"), ("_C_cuda", "CUDA kernels")):
        reason = loaded[name] if torch is not None else "torch cannot be imported"
        if reason is None:
            contents = " ".join(record["extensions"][name])
            yield _finding(group, f"gptfast.{name}", f"built for {contents}, torch {record['torch']} ({record['compiler']})")
            if name == "_C":
                library = importlib.import_module("gptfast._C").build_info()["fp32_products"]
                yield _finding(group, "fp32 products", library, library == "oneDNN")
        else:
            text = f"{reason}; every op runs on PyTorch where {what} are missing"
            yield _finding(group, f"gptfast.{name}", text, False, build_command())


def _extras() -> Iterator[dict[str, Any]]:
    for extra, (modules, purpose) in EXTRAS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        have = ", ".join(f"{name} {version(name) or ''}".strip() for name in modules if name not in missing)
        text = f"{purpose}: {have or 'not installed'}" + (f"; missing: {', '.join(missing)}" if missing and have else "")
        target = f"-e '{PACKAGE.parent}[{extra}]'" if (PACKAGE.parent / "setup.py").exists() else f"'gptfast-torch[{extra}]'"
        yield _finding("extras", extra, text, not missing, f"pip install {target}" if missing else None)


def _environment() -> Iterator[dict[str, Any]]:
    from gptfast._environment import VARIABLES

    for name, meaning in VARIABLES.items():
        value = os.environ.get(name)
        yield _finding("environment", name, value if value else f"not set ({meaning})")


def findings() -> list[dict[str, Any]]:
    """Everything that doctor has to say, in the order to show it. Never raises for a broken torch or build."""
    torch, reason = _torch()
    parts = (_versions(torch, reason), _hardware(torch), _tools(), _extensions(torch), _extras(), _environment())
    return [finding for part in parts for finding in part]


def text(found: list[dict[str, Any]]) -> str:
    """The findings as lines under their groups; `!` marks what is missing, `->` the command that helps."""
    lines, group = [], None
    for item in found:
        if item["group"] != group:
            group = item["group"]
            lines.append(f"{group}")
        lines.append(f"  {' ' if item['ok'] else '!'} {item['name']:<16} {item['value']}")
        if item["fix"]:
            lines.append(f"      -> {item['fix']}")
    return "\n".join(lines)
