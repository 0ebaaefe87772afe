"""Which implementation runs, and why: the environment, forcing, threads, torch.compile, the table."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import gptfast
import gptfast.backend as backend
from gptfast import _environment, testing
from gptfast._environment import BACKENDS, OPS
from gptfast.errors import Error
from gptfast.ops import layer_norm

HAS_CPP = backend.EXTENSIONS["_C"] is None


@pytest.fixture(autouse=True)
def by_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """What GPTFAST_BACKEND asks of the test run is not what these tests are about."""
    monkeypatch.setattr(backend, "_ENVIRONMENT", (None, {}))
    monkeypatch.setattr(backend._request, "asked", None)
    monkeypatch.setattr(backend._request, "forced", {})


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GPTFAST_", "TRITON_"))}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True, cwd="/", timeout=300)


# -------------------------------------------------------------------------------------------------------------- the environment


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", (None, {})),
        ("triton", ("triton", {})),
        ("triton,attention=cuda", ("triton", {"attention": "cuda"})),
        (" attention = cuda , gelu=eager ", (None, {"attention": "cuda", "gelu": "eager"})),
    ],
)
def test_parsing(text: str, expected: tuple[str | None, dict[str, str]]) -> None:
    assert _environment.parse_backend(text) == expected


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("GPTFAST_BACKEND", "cuba", "unknown backend 'cuba' (did you mean cuda?); backends are eager, cpp, cuda, triton"),
        ("GPTFAST_BACKEND", "layernorm=cpp", "unknown op 'layernorm' (did you mean layer_norm?)"),
        ("GPTFAST_BACKEND", "cpp,triton", "GPTFAST_BACKEND names two backends for every op: cpp"),
        ("GPTFAST_CPU_ISA", "sse", "GPTFAST_CPU_ISA is 'sse'; allowed: plain, avx2, avx512"),
        ("GPTFAST_BACKENDS", "cpp", "unknown variable GPTFAST_BACKENDS (did you mean GPTFAST_BACKEND?)"),
    ],
)
def test_a_wrong_variable_is_an_error(variable: str, value: str, message: str) -> None:
    with pytest.raises(Error) as caught:
        _environment.check({variable: value})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_environment_is_read_at_import() -> None:
    """One process for each: a wrong name ends `import gptfast`; a right one decides, in other threads too."""
    done = python("import gptfast", GPTFAST_BACKEND="tritn")
    assert done.returncode == 1 and "did you mean triton?" in done.stderr
    code = (
        "import threading, torch, gptfast.backend as b\n"
        "x, seen = torch.zeros(2, 3), []\n"
        "worker = threading.Thread(target=lambda: seen.append(b.choose('layer_norm', x)))\n"
        "worker.start(); worker.join()\n"
        "print(b.choose('layer_norm', x), *seen)"
    )
    assert python(code, GPTFAST_BACKEND="eager").stdout.split() == ["eager", "eager"]
    assert python(code, GPTFAST_BACKEND="layer_norm=eager").stdout.split() == ["eager", "eager"]


def test_the_instruction_set_is_forced_or_refused() -> None:
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    code = "import gptfast.backend; from gptfast import _C; print(_C.build_info()['isa'])"
    assert python(code, GPTFAST_CPU_ISA="plain").stdout.strip() == "plain"
    from gptfast import _C

    with pytest.raises(ValueError, match="instruction set neon cannot run on this CPU; it has plain"):
        _C.set_isa("neon")


def test_an_instruction_set_that_this_cpu_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    from gptfast import _C

    def refuses(name: str) -> None:
        raise ValueError(f"instruction set {name} cannot run on this CPU; it has plain, avx2")

    monkeypatch.setattr(_C, "set_isa", refuses)
    monkeypatch.setenv("GPTFAST_CPU_ISA", "avx512")
    with pytest.raises(Error, match="GPTFAST_CPU_ISA: instruction set avx512 cannot run on this CPU; it has plain, avx2"):
        backend._load_extension("_C")


# ---------------------------------------------------------------------------------------------------------------------- choosing


def test_asking_falls_back_by_the_table_and_forcing_does_not() -> None:
    x = torch.zeros(2, 3)
    with gptfast.backend("cuda"):
        assert backend.choose("layer_norm", x) == ("cpp" if HAS_CPP else "eager")
    with gptfast.backend(layer_norm="cuda"), pytest.raises(Error, match="layer_norm: backend cuda was forced and cannot run: "):
        layer_norm(x)
    with gptfast.backend("eager"):
        assert backend.choose("layer_norm", x) == "eager"


def test_the_context_nests_and_is_undone() -> None:
    x = torch.zeros(2, 3)
    before = backend.choose("layer_norm", x)
    with gptfast.backend("eager"):
        with gptfast.backend(gelu="eager"):
            assert backend.choose("layer_norm", x) == "eager"
        with pytest.raises(ZeroDivisionError), gptfast.backend(layer_norm="triton"):
            raise ZeroDivisionError
        assert backend.choose("layer_norm", x) == "eager"
    assert backend.choose("layer_norm", x) == before


@pytest.mark.parametrize(("asked", "forced"), [("gpu", {}), (None, {"layernorm": "cpp"}), (None, {"layer_norm": "c++"})])
def test_an_unknown_name_raises_at_once(asked: str | None, forced: dict[str, str]) -> None:
    with pytest.raises(Error, match="unknown"), gptfast.backend(asked, **forced):
        pass


def test_a_thread_has_its_own_choice() -> None:
    x, seen = torch.zeros(2, 3), []
    with gptfast.backend("eager"):
        worker = threading.Thread(target=lambda: seen.append(backend.choose("layer_norm", x)))
        worker.start()
        worker.join()
        assert backend.choose("layer_norm", x) == "eager"
    assert seen == ["cpp" if HAS_CPP else "eager"]


def test_backward_takes_the_backend_of_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may run later, elsewhere: outside the with-block, in a thread of autograd's."""
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    calls: list[str] = []
    real = backend.impl("layer_norm", "cpp")

    def noted(*arguments: Any) -> Any:
        calls.append("backward")
        return real.backward(*arguments)

    monkeypatch.setitem(backend._impls, ("layer_norm", "cpp"), backend.Leaf(real.forward, noted))
    x = torch.randn(2, 3, requires_grad=True)
    with gptfast.backend(layer_norm="cpp"):
        y = layer_norm(x)
    with gptfast.backend(layer_norm="eager"):
        y.sum().backward()
    assert calls == ["backward"]


