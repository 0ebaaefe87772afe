"""What is installed, what an import costs, and that the folder kernels/ never stands in for the package of that name."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def python(code: str, folder: Path = ROOT) -> str:
    """stdout of a fresh interpreter that imports what lies in `folder` first; the repository has a folder kernels/."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_import_is_light() -> None:
    assert python("import sys, gptfast; print('torch' in sys.modules)") == "False"
    loaded = python("import sys, gptfast; gptfast.GPT2LMHeadModel, gptfast.Trainer, gptfast.Engine; print(*sys.modules)").split()
    assert "torch" in loaded
    assert not {"triton", "transformers", "matplotlib", "gptfast._aot"} & set(loaded)


def test_import_initialises_no_cuda() -> None:
    assert python("import gptfast, torch; gptfast.ops, gptfast.explain; print(torch.cuda.is_initialized())") == "False"


def test_import_time() -> None:
    imports = "import gptfast; gptfast.ops, gptfast.GPT2LMHeadModel"
    code = f"import time, torch; start = time.process_time(); {imports}; print(time.process_time() - start)"
    assert min(float(python(code)) for _ in range(3)) <= 0.4


def test_public_names() -> None:
    names = python("import gptfast; [getattr(gptfast, n) for n in gptfast.__all__]; print(*gptfast.__all__)").split()
    classes = "GPT2Config GPT2LMHeadModel GPT2ForSequenceClassification GPT2Tokenizer AdamW TrainConfig Trainer SamplingParams"
    assert names == [*classes.split(), "Engine", "backend", "ops", "explain", "Error", "LoadError", "__version__"]


def test_kernels_folder_shadows_nothing() -> None:
    # transformers looks for a package `kernels`; ours has no __init__.py, so any installed one wins, and alone it is no package
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s else None)"
    origin = python(code)
    assert origin == "None" or not origin.startswith(str(ROOT))
    assert str(ROOT) not in sys.path
    assert python("import gptfast.kernels.layer_norm as k; print(k.__name__)") == "gptfast.kernels.layer_norm"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built in pip's isolated environment, where there is no torch."""
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"
    copy = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if copy.returncode:
        pytest.skip("not a git checkout")
    for name in copy.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", out, source]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and ("Could not find a version" in done.stderr or "connection" in done.stderr.lower()):
        pytest.skip("pip cannot reach its index for setuptools")
    if "No module named pip" in done.stderr:
        pytest.skip("this interpreter has no pip")
    assert done.returncode == 0, done.stderr[-2000:]
    return next(out.glob("*.whl"))


def test_isolated_build_is_pure_python(wheel: Path, tmp_path: Path) -> None:
    assert wheel.name.startswith("gptfast_torch-") and wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for needed in ("gptfast/py.typed", "gptfast/kernels.py", "gptfast/kernels/layer_norm.py", "gptfast/ops/layer_norm.py"):
        assert needed in names
    assert not [n for n in names if n.endswith(".so") or n.startswith(("tests/", "bench/", "kernels/"))]
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import gptfast; from gptfast import backend; print(gptfast.__file__); print(backend.supports('layer_norm', 'cpp'))"
    origin, reason = python(code, tmp_path).splitlines()
    assert origin.startswith(str(tmp_path)) and reason.startswith("not built")
    advice = python("import sys; sys.argv = ['gptfast', 'doctor']; from gptfast.cli import main; main()", tmp_path)
    assert "--no-build-isolation" in advice


def test_wheel_changes_no_installed_package(wheel: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--report", "-", "--force-reinstall", "--no-deps", wheel]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [item["metadata"]["name"] for item in json.loads(done.stdout)["install"]] == ["gptfast-torch"]
    command = [sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--report", "-", wheel]
    check = subprocess.run(command, capture_output=True, text=True)
    assert check.returncode == 0, check.stderr[-2000:]
    installed = [item["metadata"]["name"] for item in json.loads(check.stdout)["install"]]
    assert set(installed) <= {"gptfast-torch"}, f"installing the wheel would change {installed}"
