"""What is built, from which sources, with which flags.

Two extensions: gptfast._C (C++, one object per instruction set for every *_kernel.h) and gptfast._C_cuda (CUDA C++, needs only
nvcc, not a CUDA build of torch and not a GPU). Whatever cannot be built here is left out with its reason: the package then runs on
PyTorch alone. `python setup.py build_ext --inplace` builds in a checkout; without torch (pip's build isolation) a pure-Python wheel
results.
Read from the environment: CXX, CXXFLAGS, LDFLAGS, MAX_JOBS, CUDA_HOME, TORCH_CUDA_ARCH_LIST, BUILD_EXTENSIONS (which of the
two, separated by commas; default: both).
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CXX = shlex.split(os.environ.get("CXX", "g++"))
ISA_FLAGS = {
    "plain": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [f"-mavx512{x}" for x in ("f", "bw", "dq", "vl", "vnni", "bf16")] + ["-mfma", "-mf16c", "-mprefer-vector-width=512"],
}
ISA_FLAGS["avx512"] += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # g++ 12 finds both in its own intrinsics headers
EXACT_FLAGS = ["-ffp-contract=off"]  # exact_<isa>.cpp: results whose bits are prescribed
ARCHITECTURES = "8.0+PTX 9.0a 10.0"  # the PTX is for GPUs that none of the three names


def probe_compiler() -> str | None:
    """None if CXX compiles a five-line file that loads, else the reason."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "probe.cpp"), Path(folder, "probe.so")
        body = 'extern "C" int probe(int n) {\n  std::vector<int> v(n, 1);\n  return (int)v.size();\n}\n'
        source.write_text("#include <vector>\n" + body)
        try:
            subprocess.run([*CXX, "-std=c++20", "-shared", "-fPIC", source, "-o", library], check=True, capture_output=True)
            return None if ctypes.CDLL(str(library)).probe(3) == 3 else f"{CXX[0]} makes code that does not run"
        except (OSError, subprocess.CalledProcessError):
            return f"no working C++ compiler ({CXX[0]})"


def find_cuda() -> Path | None:
    """The CUDA toolkit: CUDA_HOME, nvcc's own place on PATH, or the nvidia-cuda-nvcc package in site-packages."""
    candidates = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    if nvcc:
        candidates.insert(1, str(Path(nvcc).resolve().parent.parent))
    candidates += [str(p) for p in Path(sysconfig.get_paths()["purelib"], "nvidia").glob("cu1*")]
    for folder in filter(None, candidates):
        # an nvcc on PATH may be a wrapper far from its toolkit: only a folder with the runtime library counts
        if Path(folder, "bin", "nvcc").exists() and cudart_folder(Path(folder)):
            return Path(folder)
    return None


def cudart_folder(cuda: Path) -> Path | None:
    places = (cuda / "lib64", cuda / "lib", cuda / "targets/x86_64-linux/lib")
    return next((place for place in places if (place / "libcudart_static.a").exists()), None)


def probe_cuda(cuda: Path | None) -> str | None:
    """None if nvcc runs, else the reason."""
    if cuda is None:
        return "no CUDA toolkit with nvcc and libcudart_static.a (CUDA_HOME, PATH, nvidia-cuda-nvcc)"
    try:
        subprocess.run([cuda / "bin/nvcc", "--version"], check=True, capture_output=True)
        return None
    except (OSError, subprocess.CalledProcessError):
        return f"{cuda}/bin/nvcc does not run"


