"""The test session: which proofs are required, which were executed, where the seconds went, where data sets lie.

GPTFAST_REQUIRE names proofs whose skip is a failure; with CI=true and no GPTFAST_REQUIRE these are the six that need no GPU.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

if TYPE_CHECKING:
    from gptfast.testing.checks import Target

ROOT = Path(__file__).resolve().parents[2]
PROOFS = ("cpp", "triton-interpret", "triton-aot", "cuda-build", "cuda-emulated", "browser", "cuda", "triton")
WITHOUT_GPU = PROOFS[:6]
# files whose tests run by the table and once more with GPTFAST_BACKEND=eager
RUN_TWICE = (
    "generation/", "training/", "tasks/test_classification.py", "tasks/test_language_modelling.py", "tasks/test_rows.py",
    "test_model.py", "test_forward.py", "test_cache.py", "test_cli.py", "test_demo.py",
)  # fmt: skip
_KERNEL_FILES = {"cpp": "csrc/cpu/{}.cpp", "triton": "kernels/{}.py", "cuda": "csrc/cuda/{}.cu"}
_rows: Counter[str] = Counter()
_seconds: dict[str, float] = {}


def _has_gpu() -> bool:
    """Whether this process could use a CUDA device; asks neither torch nor the driver, which a test run may have to do without."""
    try:
        cpu_only = importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        cpu_only = True
    return not cpu_only and any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/dxg"))


# ------------------------------------------------------------------------------------------------------------ what is required


def required() -> frozenset[str]:
    """The proofs whose skip is a failure. Raises pytest.UsageError for a name that is none."""
    text = os.environ.get("GPTFAST_REQUIRE")
    if text is None:
        return frozenset(WITHOUT_GPU) if os.environ.get("CI") == "true" else frozenset()
    names = frozenset(filter(None, (name.strip() for name in text.split(","))))
    unknown = sorted(names - set(PROOFS))
    if unknown:
        raise pytest.UsageError(f"GPTFAST_REQUIRE: unknown proof {', '.join(unknown)}; proofs are {', '.join(PROOFS)}")
    return names


def unavailable(proof: str, reason: str) -> NoReturn:
    """Skips the running test with `reason`, or fails it where `proof` is required."""
    if proof not in PROOFS:
        raise ValueError(f"unknown proof {proof!r}; proofs are {', '.join(PROOFS)}")
    if proof in required():
        pytest.fail(f"the proof {proof} is required (GPTFAST_REQUIRE) and cannot run: {reason}", pytrace=False)
    pytest.skip(f"{proof}: {reason}")


def requires(proof: str, reason: str | None) -> None:
    """Goes on if `reason` is None, else unavailable(proof, reason)."""
    if reason is not None:
        unavailable(proof, reason)


def record(op: str, proof: str, precision: str, direction: str) -> None:
    """Counts one executed case of (op, proof, 'fp32' | 'bf16' | 'fp16', 'forward' | 'backward')."""
    _rows[f"{op} {proof} {precision} {direction}"] += 1


def cxx() -> list[str]:
    """The C++ compiler command, CXX or g++; if it makes nothing that loads, a test is skipped, or fails where cpp is required."""
    reason = _compiler_reason()
    if reason is not None:
        unavailable("cpp", reason)
    return shlex.split(os.environ.get("CXX", "g++"))


@functools.cache
def _compiler_reason() -> str | None:
    command = shlex.split(os.environ.get("CXX", "g++"))
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "probe.cpp"), Path(folder, "probe.so")
        source.write_text('extern "C" int probe(int n) { return n; }\n')
        try:
            subprocess.run([*command, "-shared", "-fPIC", source, "-o", library], check=True, capture_output=True)
            return None if ctypes.CDLL(str(library)).probe(3) == 3 else f"{command[0]} makes code that does not run"
        except (OSError, subprocess.CalledProcessError):
            return f"no working C++ compiler ({command[0]})"


# --------------------------------------------------------------------------------------------------------------------- fixtures


def find_data(name: str) -> Path:
    """The file or folder `name` below GPTFAST_DATA; skips the running test where it is absent."""
    folder = os.environ.get("GPTFAST_DATA", "")
    path = Path(folder, name)
    if not folder or not path.exists():
        where = f"not in {folder}" if folder else "not there: GPTFAST_DATA is not set"
        pytest.skip(f"data set file {name} is {where} (README, Data sets)")
    return path


@pytest.fixture(name="data_file", scope="session")
def data_file_fixture() -> Callable[[str], Path]:
    """`data_file("gpt2/vocab.json")` -> Path below GPTFAST_DATA; the test is skipped where the file is absent."""
    return find_data


@pytest.fixture(autouse=True)
def seed_fixture(request: pytest.FixtureRequest) -> None:
    """Seeds torch by the test's name: a test draws the same numbers alone and in the suite."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(name="target")
def target_fixture(request: pytest.FixtureRequest) -> Target:
    """Every backend and dtype that has a kernel file for the op of tests/ops/test_<op>.py; skips (or fails) where it cannot run."""
    target: Target = request.param
    requires(target.proof, target.reason(_op_of(request.path)))
    return target


