"""cross_entropy_: loss, the gradient it leaves behind and the gradient it hands on, against cross_entropy; every kernel by the
tolerance, its blocks and tails, non-finite rows, bits, the form that fused heads call, wrong results that must not pass."""

import ctypes
import math
import subprocess

import pytest
import torch

from gptfast import Error, backend, ops, testing
from gptfast.ops.cross_entropy_ import eager
from gptfast.testing import Target, arrange, check_op, random, same_bits

pytestmark = pytest.mark.usefixtures("eager")
TARGETS = torch.tensor([3, -100, 0, 5, -100, 8, 8, 1])
SCALE = torch.tensor([0.37])


def formula_of(logits, targets, ignore_index, vocab, scale):
    assert logits.dim() == 2 and logits.is_contiguous() and scale.shape == (1,)
    ignored = targets == ignore_index
    lse = logits[:, :vocab].logsumexp(1)
    loss = torch.where(ignored, 0, lse - logits.gather(1, torch.where(ignored, 0, targets)[:, None])[:, 0])
    columns = torch.arange(logits.shape[1])
    p = (torch.exp(logits - lse[:, None]) - (columns == targets[:, None]).to(logits.dtype)) * scale
    logits.copy_(torch.where(ignored[:, None] | (columns >= vocab), 0, p))
    return loss


def pure(x, weight, targets, scale, reduction):
    loss = ops.cross_entropy(x @ weight, targets, vocab=9, reduction=reduction)
    return loss if scale is None else loss * scale.double() if reduction == "none" else loss * scale.double()[0]


def in_place(x, weight, targets, scale, reduction):
    return ops.cross_entropy_(x @ weight, targets, vocab=9, scale=scale, reduction=reduction)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("scale", [None, SCALE])
@pytest.mark.parametrize("upstream", ["dense", "expanded"])
@pytest.mark.parametrize("which", ["eager", "formula"])
def test_equals_cross_entropy(formula, same, reduction, scale, upstream, which):
    inputs = [torch.randn(8, 5).double(), torch.randn(5, 13).double(), TARGETS, scale, reduction]
    with backend("eager") if which == "eager" else formula("cross_entropy_", formula_of):
        same(in_place, pure, inputs, [True, True, False, False, False], upstream)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_left_in_the_logits(dtype):
    logits = torch.randn(8, 13).to(dtype)
    leaf = logits.clone().requires_grad_()
    wanted = ops.cross_entropy(leaf, TARGETS, vocab=9, reduction="sum") * SCALE[0]
    loss = ops.cross_entropy_(logits, TARGETS, vocab=9, scale=SCALE)
    torch.testing.assert_close(loss, wanted.detach())
    torch.testing.assert_close(logits, torch.autograd.grad(wanted, leaf)[0])
    assert not logits[:, 9:].any() and not logits[TARGETS == -100].any()


def test_gradient_is_the_memory_of_the_logits_and_goes_out_once():
    x = torch.randn(8, 13, requires_grad=True)
    logits = x * 1
    loss = ops.cross_entropy_(logits, TARGETS)
    address = []
    logits_grad = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    address.append(logits_grad.data_ptr() == logits.data_ptr())
    assert address == [True]
    with pytest.raises(Error, match="cross_entropy_: a second backward"):
        loss.backward()