def test_a_kernel_that_raises_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Any:
        raise RuntimeError("kernel failed")

    monkeypatch.setitem(backend._missing, ("layer_norm", "cpp"), None)
    monkeypatch.setitem(backend._impls, ("layer_norm", "cpp"), backend.Leaf(broken, broken))
    with gptfast.backend("cpp"), pytest.raises(RuntimeError, match="kernel failed"):
        layer_norm(torch.randn(2, 3))


@pytest.mark.parametrize("name", ["cpp", "triton", "cuda"])
def test_reasons_are_one_line(name: str) -> None:
    for op in OPS:
        for inputs in ((), (torch.zeros(2, 3),)):
            reason = backend.supports(op, name, inputs)
            assert reason is None or (reason and "\n" not in reason)
    assert backend.supports("layer_norm", "eager") is None


def test_triton_takes_cpu_tensors_only_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    testing.requires("triton-interpret", backend.supports("layer_norm", "triton"))
    x = torch.zeros(2, 3)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.supports("layer_norm", "triton", (x,)) is None
    assert backend.supports("layer_norm", "triton", (x.expand(1, 2, 3),)) is None
    assert "up to 16384" in str(backend.supports("layer_norm", "triton", (torch.zeros(1, 16385),)))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET=1 interprets it there" in str(backend.supports("layer_norm", "triton", (x,)))
    assert backend.choose("layer_norm", x) != "triton"


# ------------------------------------------------------------------------------------------------------------------ torch.compile


def graph_ops(record: list[torch.fx.GraphModule]) -> str:
    return " ".join(str(node.target) for module in record for node in module.graph.nodes if node.op == "call_function")


def test_the_choice_is_seen_by_a_compiled_function() -> None:
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    graphs: list[torch.fx.GraphModule] = []

    def keep(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: layer_norm(x) * 2, fullgraph=True, backend=keep)
    x = torch.randn(4, 33)
    with torch.no_grad():
        first = compiled(x)
        with gptfast.backend("eager"):
            second = compiled(x)
        third = compiled(x)
    assert len(graphs) == 2, "one graph a choice, and the first is found again"
    assert "gptfast.layer_norm" in graph_ops(graphs[:1]) and "gptfast.layer_norm" not in graph_ops(graphs[1:])
    assert torch.equal(first, third)
    assert torch.equal(second, torch.nn.functional.layer_norm(x, (33,)) * 2)