@pytest.fixture(name="backend_choice")
def backend_choice_fixture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For the files of RUN_TWICE: what the table chooses, or eager everywhere, in this process and in its children."""
    if request.param == "table":
        yield
        return
    from gptfast.backend import use

    monkeypatch.setenv("GPTFAST_BACKEND", "eager")
    with use("eager"):
        yield


def _runs_twice(path: Path) -> bool:
    """Whether a file's tests run by the table and on eager; once is enough where the environment asks for a backend anyway."""
    place = path.relative_to(ROOT / "tests").as_posix() if path.is_relative_to(ROOT / "tests") else ""
    return "GPTFAST_BACKEND" not in os.environ and place.startswith(RUN_TWICE)


def _op_of(path: Path) -> str:
    return path.stem.partition("_")[2]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if _runs_twice(metafunc.definition.path) and metafunc.definition.get_closest_marker("once") is None:
        metafunc.fixturenames.insert(0, "backend_choice")
        metafunc.parametrize("backend_choice", ["table", "eager"], indirect=True)
    if "target" not in metafunc.fixturenames:
        return
    from gptfast.testing.checks import DTYPES, Target

    op = _op_of(metafunc.definition.path)
    targets = []
    for name, place in _KERNEL_FILES.items():
        if not (ROOT / place.format(op)).exists():
            continue  # a missing kernel file is the statement "not there yet"
        precisions = list(DTYPES) if name == "cpp" or _has_gpu() else ["fp32"]  # one case shows why the others cannot run either
        targets += [Target(name, precision, name) for precision in precisions]
        if name == "triton":  # the interpreter is wrong in bf16
            targets += [Target(name, precision, "triton-interpret") for precision in ("fp32", "fp16")]
    metafunc.parametrize("target", targets, indirect=True, ids=str)


# ------------------------------------------------------------------------------------------------------------------------ hooks


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-proof-rows", action="store_true", help="record what was executed in proof_rows.json and proof.json")
    parser.addoption("--fuzz-rounds", type=int, default=120, help="damaged files a loader in tests/test_fuzz.py (default: 120)")


def pytest_configure(config: pytest.Config) -> None:
    required()  # an unknown name ends the run here
    config.addinivalue_line("markers", "once: not repeated on eager, in a file whose tests are")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C, and so would our children
    # a folder named kernels on sys.path would shadow Hugging Face's package of that name, for which transformers looks
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    if "TRITON_INTERPRET" not in os.environ and not _has_gpu():
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: one process interprets or compiles, never both


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    file = report.nodeid.partition("::")[0]
    _seconds[file] = _seconds.get(file, 0.0) + report.duration


def _missing_rows() -> list[str]:
    path = ROOT / "tests/proof_rows.json"
    committed = json.loads(path.read_text())["rows"] if path.exists() else []
    return [row for row in committed if row not in _rows and row.split()[1] in required()]


def _whole_suite(config: pytest.Config) -> bool:
    chosen = config.option.keyword or config.option.markexpr or getattr(config.option, "lf", False)
    return config.args_source is pytest.Config.ArgsSource.TESTPATHS and not chosen and not config.option.collectonly


def _write_proof() -> None:
    """What `gptfast backends --proof` shows: each (op, backend) of the rows, and where it was executed or only compiled."""
    import torch

    from gptfast import proof

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    places = {"cpp": proof.cpu_model(), "triton-interpret": "interpreter", "cuda-emulated": "cpu shim"}
    seen = {(op, name) for op, name, *_ in map(str.split, _rows)}
    compiled = {"triton-aot": "sm_80, sm_90, sm_100"}
    where = places | compiled
    proof.write([proof.record(op, name.split("-")[0], where.get(name, device), name not in compiled) for op, name in seen])


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if session.config.getoption("--update-proof-rows"):
        from gptfast import proof

        path = ROOT / "tests/proof_rows.json"
        committed = json.loads(path.read_text())["rows"] if path.exists() else []
        path.write_text(json.dumps({"version": 1, "rows": sorted({*committed, *_rows})}, indent=1) + "\n")
        _write_proof()
        proof.write(proof.from_tests((row.split()[0], row.split()[1]) for row in _rows))
    if exitstatus == 0 and _whole_suite(session.config) and _missing_rows():
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if _rows:
        by_proof = Counter(row.split()[1] for row in _rows)
        shown = ", ".join(f"{proof} {count}" for proof, count in sorted(by_proof.items()))
        count = f"{len(_rows)} rows (op, backend, dtype, direction) in {sum(_rows.values())} cases"
        terminalreporter.write_line(f"proof: {count}: {shown}")
    if _whole_suite(config):
        for row in _missing_rows():
            terminalreporter.write_line(f"proof: FAILED, committed in tests/proof_rows.json but not executed: {row}", red=True)
    folders: dict[str, float] = {}
    for file, seconds in _seconds.items():
        folder = str(Path(file).parent)
        folders[folder] = folders.get(folder, 0.0) + seconds
    terminalreporter.write_line("seconds: " + ", ".join(f"{folder} {seconds:.1f}" for folder, seconds in sorted(folders.items())))
    slowest = sorted(_seconds.items(), key=lambda item: -item[1])[:5]
    slow = [f"{file} {seconds:.1f}" for file, seconds in slowest if seconds >= 5]
    if slow:
        terminalreporter.write_line("slowest: " + ", ".join(slow))
