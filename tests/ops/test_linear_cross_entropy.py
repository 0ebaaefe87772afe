"""linear_cross_entropy: the definition against linear and cross_entropy, the glue of kernels that know gradients in forward."""

import pytest
import torch

from gptfast import Error, backend, ops, testing
from gptfast.ops.linear_cross_entropy import eager, pieces
from gptfast.testing import LAYOUTS, Target, arrange, check_op, random

pytestmark = pytest.mark.usefixtures("eager")
TARGETS = torch.tensor([[3, -100, 0, 5], [-100, 8, 8, 1]])
SCALE = torch.tensor([0.37])


def formula_of(x, weight, targets, ignore_index, vocab, scale, chunks, need_grad):
    assert x.dim() == 2 and x.is_contiguous() and weight.is_contiguous() and scale.shape == (1,) and isinstance(need_grad, bool)
    dx, dweight, losses, lses = torch.zeros_like(x), torch.zeros_like(weight), [], []
    for rows, gradient, wanted in zip(x.tensor_split(chunks), dx.tensor_split(chunks), targets.tensor_split(chunks), strict=True):
        ignored = wanted == ignore_index
        logits = rows @ weight[:vocab].t()
        lses.append(logits.logsumexp(1))
        onehot = torch.arange(vocab) == wanted[:, None]
        losses.append(torch.where(ignored, 0, lses[-1] - (logits * onehot).sum(1)))
        p = torch.where(ignored[:, None], 0, torch.exp(logits - lses[-1][:, None]) - onehot.to(x.dtype)) * scale
        gradient.copy_(p @ weight[:vocab])
        dweight[:vocab] += p.t() @ rows
    return torch.cat(losses), torch.cat(lses), dx if need_grad else None, dweight if need_grad else None


def composed(x, weight, targets, ignore_index=-100, vocab=None, scale=None, reduction="mean", chunks=8):
    loss = ops.cross_entropy(ops.linear(x, weight), targets, ignore_index, vocab, reduction)
    return loss if scale is None else loss * scale if reduction == "none" else loss * scale[0]


def case(reduction="sum", scale=None, vocab=9, chunks=3):
    return [torch.randn(2, 4, 5).double(), torch.randn(13, 5).double(), TARGETS, -100, vocab, scale, reduction, chunks]


WANTED = [True, True, *[False] * 6]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("scale", [None, SCALE.double()])
@pytest.mark.parametrize("vocab", [None, 9])
def test_definition(same, reduction, scale, vocab):
    same(ops.linear_cross_entropy, composed, case(reduction, scale, vocab), WANTED)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("scale", [None, SCALE.double()])
@pytest.mark.parametrize("chunks", [1, 3, 100])
def test_formula(formula, same, reduction, scale, chunks):
    with formula("linear_cross_entropy", formula_of):
        same(ops.linear_cross_entropy, eager, case(reduction, scale, chunks=chunks), WANTED)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_formula_without_gradients(formula, reduction):
    inputs, seen = case(reduction, SCALE), []
    with formula("linear_cross_entropy", lambda *a: (seen.append(a[-1]), formula_of(*a))[1]):
        torch.testing.assert_close(ops.linear_cross_entropy(*inputs), eager(*inputs))
    assert seen == [False]


@pytest.mark.parametrize("one", range(2))
def test_gradient_of_one_input(formula, same, one):
    with formula("linear_cross_entropy", formula_of):
        same(ops.linear_cross_entropy, eager, case(), [i == one for i in range(8)])


def test_strided_inputs(formula, same):
    def through(op):
        return lambda x, w: op(x.transpose(0, 1)[..., ::2], w.t(), TARGETS.t(), reduction="sum")

    with formula("linear_cross_entropy", formula_of):
        same(through(ops.linear_cross_entropy), through(eager), [torch.randn(2, 4, 10).double(), torch.randn(5, 13).double()])


def test_second_backward_is_refused(formula):
    x, weight, *rest = case()
    x.requires_grad_()
    with formula("linear_cross_entropy", formula_of):
        loss = ops.linear_cross_entropy(x, weight, *rest)
    loss.backward(retain_graph=True)
    with pytest.raises(Error, match="linear_cross_entropy: a second backward"):
        loss.backward()


@pytest.mark.parametrize("which", ["eager", "formula"])
def test_all_ignored(formula, which):
    x, weight = torch.randn(3, 5, requires_grad=True), torch.randn(9, 5, requires_grad=True)
    with backend("eager") if which == "eager" else formula("linear_cross_entropy", formula_of):
        loss = ops.linear_cross_entropy(x, weight, torch.full((3,), -100), reduction="sum")
        assert loss == 0 and not any(g.any() for g in torch.autograd.grad(loss, (x, weight)))
        assert ops.linear_cross_entropy(x, weight, torch.full((3,), -100)).isnan()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (5,), (1, 1)])
