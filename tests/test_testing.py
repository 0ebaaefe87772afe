"""The proof's own proof: the tolerance accepts what it should and no more, poison shows, a required proof cannot be skipped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gptfast import testing
from gptfast.testing import LAYOUTS, arrange, assert_close_to_reference, assert_rejected, copy_of, same_bits, session

ROOT = Path(__file__).parent.parent


def product(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A rounded result and its float64 reference."""
    ref = torch.randn(16, 40, dtype=torch.float64)
    return ref.to(dtype), ref


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_bound_is_where_the_formula_says(dtype: torch.dtype) -> None:
    """eager exact: then |fast - ref| <= c eps |ref|. An error just below passes, just above fails."""
    ref = torch.full((1, 4), 1.0, dtype=torch.float64)
    own, eps = ref.to(dtype), torch.finfo(dtype).eps
    steps = {torch.float32: 2}.get(dtype, 1)
    assert_close_to_reference((ref + steps * eps).to(dtype), own, ref)
    assert_rejected("one step more", (ref + (steps + 1) * eps).to(dtype), own, ref)


def test_long_sums_have_a_wider_bound_in_fp32_only() -> None:
    for dtype, passes in ((torch.float32, True), (torch.bfloat16, False)):
        ref = torch.ones(1, 4, dtype=torch.float64)
        fast = (ref + 8 * torch.finfo(dtype).eps).to(dtype)
        if passes:
            assert_close_to_reference(fast, ref.to(dtype), ref, long_sum=True)
        else:
            assert_rejected("8 eps", fast, ref.to(dtype), ref, long_sum=True)


def test_the_factor_is_2_and_3_for_gradients() -> None:
    ref = torch.zeros(1, 4, dtype=torch.float64)  # no relative part: only eager's own error counts
    own = torch.full((1, 4), 0.5)
    assert_close_to_reference(2 * own, own, ref)
    assert_rejected("2.1 times", 2.1 * own, own, ref)
    assert_close_to_reference(3 * own, own, ref, gradient=True)
    assert_rejected("3.1 times", 3.1 * own, own, ref, gradient=True)


def test_there_is_no_absolute_floor() -> None:
    ref = torch.full((2, 3), 1e-30, dtype=torch.float64)
    assert_rejected("zeros for tiny values", torch.zeros(2, 3), ref.float(), ref)
    zero = torch.zeros(2, 3, dtype=torch.float64)
    assert_rejected("something for exact zeros", torch.full((2, 3), 1e-38), zero.float(), zero)


def test_both_norms_count() -> None:
    ref = torch.ones(100, 100, dtype=torch.float64)
    ref[0, 0] = 1000
    everywhere = ref.float() + 2e-4  # below the largest value's allowance, above the Euclidean one
    with pytest.raises(AssertionError, match="L2 error"):
        assert_close_to_reference(everywhere, ref.float(), ref)
    once = ref.float()
    once[3, 3] += 5e-4
    with pytest.raises(AssertionError, match=r"max error.*worst at \(3, 3\)"):
        assert_close_to_reference(once, ref.float(), ref)


def test_slices_are_judged_apart() -> None:
    ref = torch.ones(4, 8, dtype=torch.float64)
    ref[:, 0] = 1e6
    fast = ref.float()
    fast[:, 1:] += 1e-2
    assert_close_to_reference(fast, ref.float(), ref)
    rule = {"slices": lambda t: {"target": t[:, :1], "other": t[:, 1:]}}
    with pytest.raises(AssertionError, match=r"y\[other\]"):
        assert_close_to_reference(fast, ref.float(), ref, **rule)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_stand_where_eager_has_them(value: float) -> None:
    own, ref = product(torch.float32)
    strange, wrong = own.clone(), own.clone()
    strange[1, 2], wrong[1, 3] = value, value
    exact = ref.clone()
    exact[1, 2] = value
    assert_close_to_reference(strange, strange, exact)
    assert_rejected("missing", own, strange, exact)
    assert_rejected("elsewhere", wrong, strange, exact)
    strange[5, 5] += 1
    assert_rejected("a wrong finite value beside it", strange, own, ref)


def test_dtype_and_shape_count() -> None:
    own, ref = product(torch.bfloat16)
    assert_rejected("dtype", own.float(), own, ref)
    assert_rejected("shape", own[:, :-1], own, ref)


def test_single_accumulator_fails_and_blocks_pass() -> None:
    """A fp32 dot product over 3,072 terms: one running sum is too coarse, sums of blocks of 128 are not. The eager result is a
    product in blocks of 256, since what `a @ b` does differs from CPU to CPU (MKL keeps one running sum on some)."""
    a, b = torch.rand(8, 3072), torch.rand(3072, 8)

    def product(block: int) -> torch.Tensor:
        total = torch.zeros(8, 8)
        for first in range(0, 3072, block):
            part = torch.zeros(8, 8)
            for k in range(first, first + block):
                part += a[:, k : k + 1] * b[k : k + 1]
            total += part
        return total

    own, ref = product(256), a.double() @ b.double()
    assert_rejected("one accumulator", product(3072), own, ref)
    assert_close_to_reference(product(128), own, ref)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(16, 40), (2, 3, 33), (5, 2)])
