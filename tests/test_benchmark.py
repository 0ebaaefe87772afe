"""gptfast/benchmark.py and gptfast/proof.py: what is measured, what is refused, and the files that are written."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gptfast import Error, LoadError, proof
from gptfast import benchmark as bench
from gptfast.backend import supports
from gptfast.ops.layer_norm import eager


def test_rounds_alternate_and_medians_tell_slow_from_fast() -> None:
    calls: list[str] = []

    def candidate(name: str, seconds: float) -> Any:
        def run() -> None:
            calls.append(name)
            time.sleep(seconds)
        return run

    timings = bench.interleave({"fast": candidate("fast", 1e-3), "slow": candidate("slow", 4e-3)}, rounds=6, seconds=0.0)
    assert timings["slow"].median > 2 * timings["fast"].median > 0
    assert all(len(timing.samples) == 6 and timing.spread >= 0 for timing in timings.values())
    assert calls[4:] == ["fast", "slow", "slow", "fast"] * 3, "each round starts with the next candidate"


def test_candidates_that_time_themselves_take_turns() -> None:
    calls: list[str] = []
    numbers = {"a": itertools.count(1), "b": itertools.count(10)}

    def candidate(name: str) -> Any:
        def run() -> float:
            calls.append(name)
            return float(next(numbers[name]))
        return run

    timings = bench.alternate({name: candidate(name) for name in numbers}, rounds=5)
    assert timings["a"].samples == [1.0, 2.0, 3.0, 4.0, 5.0] and timings["b"].median == 12.0
    assert calls == ["a", "b", "b", "a"] * 2 + ["a", "b"]
    with pytest.raises(Error, match="4 rounds; at least 5"):
        bench.alternate({"a": lambda: 1.0}, rounds=4)


def test_summary_is_median_and_interquartile_range() -> None:
    timing = bench.summarise([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (timing.median, timing.spread) == (3.0, pytest.approx(2.0 / 3.0))


def test_too_few_rounds_are_refused() -> None:
    with pytest.raises(Error, match="4 rounds; at least 5"):
        bench.interleave({"a": lambda: None}, rounds=4)


def test_inputs_leave_every_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "past_cache", lambda device: 1000)
    numbers = itertools.count()
    assert bench.inputs(lambda: next(numbers), 300) == [0, 1, 2, 3]
    assert len(bench.inputs(list, 10**9)) == 2, "one set would be read from a cache however large it is"
    assert bench.cache_bytes() > 0


def test_ceilings_are_rates_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "past_cache", lambda device: 8 << 20)
    monkeypatch.setattr("gptfast.bandwidth.read_bytes", lambda: 8 << 20)
    found = bench.bandwidths(repeats=1)
    assert set(found) == {"copy", "read"} and all(1e8 < rate < 1e13 for rate in found.values())
    assert len(bench._products(torch.ones(8, 8), torch.ones(8, 8))) >= 1
    for product in bench._products(torch.eye(4), torch.arange(16.0).view(4, 4)):
        assert torch.equal(product(), torch.arange(16.0).view(4, 4).t())


def test_a_fallback_is_refused() -> None:
    x = torch.ones(2, 8)
    with pytest.raises(Error, match=r"benchmark of layer_norm on cuda refused: "), bench.force("layer_norm", "cuda", x):
        pass
    with pytest.raises(Error, match=r"benchmark of layer_norm on triton refused: "), bench.force("layer_norm", "triton", x):
        pass  # not even where the tests interpret Triton
    with pytest.raises(Error, match="unknown op 'layer_nrom'"), bench.force("layer_nrom", "cpp"):
        pass
    with pytest.raises(Error, match="unknown backend 'cpu'"), bench.force("layer_norm", "cpu"):
        pass


def test_a_forced_backend_is_the_one_that_runs() -> None:
    from gptfast.backend import choose

    x = torch.ones(2, 8)
    name = "eager" if supports("layer_norm", "cpp", (x,)) else "cpp"
    with bench.force("layer_norm", name, x):
        assert choose("layer_norm", x) == name


def _operands() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(6, 40).requires_grad_(), torch.randn(40).requires_grad_(), torch.randn(40).requires_grad_()]


def test_a_right_result_may_be_timed() -> None:
    bench.check("right", lambda x, w, b: F.layer_norm(x, w.shape, w, b), eager, _operands())


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * 1.001


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x, w, b: F.layer_norm(x, w.shape, w), "output 0"),
        (lambda x, w, b: F.layer_norm(x, w.shape, w, b) * 1.0001, "output 0"),
        (lambda x, w, b: torch.zeros_like(x) + 0 * (x.sum() + w.sum() + b.sum()), "output 0"),
        (lambda x, w, b: _WrongGradient.apply(F.layer_norm(x, w.shape, w, b)), "gradient 0"),
    ],
)
def test_a_wrong_result_is_not_timed(wrong: Any, message: str) -> None:
    operands = _operands()
    if message == "output 0":
        operands = [t.detach() for t in operands]
    with pytest.raises(Error, match=f"benchmark of it refused, its result is wrong: {message}"):
        bench.check("it", wrong, eager, operands)


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_one_pass_uses_every_operand_set(direction: str) -> None:
    sets = [([torch.full((2,), float(i)).requires_grad_()], torch.ones(2)) for i in range(3)]
    seen: list[float] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(float(x[0].detach()))
        return x * x

    task = bench.one_pass(function, direction, itertools.cycle(sets).__next__)
    results = [task() for _ in range(6)]
    assert seen == [0.0, 1.0, 2.0] * (1 if direction == "backward" else 2)
    got = [float((r if direction == "forward" else r[0])[0]) for r in results]
    assert got == ([0.0, 1.0, 4.0] * 2 if direction == "forward" else [0.0, 2.0, 4.0] * 2)


def test_rows_and_results_file(tmp_path: Path) -> None:
    timing = bench.Timing(0.5, 0.1, [0.5] * 5)
    row = bench.row("layer_norm", (4, 8), torch.float32, "forward", "cpp", timing, {"copy": 100.0}, nbytes=20)
    assert (row["rate"], row["fraction"], row["unit"], row["shape"], row["dtype"]) == (40.0, 0.4, "B/s", [4, 8], "float32")
    with pytest.raises(Error, match="ceiling 'gemm' was not measured"):
        bench.row("layer_norm", (1,), torch.float32, "forward", "cpp", timing, {"copy": 1.0}, flops=1.0, ceiling="gemm")
    facts = bench.machine()
    assert facts["threads"] == torch.get_num_threads() and facts["torch"] == torch.__version__ and facts["commit"]
    path = tmp_path / "results" / "m.json"
    bench.write("layer_norm", [row], {"copy": 100.0}, facts, path)
    bench.write("gelu", [], {"copy": 90.0}, facts, path)
    bench.write("layer_norm", [row, row], {"copy": 80.0}, facts, path)
    runs = bench.read(path)["runs"]
    assert set(runs) == {"layer_norm", "gelu"} and len(runs["layer_norm"]["rows"]) == 2
    assert runs["layer_norm"]["ceilings"] == {"copy": 80.0} and runs["gelu"]["ceilings"] == {"copy": 90.0}
    assert [p.name for p in path.parent.iterdir()] == ["m.json"]


@pytest.mark.parametrize("text", ["", "[]", '{"version": 2, "runs": {}}', '{"version": 1}', "\xff"])
def test_other_results_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(LoadError, match=r"r\.json"):
        bench.read(path)


def test_results_are_named_after_the_machine() -> None:
    assert bench.results_file({"name": "Intel(R) Xeon(R) Processor @ 2.1GHz"}).name == "intel-xeon-processor-2-1ghz.json"


def test_replay_hands_the_samples_on_as_they_are() -> None:
    class Fixture:
        extra_info: dict[str, Any] = {}  # noqa: RUF012

        def pedantic(self, target: Any, rounds: int, iterations: int) -> None:
            self.seen = []
            for _ in range(rounds):
                start = replay()
                target()
                self.seen.append(replay() - start)

    replay, fixture = bench.Replay(), Fixture()
    replay.show(fixture, bench.Timing(2.0, 0.0, [1.0, 2.0, 4.0]), rate=3)
    assert fixture.seen == [1.0, 2.0, 4.0] and fixture.extra_info == {"rate": 3}


# ------------------------------------------------------------------------------------------------------------------------ proof


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Path]:
    """A checkout with the files of one op."""
    for name, text in {
        "gptfast/ops/layer_norm.py": "eager", "csrc/cpu/layer_norm.cpp": '#include "layer_norm_kernel.h"\n#include "vec.h"\n',
        "csrc/cpu/layer_norm_kernel.h": "kernel", "csrc/cpu/vec.h": '#include "check.h"\n', "csrc/check.h": "check",
        "csrc/cpu/other.h": "not included", "kernels/layer_norm.py": "triton", "kernels/_helper.py": "helper",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    yield tmp_path


def test_source_hash_follows_includes(tree: Path) -> None:
    names = [path.relative_to(tree).as_posix() for path in proof.sources("layer_norm", "cpp", tree)]
    assert names == ["csrc/check.h", "csrc/cpu/layer_norm.cpp", "csrc/cpu/layer_norm_kernel.h", "csrc/cpu/vec.h"]
    assert proof.source_hash("layer_norm", "cuda", tree) is None
    before = {name: proof.source_hash("layer_norm", name, tree) for name in ("eager", "cpp", "triton")}
    assert all(before.values()) and len(set(before.values())) == 3
    (tree / "csrc/cpu/other.h").write_text("changed")
    assert proof.source_hash("layer_norm", "cpp", tree) == before["cpp"]
    (tree / "csrc/check.h").write_text("changed")
    assert proof.source_hash("layer_norm", "cpp", tree) != before["cpp"]
    (tree / "kernels/_helper.py").write_text("changed")
    assert proof.source_hash("layer_norm", "triton", tree) != before["triton"]
    assert proof.source_hash("layer_norm", "eager", tree) == before["eager"]


def test_proof_table_and_staleness(tree: Path) -> None:
    source = proof.source_hash("layer_norm", "cpp", tree) or ""
    records = [
        proof.Record("layer_norm", "cpp", "this CPU", True, "2026-01-02", "abc", source),
        proof.Record("layer_norm", "cpp", "that CPU", True, "2026-01-01", "abb", "0" * 16),
        proof.Record("layer_norm", "cuda", "sm_90a", False, "2026-01-02", "abc", "1" * 16),
        proof.Record("layer_norm", "triton", "sm_80", False, "2026-01-02", "abc", "2" * 16),
        proof.Record("layer_norm", "triton", "interpreter", True, "2026-01-02", "abc", "2" * 16),
    ]
    rows = {row["op"]: row for row in proof.table(records, tree)}
    assert rows["layer_norm"] == {
        "op": "layer_norm", "eager": "the definition", "cpp": "this CPU 2026-01-02 abc; that CPU 2026-01-01 abb (stale)",
        "cuda": "compiled, not executed: sm_90a", "triton": "interpreter 2026-01-02 abc (stale)",
    }
    assert rows["gelu"]["cpp"] == "-"


def test_proof_file_changes_only_with_the_sources(tmp_path: Path) -> None:
    path = tmp_path / "proof.json"
    first = proof.Record("layer_norm", "cpp", "cpu", True, "2026-01-01", "abc", "1" * 16)
    assert proof.read(path) == [] and proof.write([first], path)
    text = path.read_text()
    later = proof.Record("layer_norm", "cpp", "cpu", True, "2026-02-02", "def", "1" * 16)
    assert not proof.write([later], path) and path.read_text() == text
    changed = proof.Record("layer_norm", "cpp", "cpu", True, "2026-02-02", "def", "2" * 16)
    other = proof.Record("gelu", "cpp", "cpu", True, "2026-02-02", "def", "3" * 16)
    assert proof.write([changed, other], path) and proof.read(path) == [other, changed]


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 7, "records": []}', '{"version": 1, "records": [{"op": "x"}]}'])
def test_malformed_proof_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "proof.json"
    path.write_text(text)
    with pytest.raises(LoadError, match=r"proof\.json"):
        proof.read(path)


def test_records_of_a_test_session() -> None:
    pairs = [("layer_norm", "cuda-emulated"), ("layer_norm", "cuda-build"), ("layer_norm", "cpp"), ("no_op", "cpp")]
    made = proof.from_tests(pairs)
    assert [(r.backend, r.executed) for r in made] == [("cpp", True), ("cuda", False), ("cuda", True)]
    assert made[2].where == "cpu shim" and made[0].where == proof.cpu_model() and len(made[0].source) == 16
    with pytest.raises(Error, match="unknown op"):
        proof.record("no_op", "cpp", "here")
