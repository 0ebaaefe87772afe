"""linear: the definition against the formula, the glue, layouts, edge cases."""

import pytest
import torch

from gptfast import Error, backend, ops, testing
from gptfast.ops.linear import eager
from gptfast.testing import LAYOUTS, Target, arrange, check_op, random

pytestmark = pytest.mark.usefixtures("eager")


def forward(x, weight, bias):
    assert x.dim() == 2 and x.is_contiguous()
    y = torch.einsum("nk,mk->nm", x, weight)
    return y if bias is None else y + bias


def backward(dy, x, weight):
    assert dy.is_contiguous()
    return dy @ weight, dy.t() @ x, dy.sum(0)


@pytest.mark.parametrize("upstream", ["dense", "transposed", "expanded"])
@pytest.mark.parametrize("biased", [True, False])
def test_formula(formula, same, biased, upstream):
    inputs = [torch.randn(3, 5, 7).double(), torch.randn(4, 7).double(), torch.randn(4).double() if biased else None]
    with formula("linear", forward, backward):
        same(ops.linear, eager, inputs, upstream=upstream)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradient_of_one_input(formula, same, wanted):
    inputs = [torch.randn(5, 7).double(), torch.randn(4, 7).double(), torch.randn(4).double()]
    with formula("linear", forward, backward):
        same(ops.linear, eager, inputs, wanted)


def test_conv1d_weight_and_strided_input(formula, same):
    x, weight = torch.randn(7, 10).double(), torch.randn(7, 4).double()
    with formula("linear", forward, backward):
        same(lambda x, w: ops.linear(x.t()[::2], w.t()), lambda x, w: eager(x.t()[::2], w.t()), [x, weight])


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7), (7,), (1, 1, 7), (3, 0)])
def test_sizes(formula, same, shape):
    inputs = [torch.randn(shape).double(), torch.randn(4, shape[-1]).double(), torch.randn(4).double()]
    with formula("linear", forward, backward):
        same(ops.linear, eager, inputs)


def test_gradcheck():
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5), (4, 5), (4,))]
    assert torch.autograd.gradcheck(ops.linear, inputs)


def test_gradients_have_the_dtype_of_their_inputs(formula):
    x = torch.randn(3, 5).bfloat16().requires_grad_()
    weight, bias = torch.randn(4, 5).requires_grad_(), torch.randn(4).requires_grad_()
    for context in (backend("eager"), formula("linear", lambda x, w, b: x @ w.to(x.dtype).t(), lambda dy, x, w: (
        dy @ w.to(dy.dtype), dy.t().float() @ x.float(), dy.float().sum(0)))):
        with context:
            y = ops.linear(x, weight, bias)
            assert y.dtype == torch.bfloat16
            grads = torch.autograd.grad(y.sum(), (x, weight, bias))
            assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]


def test_autocast_casts_the_inputs(formula):
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((3, 5), (4, 5), (4,)))
    seen = []

    def watch(x, weight, bias):
        seen.extend(t.dtype for t in (x, weight, bias))
        return forward(x, weight, bias)

    with torch.autocast("cpu", torch.bfloat16):
        wanted = torch.nn.functional.linear(x, weight, bias)
        assert torch.equal(ops.linear(x, weight, bias), wanted)
        with formula("linear", watch, backward):
            y = ops.linear(x, weight, bias)
    assert seen == [torch.bfloat16] * 3 and y.dtype == torch.bfloat16
    assert [g.dtype for g in torch.autograd.grad(y.sum(), (x, weight, bias))] == [torch.float32] * 3


def test_second_derivative_is_refused_by_kernels(formula):
    x, weight = torch.randn(3, 5).double().requires_grad_(), torch.randn(4, 5).double()
    with formula("linear", forward, backward):
        (dx,) = torch.autograd.grad(ops.linear(x, weight).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_compile(formula, compiled, same):
    inputs = [torch.randn(3, 5).double(), torch.randn(4, 5).double(), torch.randn(4).double()]
    same(compiled(lambda *a: ops.linear(*a)), eager, inputs)
    torch._dynamo.reset()
    with formula("linear", forward, backward):
        same(compiled(lambda *a: ops.linear(*a)), eager, inputs)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [(((3, 5), (4, 6)), r"linear: weight has shape \(4, 6\), x \(3, 5\)"), (((3, 5), (4, 5), (5,)), r"bias has shape \(5,\)"),
     (((3, 5), (5,)), r"needed are \[M, K\]"), (((), (4, 5)), r"x \(\)")],
)
def test_bad_input(shapes, message):
    with pytest.raises(Error, match=message):
        ops.linear(*(torch.randn(s) for s in shapes))


# ----------------------------------------------------------------------------------------------------------------- by the tolerance


def operands(target, rows, inputs, outputs, layout="contiguous", conv1d=False, biased=True):
    """x, weight and bias of a case, all requiring grad; `conv1d`: the weight is the transpose of a contiguous one."""
    weight = random(outputs, inputs, dtype=target.dtype)
    weight = weight.t().contiguous().t() if conv1d else weight
    x, bias = arrange(random(rows, inputs, dtype=target.dtype), layout), random(outputs, dtype=target.dtype)
    return {"x": x.requires_grad_(), "weight": weight.requires_grad_(), "bias": bias.requires_grad_() if biased else None}