def test_sizes(formula, same, shape):
    targets = torch.zeros(shape[:-1], dtype=torch.int64)
    inputs = [torch.randn(shape).double(), torch.randn(9, shape[-1]).double(), targets, -100, None, None, "sum", 2]
    with formula("linear_cross_entropy", formula_of):
        same(ops.linear_cross_entropy, eager, inputs, WANTED)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction):
    x, weight, *rest = case(reduction, SCALE)
    assert torch.autograd.gradcheck(lambda *a: ops.linear_cross_entropy(*a, *rest), (x.requires_grad_(), weight.requires_grad_()))


def test_autocast_and_dtypes(formula):
    x, weight = torch.randn(2, 4, 5, requires_grad=True), torch.randn(13, 5, requires_grad=True)
    seen = []
    for context in (backend("eager"), formula("linear_cross_entropy", lambda *a: (
            seen.extend(t.dtype for t in a[:2]), formula_of(a[0].float(), a[1].float(), *a[2:]))[1])):
        with context, torch.autocast("cpu", torch.bfloat16):
            loss = ops.linear_cross_entropy(x, weight, TARGETS)
            logits = torch.nn.functional.linear(x, weight)
        assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
        torch.testing.assert_close(loss, ops.cross_entropy(logits, TARGETS), rtol=1e-2, atol=0)
        assert [g.dtype for g in torch.autograd.grad(loss, (x, weight))] == [torch.float32] * 2
    assert seen == [torch.bfloat16] * 2


@pytest.mark.parametrize("which", ["eager", "formula"])
def test_compile(formula, compiled, same, which):
    with backend("eager") if which == "eager" else formula("linear_cross_entropy", formula_of):
        same(compiled(lambda *a: ops.linear_cross_entropy(*a)), composed, case("mean", SCALE.double()), WANTED)


def test_kernels_have_no_gradients_of_each_loss(monkeypatch):
    monkeypatch.setitem(backend._missing, ("linear_cross_entropy", "cpp"), None)
    x, weight = torch.randn(3, 5, requires_grad=True), torch.randn(9, 5)
    with backend(linear_cross_entropy="cpp"), pytest.raises(Error, match='cannot run: gradients of reduction "none"'):
        ops.linear_cross_entropy(x, weight, torch.zeros(3, dtype=torch.int64), reduction="none")
    with backend("cpp"):
        assert ops.linear_cross_entropy(x, weight, torch.zeros(3, dtype=torch.int64), reduction="none").shape == (3,)


def test_bad_input():
    x, weight, targets, *_ = case()
    with pytest.raises(Error, match=r"weight has shape \(13, 4\), x \(2, 4, 5\)"):
        ops.linear_cross_entropy(x, weight[:, :4], targets)
    with pytest.raises(Error, match="chunks is 0; allowed: 1 and more"):
        ops.linear_cross_entropy(x, weight, targets, chunks=0)
    with pytest.raises(Error, match="linear_cross_entropy: scale is"):
        ops.linear_cross_entropy(x, weight, targets, scale=torch.ones(2))


# ----------------------------------------------------------------------------------------------------------------- by the tolerance


def operands(target, rows, columns, vocab, padded=None, layout="contiguous", ignored=1, **more):
    """Arguments of a case, every third target from `ignored` on being ignored; x and weight require grad."""
    x = arrange(random(rows, columns, dtype=target.dtype), layout)
    weight = random(padded or vocab, columns, dtype=target.dtype)
    targets = torch.randint(0, vocab, (rows,))
    targets[ignored::3] = -100
    given = {"x": x.requires_grad_(), "weight": weight.requires_grad_(), "targets": targets, "vocab": vocab, "reduction": "sum"}
    return given | more


def slices(vocab):
    return {"dweight": lambda t: {"real": t[:vocab], "padding": t[vocab:]}}


def check(inputs, target, **more):
    more |= {"long_sums": {"y", "dx", "dweight"}, "slices": slices(inputs["vocab"])}
    checked = check_op("linear_cross_entropy", ops.linear_cross_entropy, eager, inputs, target, **more)
    if "dweight" in checked:
        assert not checked["dweight"][inputs["vocab"] :].any()
    return checked


@pytest.mark.parametrize("chunks", [1, 2, 7, 100, None])
@pytest.mark.parametrize("shape", [(1, 1, 2), (5, 7, 9), (33, 65, 129), (9, 16, 1025)], ids=str)
def test_shapes(target: Target, shape, chunks):
    check(operands(target, *shape, chunks=chunks), target)


@pytest.mark.parametrize("vocab", [1, 50, 63, 64])
def test_padded_vocabulary(target: Target, vocab):
    check(operands(target, 11, 24, vocab, padded=64, chunks=2), target)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts(target: Target, layout):
    check(operands(target, 6, 33, 40, layout=layout, chunks=2), target, grad_layout="contiguous")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_scale_mean_and_integer_types(target: Target, reduction, kind):
    inputs = operands(target, 9, 24, 40, scale=torch.tensor([0.37]), chunks=2) | {"reduction": reduction}
    inputs["targets"] = inputs["targets"].to(kind)
    check(inputs, target)


