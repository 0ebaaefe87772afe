"""grad_norm: the definition against the formula and against PyTorch's clipping, non-finite gradients, the glue; every kernel by the
tolerance, its blocks and stretches, overflow, bits, wrong results that must not pass."""

import math

import pytest
import torch

from gptfast import backend, ops, testing
from gptfast.ops.grad_norm import eager
from gptfast.testing import LAYOUTS, Target, arrange, check_op, random, same_bits

pytestmark = pytest.mark.usefixtures("eager")


def formula_of(grads):
    assert isinstance(grads, list) and all(g.is_contiguous() for g in grads)
    norm = sum(g.to(torch.float64).pow(2).sum() for g in grads).sqrt().view(1)
    return norm, norm.isfinite().double()


def case(dtype=torch.float64):
    return [torch.randn(s).to(dtype) for s in ((3, 5), (7,), (), (0, 4), (2, 3, 4))]


def test_formula(formula):
    grads = [*case(), torch.randn(6, 4).double().t()[::2], torch.randn(1).double().expand(9)]
    norm, finite = ops.grad_norm(grads)
    with formula("grad_norm", formula_of):
        wanted = ops.grad_norm(tuple(grads))
    torch.testing.assert_close((norm, finite), wanted, rtol=1e-14, atol=0)
    assert norm.shape == finite.shape == (1,) and finite == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_torch(dtype):
    grads = case(dtype)
    norm, finite = ops.grad_norm(grads)
    assert norm.dtype == finite.dtype == torch.float32
    torch.testing.assert_close(norm[0], torch.nn.utils.get_total_norm([g.float() for g in grads]), rtol=1e-6, atol=0)


def test_16_bit_gradients_do_not_overflow():
    assert ops.grad_norm([torch.full((100,), 6e4, dtype=torch.float16)])[0] == pytest.approx(6e5, rel=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", range(5))
def test_one_non_finite_value(value, place):
    grads = case(torch.float32)
    if grads[place].numel() == 0:
        grads[place] = torch.zeros(3)
    grads[place].view(-1)[-1] = value
    norm, finite = ops.grad_norm(grads)
    assert finite == 0 and not norm.isfinite()


def test_nothing_to_measure(formula):
    for context in (backend("eager"), formula("grad_norm", formula_of)):
        with context:
            norm, finite = ops.grad_norm([])
            assert norm.tolist() == [0] and finite.tolist() == [1]
    assert ops.grad_norm([torch.zeros(0)])[0] == 0


def test_no_graph():
    assert not ops.grad_norm([torch.randn(3, requires_grad=True)])[0].requires_grad


def test_compile(compiled):
    grads = case()
    torch.testing.assert_close(compiled(lambda g: ops.grad_norm(g))(grads), ops.grad_norm(grads), rtol=1e-14, atol=0)


def test_limits_of_kernels(monkeypatch):
    monkeypatch.setitem(backend._missing, ("grad_norm", "cpp"), None)
    assert backend.supports("grad_norm", "cpp", (case(),)) == "float64; kernels take float32, bfloat16, float16"
    assert backend.supports("grad_norm", "cpp", (case(torch.bfloat16),)) is None


# ------------------------------------------------------------------------------------------------------------- kernels, by the rule

ISAS = ("plain", "avx2", "avx512")
# elements around a register, four of them, a stretch of 4096 and a block of 65536
LENGTHS = (1, 7, 15, 17, 63, 65, 130, 4095, 4097, 65535, 65537, 140001)


def check(grads, target):
    fast = check_op("grad_norm", ops.grad_norm, eager, {"grads": grads}, target, outputs=("y", "finite"), long_sums=("y",))
    assert fast["y"].shape == fast["finite"].shape == (1,)
    return fast


def ones(length, dtype=torch.float32, device="cpu"):
    """Gradients whose sum of squares is a whole number: every element counts, exactly once."""
    return [torch.ones(length, dtype=dtype, device=device)]


@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(target: Target, length):
    check([random(length, dtype=target.dtype, device=target.device)], target)
    with target.force("grad_norm"):
        assert ops.grad_norm(ones(length, target.dtype, target.device))[0].item() == pytest.approx(math.sqrt(length), rel=1e-6)


def test_lists(target: Target):
    """Small and large ones, empty ones, one that begins in the middle of a block and one that ends there."""
    shapes = ((3,), (0,), (), (65, 7), (65536,), (1,), (0, 4), (300, 301), (2, 3, 5), (0,))
    grads = [random(*shape, dtype=target.dtype, device=target.device) for shape in shapes]
    check(grads, target)
    with target.force("grad_norm"):
        norm, _ = ops.grad_norm([torch.ones_like(g) for g in grads])
    assert norm.item() == pytest.approx(math.sqrt(sum(g.numel() for g in grads)), rel=1e-6)


def test_dtypes_may_be_mixed(target: Target):
    grads = [random(500, dtype=dtype, device=target.device) for dtype in (target.dtype, *testing.checks.DTYPES.values())]
    check(grads, target)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts(target: Target, layout):
    check([arrange(random(9, 65, dtype=target.dtype, device=target.device), layout)], target)


@pytest.mark.parametrize("scale", [1e-12, 1e12, 3e18, 2e19])
def test_very_small_and_very_large_gradients(scale):
    """Squares that do not fit in fp32 give inf, as PyTorch's norm does: finite then is 0."""
    target = Target("cpp", "fp32", "cpp")
    testing.requires("cpp", target.reason("grad_norm"))
    fast = check([random(100, scale=scale), random(70000, scale=scale)], target)
    assert fast["finite"].item() == (scale < 1e18)


def test_parts_that_only_together_exceed_fp32():
    target = Target("cpp", "fp32", "cpp")
    testing.requires("cpp", target.reason("grad_norm"))
    part = torch.zeros(70000)
    part[0] = 1.5e19
    assert check([part], target)["finite"] == 1
    assert check([part, part], target)["finite"] == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 17, 4096, 65536, 70000])