def check(inputs, target, **more):
    terms = {"y": inputs["x"].shape[-1], "dx": inputs["weight"].shape[0], "dweight": len(inputs["x"]), "dbias": len(inputs["x"])}
    long = [name for name, count in terms.items() if count > 64]
    return check_op("linear", ops.linear, eager, inputs, target, long_sums=long, **more)


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("shape", [(5, 7, 3), (1, 1, 1), (65, 33, 129), (300, 96, 40), (0, 7, 3), (2, 768, 2304)], ids=str)
def test_shapes(target: Target, shape, conv1d):
    check(operands(target, *shape, conv1d=conv1d), target)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts(target: Target, layout):
    check(operands(target, 6, 65, 17, layout), target, grad_layout=layout)


def test_without_bias(target: Target):
    check(operands(target, 9, 33, 17, biased=False), target)


@pytest.mark.parametrize("rows", [31, 32, 33, 129, 2100])
def test_the_gradient_of_the_bias_at_the_edges_of_its_blocks(target: Target, rows):
    check(operands(target, rows, 3, 19), target)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_stays_alone(target: Target, value):
    inputs = operands(target, 5, 17, 9)
    with torch.no_grad():
        inputs["x"][2, 3] = value
        with target.force("linear"):
            y = ops.linear(**inputs)
    assert not y[2].isfinite().any() and y[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_instruction_set(isa, precision):
    """Only the sums over rows are kernels of ours; the products are PyTorch's on every instruction set."""
    with testing.forced_isa(isa):
        check(operands(Target("cpp", precision, "cpp"), 70, 33, 65), Target("cpp", precision, "cpp"))


def test_the_gradient_of_the_bias_has_the_same_bits_on_any_number_of_threads():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    dy, threads, results = torch.randn(3000, 33), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(torch.ops.gptfast.linear_backward(dy, torch.ones(3000, 2), torch.ones(33, 2))[2])
    finally:
        torch.set_num_threads(threads)
    assert all(testing.same_bits(results[0], other) for other in results[1:])


def test_the_gradient_of_a_weight_has_its_strides():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    for dtype in (torch.float32, torch.bfloat16):
        dy, x = random(9, 4, dtype=dtype), random(9, 6, dtype=dtype)
        for weight in (random(4, 6, dtype=dtype), random(6, 4, dtype=dtype).t()):
            assert torch.ops.gptfast.linear_backward(dy, x, weight)[1].stride() == weight.stride()


def test_opcheck():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    for dtype in (torch.float32, torch.bfloat16):
        x, dy, bias = random(5, 7, dtype=dtype), random(5, 3, dtype=dtype), random(3, dtype=dtype)
        for weight in (random(3, 7, dtype=dtype), random(7, 3, dtype=dtype).t()):
            torch.library.opcheck(torch.ops.gptfast.linear.default, (x, weight, bias))
            torch.library.opcheck(torch.ops.gptfast.linear.default, (x, weight, None))
            torch.library.opcheck(torch.ops.gptfast.linear_backward.default, (dy, x, weight))


def test_leaf_checks_its_contract():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    x, weight = torch.randn(4, 6), torch.randn(3, 6)
    for arguments, message in (
        ((torch.randn(4, 12)[:, ::2], weight, None), "not contiguous"),
        ((x, weight.bfloat16(), None), "weight is"),
        ((x, torch.randn(3, 5), None), "weight has shape"),
        ((x, weight, torch.randn(4)), "bias has shape"),
        ((x.double(), weight.double(), None), "allowed: fp32, bf16, fp16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.gptfast.linear(*arguments)
    with pytest.raises(RuntimeError, match="dy has shape"):
        torch.ops.gptfast.linear_backward(torch.randn(4, 2), x, weight)


def test_compiled_on_two_backends(compiled):
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    function = compiled(lambda *a: ops.linear(*a))
    inputs = [torch.randn(5, 7, requires_grad=True), torch.randn(3, 7, requires_grad=True), torch.randn(3, requires_grad=True)]
    for name in ("cpp", "eager", "cpp"):
        with backend(linear=name):
            y = function(*inputs)
            assert ("_Fast" in type(y.grad_fn).__name__ or "Compiled" in type(y.grad_fn).__name__)
            found = torch.autograd.grad(y.sum(), inputs)
        wanted = torch.autograd.grad(eager(*inputs).sum(), inputs)
        torch.testing.assert_close(found, wanted)


def right_and_wrong(dtype):
    """(output name, eager's result, reference, wrong results by name) of one case."""
    x, weight, bias, dy = (random(*shape).to(dtype) for shape in ((20, 24), (17, 24), (17,), (20, 17)))
    wide = [t.double() for t in (x, weight, bias, dy)]
    y, exact = eager(x, weight, bias), eager(*wide[:3])
    yield "y", y, exact, {"bias ignored": eager(x, weight), "one term missing": eager(x[:, :-1], weight[:, :-1], bias)}
    dx, exact = dy @ weight, wide[3] @ wide[1]
    yield "dx", dx, exact, {"one term missing": dy[:, 1:] @ weight[1:]}
    dweight, exact = dy.t() @ x, wide[3].t() @ wide[0]
    yield "dweight", dweight, exact, {"one row missing": dy[:-1].t() @ x[:-1]}
    yield "dbias", dy.sum(0).view(1, -1), wide[3].sum(0).view(1, -1), {"one row missing": dy[:-1].sum(0).view(1, -1)}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_wrong_results_are_rejected(precision):
    for name, own, ref, wrong in right_and_wrong(testing.checks.DTYPES[precision]):
        rule = {"gradient": name != "y", "name": name}
        testing.assert_close_to_reference(own, own, ref, **rule)
        for what, value in (testing.wrong_results(own) | wrong).items():
            testing.assert_rejected(f"{name}: {what}", value, own, ref, **rule)