@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
def test_the_with_block_traces(inside: bool) -> None:
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    torch._dynamo.reset()

    def chosen(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if inside:
            with backend.use(layer_norm="cpp"):
                return layer_norm(x, weight) + 1
        return layer_norm(x, weight) + 1

    x, weight = torch.randn(4, 33, requires_grad=True), torch.rand(33, requires_grad=True)
    compiled = torch.compile(chosen, fullgraph=True, backend="aot_eager")
    with backend.use(layer_norm="cpp"):
        right = testing.evaluate(chosen, {"x": x, "weight": weight}, upstream={"y": torch.ones(4, 33)})
        found = testing.evaluate(compiled, {"x": x, "weight": weight}, upstream={"y": torch.ones(4, 33)})
    for name, value in right.items():
        assert testing.same_bits(value, found[name]), name


TRACE_TRITON = """
import torch
import torch.utils._triton
torch.utils._triton.has_triton = lambda: True  # Dynamo asks for a device; tracing needs none
from torch._subclasses import FakeTensorMode
import gptfast.backend as backend
from gptfast.ops import layer_norm

graphs = []
def keep(module, inputs):
    graphs.append(module)
    return module.forward

def forward(x, weight, bias):
    return layer_norm(x, weight, bias) * 2

def backward(dy, x, weight, mean, rstd):
    return backend.impl("layer_norm", "triton").backward(dy, x, weight, mean, rstd)

with FakeTensorMode(), backend.use(layer_norm="triton"):  # autograd itself would need torch's CUDA library
    x, weight, mean = (torch.empty(*shape, device="cuda") for shape in ((64, 768), (768,), (64,)))
    y = torch.compile(forward, fullgraph=True, backend=keep)(x, weight, weight)
    dx, dweight, dbias = torch.compile(backward, fullgraph=True, backend=keep)(x, x, weight, mean, mean)
    print(y.shape, y.device, dx.shape, dweight.shape)
names = [str(node.target) for module in graphs for node in module.graph.nodes]
print(sum("triton_kernel_wrapper" in name for name in names), "kernels")
"""


def test_triton_traces_without_a_gpu() -> None:
    """On fake CUDA tensors, in a process that does not interpret."""
    testing.requires("triton-aot", backend.supports("layer_norm", "triton"))
    done = python(TRACE_TRITON)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-2] == "torch.Size([64, 768]) cuda:0 torch.Size([64, 768]) torch.Size([768])"
    assert done.stdout.splitlines()[-1] == "3 kernels"


# ---------------------------------------------------------------------------------------------------------------------- the table


def test_the_table_has_every_op_and_a_reason_in_every_cell() -> None:
    rows = backend.table("cpu")
    assert [row["op"] for row in rows] == list(OPS)
    for row in rows:
        assert set(row) == {"op", "choice", *BACKENDS}
        assert row["eager"] is None and row[row["choice"]] is None
    text = backend.explain("cpu")
    assert text.splitlines()[0].split() == ["op", *BACKENDS]
    assert len(text.splitlines()) == len(OPS) + 1
    assert gptfast.explain is backend.explain
    chosen = next(line for line in text.splitlines() if line.startswith("layer_norm "))
    assert f"-> {'yes' if HAS_CPP else ''}" in chosen


def test_the_summary_names_every_choice() -> None:
    with gptfast.backend("eager"):
        assert backend.summary("cpu") == f"eager: all {len(OPS)} ops"
    if HAS_CPP:
        assert "cpp: " in backend.summary("cpu")


def test_every_op_has_an_eager_definition() -> None:
    import importlib

    for op in OPS:
        module = importlib.import_module(f"gptfast.ops.{op}")
        assert callable(module.eager) and module.eager.__doc__, op
        assert getattr(module, op).__doc__, op


def test_nobody_else_asks_for_devices_or_backends() -> None:
    folder = Path(gptfast.__file__).parent
    for path in [*(folder / "ops").glob("*.py"), folder / "model.py"]:
        if path.exists():
            assert ".is_cuda" not in path.read_text(), path.name