def test_an_op_that_still_needs_the_logits_notices():
    x = torch.randn(8, 13, requires_grad=True)
    logits = x.exp()  # its backward reads its result
    loss = ops.cross_entropy_(logits, TARGETS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("which", ["eager", "formula"])
def test_all_ignored(formula, which):
    x = torch.randn(3, 9, requires_grad=True)
    with backend("eager") if which == "eager" else formula("cross_entropy_", formula_of):
        loss = ops.cross_entropy_(x * 1, torch.full((3,), -100))
        assert loss == 0 and not torch.autograd.grad(loss, x)[0].any()
        assert ops.cross_entropy_(x * 1, torch.full((3,), -100), reduction="mean").isnan()


@pytest.mark.parametrize("shape", [(0, 9), (2, 0, 9), (9,), (1, 1)])
def test_sizes(same, shape):
    inputs = [torch.randn(shape).double(), torch.zeros(shape[:-1], dtype=torch.int64)]
    same(lambda x, t: ops.cross_entropy_(x * 1, t), lambda x, t: ops.cross_entropy(x, t, reduction="sum"), inputs)


@pytest.mark.parametrize("which", ["eager", "formula"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_compile(formula, compiled, same, which, reduction):
    inputs = [torch.randn(8, 5).double(), torch.randn(5, 13).double(), TARGETS, SCALE, reduction]
    with backend("eager") if which == "eager" else formula("cross_entropy_", formula_of):
        same(compiled(in_place), pure, inputs, [True, True, False, False, False])


def test_bad_input():
    x = torch.randn(8, 13, requires_grad=True)
    with pytest.raises(Error, match="logits is a leaf that requires grad"):
        ops.cross_entropy_(x, TARGETS)
    with pytest.raises(Error, match=r"logits have strides \(1, 8\)"):
        ops.cross_entropy_(torch.randn(13, 8).t(), TARGETS)
    for scale in (torch.ones(2), torch.ones(1, dtype=torch.int64), torch.ones(1, requires_grad=True)):
        with pytest.raises(Error, match="cross_entropy_: scale is"):
            ops.cross_entropy_(x * 1, TARGETS, scale=scale)


# ------------------------------------------------------------------------------------------------------------- kernels, by the rule

ISAS = ("plain", "avx2", "avx512")
# columns around a register, four of them and a block of 1024
COLUMNS = (1, 3, 16, 17, 63, 65, 130, 1023, 1025, 2100)


def leaf(logits, targets, ignore_index, vocab, scale):
    name = backend.choose("cross_entropy_", logits)
    return backend.impl("cross_entropy_", name).forward(logits, targets, ignore_index, vocab, scale)


def parts(targets, vocab, ignore_index=-100):
    """Target columns, other real columns of rows that count, padded columns and ignored rows, to be compared apart."""
    counted = targets != ignore_index

    def split(gradient):
        hit = torch.arange(vocab, device=gradient.device) == targets[:, None]
        real = gradient[counted, :vocab]
        rest = {"padding": gradient[:, vocab:], "ignored": gradient[~counted]}
        return {"target": real[hit[counted]], "others": real[~hit[counted]], **rest}

    return split


def sample(rows, columns, dtype, device="cpu", vocab=None, layout="contiguous", kind=torch.int64, scale=0.37):
    size = columns if vocab is None else vocab
    targets = torch.randint(0, size, (rows,), dtype=kind, device=device)
    targets[1::5] = -100
    logits = arrange(random(rows, columns, dtype=dtype, device=device, scale=3.0), layout)
    factor = torch.full((1,), scale, device=device)
    return {"logits": logits, "targets": targets, "ignore_index": -100, "vocab": size, "scale": factor}


def check(inputs, target):
    slices = {"logits": parts(inputs["targets"], inputs["vocab"])}
    fast = check_op("cross_entropy_", leaf, eager, inputs, target, slices=slices, mutates=("logits",))
    assert not fast["logits"][:, inputs["vocab"] :].any() and not fast["logits"][1::5].any()
    return fast


@pytest.mark.parametrize("columns", COLUMNS)
def test_columns(target: Target, columns):
    check(sample(6, columns, target.dtype, target.device), target)
    check(sample(3, columns, target.dtype, target.device, vocab=max(1, columns - 5), kind=torch.int32, layout="offset"), target)


def test_the_vocabulary_of_gpt2(target: Target):
    columns, vocab = (1100, 1057) if target.proof == "triton-interpret" else (50304, 50257)
    check(sample(5, columns, target.dtype, target.device, vocab=vocab, scale=-2.5), target)


def test_no_rows(target: Target):
    check(sample(0, 9, target.dtype, target.device), target)


@pytest.mark.parametrize("order", ["rising", "falling", "far from zero"])
def test_a_maximum_that_moves_from_block_to_block(target: Target, order):
    inputs = sample(6, 2100, target.dtype, target.device, vocab=2090)
    ramp = torch.linspace(-40, 40, 2100) * {"rising": 1, "falling": -1, "far from zero": 0}[order]
    inputs["logits"] += (ramp if "zero" not in order else ramp - 90).to(inputs["logits"])
    check(inputs, target)


@pytest.mark.parametrize("place", [0, 18, 1029])
def test_rows_that_are_not_finite(target: Target, place):
    inputs = sample(9, 1030, target.dtype, target.device)
    inputs["targets"] = torch.tensor([3, -100, 3, place, 3, place, -100, 3, 3], device=target.device)
    for row, value in ((0, math.inf), (1, math.inf), (2, math.nan), (3, -math.inf), (4, -math.inf)):
        inputs["logits"][row, place] = value
    inputs["logits"][5:7] = -math.inf
    inputs["logits"][7, 4:] = -math.inf
    fast = check(inputs, target)
    assert fast["y"][[0, 2, 5]].isnan().all() and fast["y"][3] == math.inf and fast["logits"][[0, 2, 5]].isnan().all()


@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
def test_a_target_outside_the_vocabulary_gives_a_nan_row(target: Target, kind):
    logits = random(5, 24, dtype=target.dtype, device=target.device)
    targets = torch.tensor([2, -1, 20, 23, 19], dtype=kind, device=target.device)
    loss = backend.impl("cross_entropy_", target.backend).forward(logits, targets, -100, 20, torch.ones(1, device=target.device))
    assert loss.isnan().tolist() == [False, True, True, True, False]
    assert logits[1:4, :20].isnan().all() and logits[[0, 4]].isfinite().all() and not logits[:, 20:].any()


def test_the_front_door(target: Target):
    """Loss and gradient as handed on through a product, by the rule."""
    inputs = {"x": random(8, 5, dtype=target.dtype, device=target.device).requires_grad_(), "targets": TARGETS.to(target.device)}
    weight = random(5, 13, device=target.device)

    def front(x, targets, op):
        wide = torch.promote_types(x.dtype, torch.float32)
        return op(x.to(wide) @ weight.to(wide), targets)

    check_op(
        "cross_entropy_", lambda **a: front(**a, op=lambda y, t: ops.cross_entropy_(y, t, vocab=9, reduction="mean")),
        lambda **a: front(**a, op=lambda y, t: ops.cross_entropy(y, t, vocab=9)), inputs, target,
    )  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_instruction_set(isa, precision):
    target = Target("cpp", precision, "cpp")
    with testing.forced_isa(isa):
        for columns, vocab in ((1, 1), (7, 5), (16, 16), (41, 37), (70, 64), (1100, 1061)):
            check(sample(6, columns, target.dtype, vocab=vocab), target)
        check(sample(2, 50304, target.dtype, vocab=50257, scale=-2.5), target)  # as many terms as there are to sum


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_threads(isa, dtype):
    results, threads, inputs = [], torch.get_num_threads(), sample(50, 3001, dtype)
    with testing.forced_isa(isa), backend.use(cross_entropy_="cpp"):
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                fresh = {name: testing.copy_of(value) for name, value in inputs.items()}
                results.append(testing.evaluate(leaf, fresh, mutates=("logits",)))
        finally:
            torch.set_num_threads(threads)
    for name, value in results[0].items():
        assert all(same_bits(value, other[name]) for other in results[1:]), name


HEAD = r"""
#define GPTFAST_ISA plain
#include "cpu/cross_entropy_kernel.h"
extern "C" void head(int type, const float* logits, long logits_stride, void* gradient, long gradient_stride, const long* targets,
                     long rows, long vocab, long columns, const float* factor, float* loss, float* lse, float* scratch) {
  using namespace gptfast::cpu;
  CrossEntropy args{Type::fp32, static_cast<Type>(type), logits, logits_stride, gradient, gradient_stride, false, targets, true,
                    -100, vocab, columns, factor, 1, loss, lse};
  plain::cross_entropy_forward_backward(args, 1, rows, scratch);
}
"""


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """The kernel as a fused head calls it, compiled by itself."""
    folder = tmp_path_factory.mktemp("head")
    (folder / "head.cpp").write_text(HEAD)
    flags = ["-O1", "-std=c++20", "-shared", "-fPIC", f"-I{testing.session.ROOT / 'csrc'}"]
    subprocess.run([*testing.cxx(), *flags, folder / "head.cpp", "-o", folder / "head.so"], check=True)
    return ctypes.CDLL(str(folder / "head.so")).head


@pytest.mark.parametrize("code", [0, 1, 2], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("with_lse", [True, False])
def test_fp32_logits_with_a_gradient_elsewhere(head, code, with_lse):
    """Rows with strides, a factor for each, and what fused heads need: logits stay, the gradient has another type and place."""
    dtype = (torch.float32, torch.bfloat16, torch.float16)[code]
    rows, vocab, columns = 7, 1040, 1051
    wide, targets = torch.randn(rows, 1060), torch.randint(0, vocab, (rows,))
    targets[2], targets[3], targets[4] = -100, vocab, vocab - 1
    gradient, factor = torch.full((rows, 1055), 7.0, dtype=dtype), torch.randn(rows)
    loss, lse, scratch, before = torch.full((rows,), 7.0), torch.full((rows,), 7.0), torch.empty(vocab + 48), wide.clone()
    pointer = [ctypes.c_void_p(t.data_ptr()) for t in (wide, gradient, targets, factor, loss, lse, scratch)]
    sizes = [ctypes.c_long(n) for n in (rows, vocab, columns)]
    places = (pointer[0], ctypes.c_long(wide.stride(0)), pointer[1], ctypes.c_long(gradient.stride(0)))
    head(code, *places, pointer[2], *sizes, pointer[3], pointer[4], pointer[5] if with_lse else None, pointer[6])
    assert same_bits(wide, before) and (gradient[0] == 7).all() and (gradient[:, columns:] == 7).all() and loss[0] == lse[0] == 7
    assert not gradient[1:, vocab:columns].any() and not gradient[2, :columns].any() and loss[2] == 0
    assert gradient[3, :vocab].isnan().all() and loss[3].isnan()
    real = torch.tensor([1, 4, 5, 6])
    x, wanted = wide[real, :vocab], targets[real]
    results = []
    for kind in (torch.float32, torch.float64):
        z = x.to(kind).requires_grad_()
        y = torch.nn.functional.cross_entropy(z, wanted, reduction="none")
        results.append((y.detach(), torch.autograd.grad(y, z, factor[real].to(kind))[0], z.detach().logsumexp(1)))
    (own, own_gradient, own_lse), (ref, ref_gradient, ref_lse) = results
    testing.assert_close_to_reference(loss[real], own, ref, name="loss")
    split = parts(wanted, vocab)
    found, own_gradient = gradient[real, :vocab], own_gradient.to(dtype)
    testing.assert_close_to_reference(found, own_gradient, ref_gradient, name="gradient", gradient=True, slices=split)
    if with_lse:
        testing.assert_close_to_reference(lse[real], own_lse, ref_lse, name="lse", long_sum=True)
        assert lse[1:].isfinite().all()
    else:
        assert (lse == 7).all()


WRONG = {
    "without scale": lambda g, x, t, s: g / s,
    "without the target's term": lambda g, x, t, s: g + torch.nn.functional.one_hot(t, x.shape[1]) * s,
    "the last column is not in the sum": lambda g, x, t, s: g * (1 + x.softmax(1)[:, -1:]),
    "logits left in the last block": lambda g, x, t, s: torch.cat([g[:, :32], x[:, 32:]], 1),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_wrong_results_are_rejected(precision):
    dtype = testing.checks.DTYPES[precision]
    inputs = sample(9, 40, dtype) | {"targets": torch.arange(9)}
    right = testing.evaluate(eager, {k: testing.copy_of(v) for k, v in inputs.items()}, mutates=("logits",))
    exact = {name: testing.checks.in_double(value) for name, value in inputs.items()}
    ref = testing.evaluate(eager, exact, mutates=("logits",))
    gradient, split = right["logits"], parts(inputs["targets"], 40)
    testing.assert_close_to_reference(gradient, gradient, ref["logits"], slices=split)
    wrongs = testing.wrong_results(gradient)
    wrongs |= {k: f(gradient.float(), inputs["logits"].float(), inputs["targets"], 0.37).to(dtype) for k, f in WRONG.items()}
    for what, wrong in wrongs.items():
        testing.assert_rejected(what, wrong, gradient, ref["logits"], slices=split)
    for what, wrong in testing.wrong_results(right["y"][None]).items():
        testing.assert_rejected(f"loss: {what}", wrong[0], right["y"], ref["y"])


# ------------------------------------------------------------------------------------------------------ dispatcher, compile, errors


def test_opcheck():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    for dtype, kind in ((torch.float32, torch.int64), (torch.bfloat16, torch.int32)):
        arguments = (random(5, 33, dtype=dtype), torch.arange(5, dtype=kind), -100, 30, torch.ones(1))
        torch.library.opcheck(torch.ops.gptfast.cross_entropy_.default, arguments)


def test_leaf_checks_its_contract():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    x, t, one = torch.randn(4, 6), torch.arange(4), torch.ones(1)
    for arguments, message in (
        ((torch.randn(4, 12)[:, ::2], t, -100, 6, one), "logits is not contiguous"),
        ((x, t.short(), -100, 6, one), "targets is Short"),
        ((x, t, -100, 7, one), "vocab is 7"),
        ((x, t, -100, 6, torch.ones(2)), "scale has shape"),
        ((x, t, -100, 6, one.double()), "scale is Double"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.gptfast.cross_entropy_(*arguments)


def test_compile_sees_the_choice(compiled):
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    x, weight = torch.randn(8, 5, requires_grad=True), torch.randn(5, 13)
    function = compiled(lambda x: ops.cross_entropy_(x @ weight, TARGETS, vocab=9))
    for name in ("cpp", "eager", "cpp"):
        with backend.use(cross_entropy_=name):
            losses = function(x), ops.cross_entropy_(x @ weight, TARGETS, vocab=9)
            assert same_bits(*losses)
            assert same_bits(*(torch.autograd.grad(loss, x)[0] for loss in losses))