def test_the_general_wrong_results_are_rejected(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    ref = torch.randn(shape, dtype=torch.float64)
    own = ref.to(dtype)
    wrong = testing.wrong_results(own)
    assert set(wrong) == {"zeros", "last block unwritten", "off by one column", "stale row"}
    for what, value in wrong.items():
        assert_rejected(what, value, own, ref)


# ------------------------------------------------------------------------------------------------------------- samples and poison


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_what_they_say(layout: str) -> None:
    values = torch.randn(4, 6)
    made = arrange(values, layout)
    assert torch.equal(made, values[:1].expand(4, 6) if layout == "expanded" else values)
    facts = {
        "contiguous": made.is_contiguous() and made.data_ptr() != values.data_ptr(),
        "transposed": made.stride() == (1, 4),
        "sliced": made.stride() == (12, 2),
        "expanded": made.stride() == (0, 1),
        "offset": made.is_contiguous() and made.storage_offset() == 1,
    }
    assert facts[layout]
    copy = copy_of(made.requires_grad_())
    assert same_bits(copy, made) and copy.stride() == made.stride() and copy.requires_grad
    assert copy.storage_offset() == made.storage_offset() and copy.data_ptr() != made.data_ptr()


def test_poison_fills_and_goes_away() -> None:
    with testing.poisoned():
        assert torch.empty(1000).isnan().all()
        assert torch.empty_like(torch.zeros(3, 4, dtype=torch.bfloat16)).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_same_bits_tells_zeros_apart() -> None:
    assert same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))


def test_an_op_that_lies_is_caught() -> None:
    """check_op itself: a front door that ignores the bias, changes its input, or differs from run to run fails."""
    from gptfast.ops.layer_norm import eager

    target = testing.Target("eager", "fp32", "cpp")
    inputs = {"x": torch.randn(4, 33, requires_grad=True), "weight": torch.rand(33), "bias": torch.rand(33)}

    def ignores_bias(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return eager(x, weight)

    def writes_input(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = eager(x, weight, bias)
        bias.data.mul_(1.001)
        return y

    def unsteady(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return eager(x, weight, bias) * (1 + torch.rand(()) * 1e-3)

    for liar, message in ((ignores_bias, "max error"), (unsteady, "from run to run"), (writes_input, "bias was changed")):
        before = dict(session._rows)
        with pytest.raises(AssertionError, match=message):
            testing.check_op("layer_norm", liar, eager, inputs, target)
        assert dict(session._rows) == before


# ----------------------------------------------------------------------------------------------------------------------- session


def run_pytest(folder: Path, body: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    file = folder / "test_inner.py"
    file.write_text("from gptfast import testing\n" + body)
    command = [sys.executable, "-m", "pytest", "-p", "gptfast.testing", "-p", "no:cacheprovider", "-q", str(file), *options]
    kept = {name: value for name, value in os.environ.items() if name not in ("CI", "GPTFAST_REQUIRE")}
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True, cwd=folder, timeout=120)


SKIPS = "def test_it():\n    testing.requires('cuda', 'no device')\n"


def test_a_required_proof_cannot_be_skipped(tmp_path: Path) -> None:
    assert "1 skipped" in run_pytest(tmp_path, SKIPS).stdout
    failed = run_pytest(tmp_path, SKIPS, GPTFAST_REQUIRE="cpp, cuda")
    assert failed.returncode == 1
    assert "the proof cuda is required (GPTFAST_REQUIRE) and cannot run: no device" in failed.stdout
    wrong = run_pytest(tmp_path, SKIPS, GPTFAST_REQUIRE="cudda")
    assert wrong.returncode == 4 and "unknown proof cudda" in wrong.stderr


def test_ci_requires_what_needs_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    monkeypatch.delenv("GPTFAST_REQUIRE", raising=False)
    assert session.required() == {"cpp", "triton-interpret", "triton-aot", "cuda-build", "cuda-emulated", "browser"}
    monkeypatch.setenv("GPTFAST_REQUIRE", "")
    assert session.required() == frozenset()
    monkeypatch.delenv("CI")
    monkeypatch.delenv("GPTFAST_REQUIRE")
    assert session.required() == frozenset()


def test_a_lost_row_is_missed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    rows = ["layer_norm cpp fp32 forward", "gelu cpp fp32 forward", "gelu cuda fp32 forward"]
    (tmp_path / "tests/proof_rows.json").write_text(json.dumps({"version": 1, "rows": rows}))
    monkeypatch.setattr(session, "ROOT", tmp_path)
    monkeypatch.setattr(session, "_rows", {"layer_norm cpp fp32 forward": 3})
    monkeypatch.setenv("GPTFAST_REQUIRE", "cpp")
    assert session._missing_rows() == ["gelu cpp fp32 forward"]


def test_data_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "here.txt").write_text("x")
    monkeypatch.setenv("GPTFAST_DATA", str(tmp_path))
    assert testing.find_data("here.txt") == tmp_path / "here.txt"
    with pytest.raises(pytest.skip.Exception, match=r"data set file gpt2/vocab\.json is not in .*README"):
        testing.find_data("gpt2/vocab.json")
    monkeypatch.delenv("GPTFAST_DATA")
    with pytest.raises(pytest.skip.Exception, match="GPTFAST_DATA is not set"):
        testing.find_data("here.txt")


def test_the_repository_root_is_not_on_the_path() -> None:
    assert ROOT not in [Path(entry or ".").resolve() for entry in sys.path]


def test_importing_the_plugin_imports_no_torch() -> None:
    code = "import sys, gptfast.testing; sys.exit('torch' in sys.modules or 'triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, cwd="/").returncode == 0
