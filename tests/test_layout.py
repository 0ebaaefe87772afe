"""The house's rules as tests: one name for an op in every layer, who imports whom, how long a file and a function may be."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OPS = {path.stem for path in (ROOT / "gptfast/ops").glob("*.py") if not path.stem.startswith("_")}
# composed ops use other ops' leaf modules; all others stand alone
COMPOSED = {"add_layer_norm", "linear_cross_entropy", "layer_norm_linear", "linear_add", "lm_head_sample", "transformer_block"}
BELOW_MODEL = ("ops", "backend", "kernels", "errors", "_environment", "packing", "philox")
ABOVE_MODEL = ("tasks", "training", "generation", "serving", "cli", "commands", "demo", "benchmark", "testing", "doctor", "data")
PYTHON = [ROOT / "setup.py", *(p for f in ("gptfast", "kernels", "tests", "bench") for p in sorted((ROOT / f).rglob("*.py")))]
NATIVE = sorted(p for f in ("csrc", "tests/shim") for p in (ROOT / f).rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> Iterator[str]:
    """Absolute names of all modules that a file imports, at its top or inside functions, but not only for type checkers."""
    tree = ast.parse(path.read_text())
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            skipped |= {id(child) for statement in node.body for child in ast.walk(statement)}
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def forbidden(paths: list[Path], pattern: str) -> list[str]:
    return [f"{name(path)} imports {module}" for path in paths for module in imports(path) if re.match(pattern, module)]


# ------------------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("folder", "pattern"),
    [
        ("csrc/cpu", r"^(\w+?)(?:_kernel)?\.(?:cpp|h)$"),
        ("csrc/cuda", r"^(\w+)\.(?:cu|cuh)$"),
        ("kernels", r"^([a-z]\w*)\.py$"),
        ("tests/ops", r"^test_(\w+?)(?:_cuda)?\.py$"),
        ("bench/ops", r"^bench_(\w+)\.py$"),
    ],
)
def test_an_op_has_one_name(folder: str, pattern: str) -> None:
    """A file in these folders is named after an op, or is one of the folder's shared files."""
    shared = {
        "csrc/cpu": {
            "vec", "vec_types", "vec_math", "vec_product", "philox_vec", "isa", "tensor", "matmul", "memory", "kernels",
            "convert", "partials", "transpose", "kernels_plain", "kernels_avx2", "kernels_avx512",
            "exact", "exact_plain", "exact_avx2", "exact_avx512", "exact_vec", "select_vec", "sample_row", "sample_filters",
            "sample_draw", "paged", "paged_tensor", "packed_tensor", "attention_backward", "attention_block", "read_bandwidth",
        },
        "csrc/cuda": {"ptx", "vec", "reduce", "launch", "array", "launchers", "bindings"},
    }.get(folder, set())
    for path in (ROOT / folder).glob("*"):
        match = re.match(pattern, path.name)
        if match and match[1] not in shared:
            assert match[1] in OPS, f"{name(path)}: there is no gptfast/ops/{match[1]}.py"


def test_every_op_has_a_test() -> None:
    missing = [op for op in sorted(OPS) if not (ROOT / f"tests/ops/test_{op}.py").exists()]
    grouped = " ".join(path.read_text() for path in (ROOT / "tests/ops").glob("test_*.py"))
    assert [op for op in missing if not re.search(rf"\b{op}\b", grouped)] == []


def test_every_kernel_has_a_benchmark() -> None:
    files = [path for pattern in ("csrc/cpu/*.cpp", "csrc/cuda/*.cu", "kernels/*.py") for path in ROOT.glob(pattern)]
    for op in sorted({path.stem for path in files} & OPS):
        assert (ROOT / f"bench/ops/bench_{op}.py").exists(), f"{op} has a kernel and no bench/ops/bench_{op}.py"


def test_every_schema_is_an_op() -> None:
    schemas = re.findall(r'm\.def\("(\w+)\(', (ROOT / "csrc/ops.cpp").read_text())
    assert schemas
    assert {schema.removesuffix("_backward") for schema in schemas} <= OPS


def test_every_registration_has_a_schema() -> None:
    schemas = set(re.findall(r'm\.def\("(\w+)\(', (ROOT / "csrc/ops.cpp").read_text()))
    for path in (ROOT / "csrc").rglob("*.cpp"):
        assert set(re.findall(r'm\.impl\("(\w+)"', path.read_text())) <= schemas, name(path)