def skip_reasons() -> dict[str, str]:
    """Extension -> why it is not built here; empty when both are."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        reason: str | None = f"only Linux x86-64 is built, this is {sys.platform} {platform.machine()}"
    elif importlib.util.find_spec("torch") is None:
        reason = "torch is not installed in the build environment"
    elif shutil.which("ninja") is None and importlib.util.find_spec("ninja") is None:
        reason = "ninja is not installed (pip install ninja)"
    else:
        reason = probe_compiler()
    if reason:
        return {"_C": reason, "_C_cuda": reason}
    wanted = os.environ.get("BUILD_EXTENSIONS", "_C,_C_cuda").split(",")
    skipped = {name: f"BUILD_EXTENSIONS asks for {', '.join(wanted)} only" for name in ("_C", "_C_cuda") if name not in wanted}
    cuda_reason = None if "_C_cuda" in skipped else probe_cuda(find_cuda())
    return {**skipped, "_C_cuda": cuda_reason} if cuda_reason else skipped


class NinjaFile:
    """A ninja file: three compile rules and one link rule; objects are rebuilt when a source, a header or a flag changes."""

    def __init__(self, folder: Path) -> None:
        import torch
        from torch.utils import cpp_extension

        self.folder = folder
        include = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"], str(ROOT / "csrc")]
        self.torch_flags = [f"-isystem{path}" for path in include[:-1]] + [f"-I{include[-1]}"]
        self.torch_flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
        # torch's headers are not in the depfiles (-MMD leaves out -isystem): another version must change the command instead
        self.torch_flags += [f"-DGPTFAST_TORCH={torch.__version__}"]
        common = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-fopenmp"]
        self.cxx_flags = [*common, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        # torch loads libgomp itself: -fopenmp at link time would only risk a second one
        self.link_flags = ["-shared", f"-L{cpp_extension.library_paths()[0]}", "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
        self.link_flags += shlex.split(os.environ.get("LDFLAGS", ""))
        self.lines = ["ninja_required_version = 1.8"]
        for rule, command in (
            ("cxx", f"{shlex.join(CXX)} -MMD -MF $out.d $flags -c $in -o $out"),
            ("nvcc", "$compiler -MMD -MF $out.d $flags -c $in -o $out"),
            ("link", f"{shlex.join(CXX)} $in $flags -o $out"),
        ):
            extra = [] if rule == "link" else ["  depfile = $out.d", "  deps = gcc"]
            self.lines += [f"rule {rule}", f"  command = {command}", f"  description = {rule} $out", *extra]

    def _edge(self, rule: str, target: Path, sources: list[Path], **variables: str) -> Path:
        names = " ".join(str(s).replace(" ", "$ ") for s in sources)
        self.lines.append(f"build {str(target).replace(' ', '$ ')}: {rule} {names}")
        self.lines += [f"  {key} = {value.replace('$', '$$')}" for key, value in variables.items()]
        return target

    def cxx(self, source: Path, flags: list[str], name: str) -> Path:
        return self._edge("cxx", self.folder / name / f"{source.stem}.o", [source], flags=shlex.join([*self.cxx_flags, *flags]))

    def nvcc(self, source: Path, flags: list[str], name: str, cuda: Path) -> Path:
        target = self.folder / name / f"{source.stem}.cu.o"
        return self._edge("nvcc", target, [source], flags=shlex.join(flags), compiler=str(cuda / "bin/nvcc"))

    def link(self, target: Path, objects: list[Path], flags: list[str]) -> None:
        self._edge("link", target, objects, flags=shlex.join([*self.link_flags, *flags]))

    def run(self, target: Path) -> str | None:
        """Builds one extension; returns None, or the reason (the compiler's messages are on the terminal)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        ninja = [shutil.which("ninja")] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
        jobs = os.environ.get("MAX_JOBS") or str(max(1, min(os.cpu_count() or 1, _memory_gib() // 2)))
        done = subprocess.run([*ninja, "-C", str(self.folder), "-j", jobs, str(target)])
        return None if done.returncode == 0 else "its sources do not compile or link here (the messages are in the build's output)"


def _memory_gib() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30  # a unit with torch headers takes up to 2 GiB


def cuda_gencode() -> list[str]:
    flags = []
    for name in os.environ.get("TORCH_CUDA_ARCH_LIST", ARCHITECTURES).replace(";", " ").split():
        code = name.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{code},code=sm_{code}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{code},code=compute_{code}")
    return flags


class Build(build_ext):
    """build_ext through one ninja file, so that every source has its own flags."""

    def run(self) -> None:
        skipped = skip_reasons()
        self.package = ROOT / "gptfast" if self.inplace else Path(self.build_lib).resolve() / "gptfast"
        built: dict[str, list[str]] = {}
        if "_C" not in skipped:
            ninja = NinjaFile(ROOT / "build" / f"ninja-{sysconfig.get_python_version()}")
            wanted = {"_C": self.add_cpp(ninja)}
            if "_C_cuda" not in skipped:
                wanted["_C_cuda"] = self.add_cuda(ninja)
            self.package.mkdir(parents=True, exist_ok=True)
            for name, contents in wanted.items():
                reason = ninja.run(self.target(name))
                if reason is None:
                    built[name] = contents
                else:
                    skipped[name] = reason
        self.write_record(built, skipped)
        for name, contents in built.items():
            print(f"gptfast.{name}: built for {' '.join(contents)}")
        for name, reason in skipped.items():
            print(f"gptfast.{name}: not built, {reason}; every op runs on PyTorch where it is missing")

    def target(self, name: str) -> Path:
        return self.package / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"

    def add_cpp(self, ninja: NinjaFile) -> list[str]:
        define = [*ninja.torch_flags, "-DTORCH_EXTENSION_NAME=_C"]
        sources = [ROOT / "csrc/ops.cpp", *sorted((ROOT / "csrc/cpu").rglob("*.cpp"))]
        objects = []
        for source in sources:
            kind, _, isa = source.stem.rpartition("_")
            flags = define
            if kind in ("kernels", "exact"):
                # they see no torch header: a weak symbol compiled for AVX-512 could replace the whole library's
                flags = [f"-I{ROOT / 'csrc'}", *ISA_FLAGS[isa], *(EXACT_FLAGS if kind == "exact" else [])]
            objects.append(ninja.cxx(source, flags, "cpu"))
        ninja.link(self.target("_C"), objects, [])
        return list(ISA_FLAGS)

    def add_cuda(self, ninja: NinjaFile) -> list[str]:
        cuda = find_cuda()
        assert cuda is not None
        gencode = cuda_gencode()
        strict = ["-Werror", "all-warnings", "-Xptxas=--warn-on-spills,-Werror", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        flags = ["-O3", "-std=c++20", *strict, f"-I{ROOT / 'csrc'}", "--threads=1", *gencode]
        objects = [ninja.nvcc(source, flags, "cuda", cuda) for source in sorted((ROOT / "csrc/cuda").glob("*.cu"))]
        # no CUDA header here: the bindings know the kernels as plain C functions
        objects += [ninja.cxx(source, ninja.torch_flags, "cuda") for source in sorted((ROOT / "csrc/cuda").glob("*.cpp"))]
        # a CUDA build of torch brings its own runtime: this one stays private
        private = ["-Wl,--exclude-libs,ALL", "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
        ninja.link(self.target("_C_cuda"), objects, [f"-L{cudart_folder(cuda)}", *private])
        return [flag.rpartition("code=")[2] for flag in gencode]

    def write_record(self, built: dict[str, list[str]], skipped: dict[str, str]) -> None:
        record: dict[str, object] = {"extensions": built, "skipped": skipped}
        if built:
            import torch

            version = subprocess.run([*CXX, "--version"], capture_output=True, text=True).stdout.splitlines()
            record |= {"torch": torch.__version__, "compiler": version[0] if version else CXX[0]}
        if self.package.is_dir():
            (self.package / "_build.json").write_text(json.dumps(record, indent=1) + "\n")

    def get_outputs(self) -> list[str]:
        targets = [self.target(extension.name.split(".")[-1]) for extension in self.extensions]
        return [str(target) for target in targets if target.exists()]


def extensions() -> list[Extension]:
    skipped = skip_reasons()
    return [Extension(f"gptfast.{name}", sources=[]) for name in ("_C", "_C_cuda") if name not in skipped]


setup(ext_modules=extensions(), cmdclass={"build_ext": Build}, package_dir={"gptfast": "gptfast", "gptfast.kernels": "kernels"})