def test_no_rows(target: Target):
    check(operands(target, 0, 24, 40, padded=64), target)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_gradients(target: Target, reduction):
    inputs = operands(target, 9, 24, 40, padded=64, chunks=2) | {"reduction": reduction}
    inputs["x"], inputs["weight"] = inputs["x"].detach(), inputs["weight"].detach()
    assert set(check(inputs, target)) == {"y"}


def test_a_width_of_gpt2(target: Target):
    check(operands(target, 5, 768, 2000, padded=2048), target)


@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_instruction_set(isa, precision):
    target = Target("cpp", precision, "cpp")
    with testing.forced_isa(isa):
        check(operands(target, 17, 33, 70, padded=96, chunks=3), target)


def test_a_target_outside_the_vocabulary_gives_a_nan_loss():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    x, weight, targets = torch.randn(4, 5), torch.randn(9, 5), torch.tensor([1, 9, -1, -100])
    loss, _, dx, dweight = torch.ops.gptfast.linear_cross_entropy(x, weight, targets, -100, 9, torch.ones(1), 1, True)
    assert loss.isnan().tolist() == [False, True, True, False]
    assert dx.isnan().any(1).tolist() == [False, True, True, False] and dweight.isnan().all()


def test_padding_takes_no_part_whatever_x_holds():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    x = torch.randn(4, 5)
    x[1] = torch.nan
    for chunks in (1, 2):
        arguments = (x, torch.randn(16, 5), torch.zeros(4, dtype=torch.int64), -100, 9, torch.ones(1), chunks, True)
        dweight = torch.ops.gptfast.linear_cross_entropy(*arguments)[3]
        assert dweight[:9].isnan().all() and not dweight[9:].any()


def test_pieces_are_bounded_by_the_memory_of_their_logits():
    weight = torch.empty(50304, 1, dtype=torch.bfloat16)
    assert [pieces(torch.empty(n, 1, dtype=torch.bfloat16), weight) for n in (0, 1, 1024, 1334, 1335, 16384)] == [1, 1, 1, 1, 2, 13]
    assert pieces(torch.empty(1024, 1), weight) == 2


def test_opcheck():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, targets = random(6, 7, dtype=dtype), random(16, 7, dtype=dtype), torch.randint(0, 11, (6,))
        for chunks, need_grad in ((1, True), (2, True), (2, False)):
            arguments = (x, weight, targets, -100, 11, torch.ones(1), chunks, need_grad)
            torch.library.opcheck(torch.ops.gptfast.linear_cross_entropy.default, arguments)


def test_leaf_checks_its_contract():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    x, weight, targets, one = torch.randn(4, 6), torch.randn(9, 6), torch.zeros(4, dtype=torch.int64), torch.ones(1)
    for arguments, message in (
        ((x, weight[:, :5], targets, -100, 9, one, 1, True), "weight has shape"),
        ((x, weight.bfloat16(), targets, -100, 9, one, 1, True), "weight is"),
        ((x, weight, targets[:3], -100, 9, one, 1, True), "targets has shape"),
        ((x, weight, targets, -100, 10, one, 1, True), "vocab is 10"),
        ((x, weight, targets, -100, 9, one.double(), 1, True), "scale is"),
        ((x, weight, targets, -100, 9, one, 0, True), "chunks is 0"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.gptfast.linear_cross_entropy(*arguments)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_wrong_results_are_rejected(precision):
    inputs = operands(Target("cpp", precision, "cpp"), 20, 24, 40)
    own = testing.evaluate(eager, inputs, upstream={"y": torch.ones(())})
    exact = {name: testing.checks.in_double(value) for name, value in inputs.items()}
    ref = testing.evaluate(eager, exact, upstream={"y": torch.ones(()).double()})
    wrong_inputs = {
        "one row missing": inputs | {"targets": torch.where(torch.arange(20) == 18, -100, inputs["targets"])},
        "ignored rows counted": inputs | {"targets": inputs["targets"].clamp(min=0)},
        "one column too few": inputs | {"vocab": 39, "targets": inputs["targets"].clamp(max=38)},
        "scale ignored": inputs | {"scale": torch.tensor([0.5])},
    }
    for name in ("dx", "dweight"):
        for what, wrong in testing.wrong_results(own[name]).items():
            testing.assert_rejected(f"{name}: {what}", wrong, own[name], ref[name], gradient=True, long_sum=True)
    for what, changed in wrong_inputs.items():
        found = testing.evaluate(eager, changed, upstream={"y": torch.ones(())})
        for name, value in own.items():
            testing.assert_rejected(f"{name}: {what}", found[name], value, ref[name], gradient=name != "y", long_sum=True)