def test_directions_are_written_out() -> None:
    for path in [*(ROOT / "kernels").glob("*.py"), *(ROOT / "gptfast/ops").glob("*.py")]:
        names = [node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        assert [found for found in names if re.search(r"fwd|bwd|_v\d", found)] == [], name(path)


def test_no_folder_makes_kernels_a_package() -> None:
    for folder in ("kernels", "tests", "tests/ops", "bench", "bench/ops"):
        assert not (ROOT / folder / "__init__.py").exists(), folder


# ----------------------------------------------------------------------------------------------------------------- who imports whom


def test_kernels_import_torch_triton_and_each_other() -> None:
    for path in (ROOT / "kernels").glob("*.py"):
        tops = {module.split(".")[0] for module in imports(path)}
        assert tops <= {"__future__", "collections", "contextlib", "typing", "math", "torch", "triton", "kernels"}, name(path)


def test_the_package_never_imports_transformers_nor_the_tests() -> None:
    files = [path for path in (ROOT / "gptfast").rglob("*.py") if "integrations" not in path.parts]
    assert forbidden(files, r"(transformers|tests|bench)(\.|$)") == []


def test_ops_do_not_import_ops() -> None:
    plain = [ROOT / f"gptfast/ops/{op}.py" for op in OPS - COMPOSED]
    assert forbidden(plain, rf"gptfast\.ops\.({'|'.join(sorted(OPS))})(\.|$)") == []


def test_nothing_below_the_model_imports_upward() -> None:
    files = [*(ROOT / "gptfast/ops").glob("*.py"), *(ROOT / f"gptfast/{part}.py" for part in BELOW_MODEL if part != "ops")]
    upward = rf"gptfast\.({'|'.join(('model', 'layers', 'forward', 'cache', *ABOVE_MODEL))})(\.|$)"
    assert forbidden([path for path in files if path.exists()], upward) == []
    model = [ROOT / f"gptfast/{part}.py" for part in ("model", "layers", "forward", "cache")]
    # model.generate is a method that hands over to the generation loop
    above = [part for part in ABOVE_MODEL if part != "generation"]
    assert forbidden([path for path in model if path.exists()], rf"gptfast\.({'|'.join(above)})(\.|$)") == []


def test_tests_and_benchmarks_do_not_import_each_other() -> None:
    assert forbidden(list((ROOT / "tests").rglob("*.py")), r"(bench|tests)(\.|$)") == []
    assert forbidden(list((ROOT / "bench").rglob("*.py")), r"(bench|tests)(\.|$)") == []


def test_backends_are_imported_in_one_place() -> None:
    files = [path for path in (ROOT / "gptfast").rglob("*.py") if path.name not in ("backend.py", "_aot.py")]
    assert forbidden(files, r"(triton|gptfast\.kernels\.|gptfast\._C_cuda)") == []


def includes(path: Path) -> list[str]:
    return re.findall(r'^#include [<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def test_native_code_includes_downward() -> None:
    cpu, cuda = list((ROOT / "csrc/cpu").rglob("*.*")), list((ROOT / "csrc/cuda").rglob("*.*"))
    assert [name(path) for path in cpu if any("cuda/" in line for line in includes(path))] == []
    assert [name(path) for path in cuda if any("cpu/" in line for line in includes(path))] == []
    bare = [path for path in cpu + cuda if path.suffix in (".cuh", ".cu") or path.name.endswith("_kernel.h")]
    assert bare
    assert [name(path) for path in bare if any(re.match(r"(torch|ATen|c10)/", line) for line in includes(path))] == []
    for path in (ROOT / "csrc").rglob("*.*"):
        assert not any(re.match(r"(torch/extension|c10/cuda|ATen/cuda)", line) for line in includes(path)), name(path)


def test_native_code_computes_by_itself() -> None:
    """ATen gives memory and views; what is computed is computed by kernels, and matrix products by linear.cpp alone."""
    memory, products = {"empty", "empty_like"}, {"mm", "addmm"}
    for path in (ROOT / "csrc").rglob("*.*"):
        text = path.read_text()
        used = set(re.findall(r"#include <ATen/ops/(\w+)\.h>", text))
        assert used <= memory | (products if path.name == "linear.cpp" else set()), name(path)
        assert not re.search(r"#include <(ATen/ATen|ATen/Functions|torch/torch|torch/extension)\.h>", text), name(path)
        computing = re.findall(r"[.>](to|contiguous|clone|copy_|zero_|fill_|sum|add_|mul_|sub_|div_|matmul|mm)\(", text)
        assert computing == [], f"{name(path)}: {computing}"


# ------------------------------------------------------------------------------------------------------------------------- lengths


def test_files_are_short() -> None:
    """About 400 lines; a test file, which is read a test at a time, may have a few more."""
    lengths = {name(path): len(path.read_text().splitlines()) for path in PYTHON + NATIVE}
    assert {file: count for file, count in lengths.items() if count > (550 if file.startswith("tests/") else 420)} == {}


def test_native_lines_are_short() -> None:
    """Python's are ruff's business."""
    lines = [(name(path), number, len(line)) for path in NATIVE for number, line in enumerate(path.read_text().splitlines(), 1)]
    assert [place for place in lines if place[2] > 140] == []


def test_functions_are_short() -> None:
    long = []
    for path in PYTHON:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno is not None
                if node.end_lineno - node.lineno + 1 > 65:
                    long.append(f"{name(path)}: {node.name} has {node.end_lineno - node.lineno + 1} lines")
    assert long == []


def test_no_secret_agreements_in_the_code() -> None:
    """No absolute paths of somebody's machine, no leftovers."""
    leftover = re.compile(r"\b(TODO|FIXME|XXX)\b|(?<![\w.])/(home|work|Users)/")
    for path in PYTHON + NATIVE:
        if path != Path(__file__):
            assert not leftover.search(path.read_text()), name(path)