def test_not_finite(target: Target, value, place):
    grads = [random(9, dtype=target.dtype), random(70001, dtype=target.dtype, device=target.device)]
    grads[1][place] = value
    assert check(grads, target)["finite"] == 0


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_instruction_set(isa, precision):
    target = Target("cpp", precision, "cpp")
    with testing.forced_isa(isa):
        for length in (1, 15, 33, 4103, 66000):
            check([random(length, dtype=target.dtype), random(70, dtype=target.dtype)], target)
            assert ops.grad_norm(ones(length, target.dtype))[0].item() == pytest.approx(math.sqrt(length), rel=1e-6)


@pytest.mark.parametrize("isa", ISAS)
def test_bits_do_not_depend_on_threads(isa):
    results, threads, grads = [], torch.get_num_threads(), [random(n) for n in (300001, 17, 0, 140000)]
    with testing.forced_isa(isa), backend.use(grad_norm="cpp"):
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(ops.grad_norm(grads)[0])
        finally:
            torch.set_num_threads(threads)
    assert all(same_bits(results[0], other) for other in results[1:])


def test_many_small_numbers_are_not_lost(target: Target):
    """A single fp32 sum of 2^22 equal squares would stop growing."""
    with target.force("grad_norm"):
        found = ops.grad_norm(ones(1 << 22, target.dtype, target.device) + ones(3, target.dtype, target.device))[0].double()
    testing.assert_close_to_reference(found.float(), found.float(), torch.tensor([(2**22 + 3) ** 0.5]).double(), long_sum=True)
    assert abs(found.item() - (2**22 + 3) ** 0.5) < 2e-4


def test_wrong_results_are_rejected():
    grads = [random(1000), random(50)]
    own, ref = eager(grads)[0], eager([g.double() for g in grads])[0]
    testing.assert_close_to_reference(own, own, ref, long_sum=True)
    wrongs = {
        "zero": 0 * own, "the sum of squares": own.square(), "the sum of norms": grads[0].norm() + grads[1].norm(),
        "the last tensor missing": eager(grads[:1])[0], "the last element missing": eager([grads[0][:-1], grads[1]])[0],
        "the tail twice": eager([*grads, grads[0][-8:]])[0], "the largest": torch.cat(grads).abs().max(),
    }  # fmt: skip
    for what, wrong in wrongs.items():
        testing.assert_rejected(what, wrong.view(1), own, ref, long_sum=True)


# ------------------------------------------------------------------------------------------------------ dispatcher, compile, errors


def test_opcheck():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    torch.library.opcheck(torch.ops.gptfast.grad_norm.default, ([torch.randn(3, 5), torch.randn(7).bfloat16()],))


def test_leaf_checks_its_contract():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    strided, double = torch.randn(4, 6)[:, ::2], torch.ones(3).double()
    for grads, message in (([strided], "not contiguous"), ([torch.ones(2), double], "allowed: fp32, bf16, fp16")):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.gptfast.grad_norm(grads)


def test_compile_sees_the_choice(compiled):
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    grads = case(torch.float32)
    function = compiled(lambda g: ops.grad_norm(g))
    for name in ("cpp", "eager", "cpp"):
        with backend.use(grad_norm=name):
            assert all(same_bits(a, b) for a, b in zip(function(grads), ops.grad_norm(grads), strict=True))
