"""gelu: the definition against the formula, the glue, layouts, edge cases."""

import math

import pytest
import torch

from gptfast import Error, backend, ops, testing
from gptfast.ops.gelu import eager
from gptfast.testing import LAYOUTS, Target, arrange, check_op, random, same_bits

pytestmark = pytest.mark.usefixtures("eager")


def forward(x, bias, approximate):
    assert x.dim() == 2 and x.is_contiguous()
    u = x if bias is None else x + bias
    if approximate == "none":
        return u / 2 * (1 + torch.erf(u / math.sqrt(2)))
    return u / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))


def backward(dy, x, bias, approximate):
    assert dy.is_contiguous() and dy.shape == x.shape
    u = x if bias is None else x + bias
    if approximate == "none":
        slope = (1 + torch.erf(u / math.sqrt(2))) / 2 + u * torch.exp(-u * u / 2) / math.sqrt(2 * math.pi)
    else:
        t = torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))
        slope = (1 + t) / 2 + u / 2 * (1 - t * t) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * u * u)
    return dy * slope, (dy * slope).sum(0)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("upstream", ["dense", "transposed", "expanded"])
def test_formula(formula, same, approximate, biased, upstream):
    inputs = [torch.randn(3, 5, 7).double(), torch.randn(7).double() if biased else None, approximate]
    with formula("gelu", forward, backward):
        same(ops.gelu, eager, inputs, upstream=upstream)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_gradient_of_one_input(formula, same, wanted):
    with formula("gelu", forward, backward):
        same(ops.gelu, eager, [torch.randn(5, 7).double(), torch.randn(7).double()], wanted)


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7), (7,), (1, 1), (3, 0)])
def test_sizes(formula, same, shape):
    with formula("gelu", forward, backward):
        same(ops.gelu, eager, [torch.randn(shape).double(), torch.randn(shape[-1]).double()])


def test_strided_and_expanded_inputs(formula, same):
    x = torch.randn(6, 4, 10).double()
    with formula("gelu", forward, backward):
        same(lambda x: ops.gelu(x.transpose(0, 1)[..., ::2]), lambda x: eager(x.transpose(0, 1)[..., ::2]), [x])
        same(lambda x: ops.gelu(x[:1].expand(6, 4, 10)), lambda x: eager(x[:1].expand(6, 4, 10)), [x])


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gradcheck(approximate):
    inputs = [torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64, requires_grad=True)]
    assert torch.autograd.gradcheck(lambda x, b: ops.gelu(x, b, approximate), inputs)


def test_dtypes(formula):
    x, bias = torch.randn(3, 5).bfloat16().requires_grad_(), torch.randn(5).requires_grad_()
    for context in (backend("eager"), formula("gelu", lambda *a: forward(*a).to(a[0].dtype), lambda *a: (
        backward(*a)[0].to(a[0].dtype), backward(*a)[1].float()))):
        with context, torch.autocast("cpu", torch.float16):
            y = ops.gelu(x, bias)
            assert y.dtype == torch.bfloat16
            assert [g.dtype for g in torch.autograd.grad(y.sum(), (x, bias))] == [torch.bfloat16, torch.float32]


def test_non_finite_values_stay_in_place():
    x = torch.zeros(3, 4)
    x[1, 2], x[2, 0] = math.nan, math.inf
    y = ops.gelu(x)
    assert y[1, 2].isnan() and y[2, 0] == math.inf and int((~y.isfinite()).sum()) == 2


def test_compile(formula, compiled, same):
    inputs = [torch.randn(3, 5).double(), torch.randn(5).double(), "tanh"]
    same(compiled(lambda *a: ops.gelu(*a)), eager, inputs)
    torch._dynamo.reset()
    with formula("gelu", forward, backward):
        same(compiled(lambda *a: ops.gelu(*a)), eager, inputs)


def test_bad_input():
    with pytest.raises(Error, match=r"gelu: bias has shape \(4,\)"):
        ops.gelu(torch.randn(3, 5), torch.randn(4))
    with pytest.raises(Error, match="approximate is 'new'; allowed: tanh, none"):
        ops.gelu(torch.randn(3, 5), approximate="new")


# --------------------------------------------------------------------------------------------------- the kernels, by the tolerance

SHAPES = [(2, 3, 3072), (5, 1), (1, 7), (4, 65), (6, 64), (3, 47), (0, 65), (7, 0), (130, 33), (37, 16), (33, 17)]


def sample(shape, dtype, layout="contiguous", bias=None, scale=1.5):
    """x and bias (of dtype `bias`, x's unless given), both requiring grad."""
    x = arrange(random(*shape, dtype=dtype, scale=scale), layout)
    return {"x": x.requires_grad_(), "bias": random(shape[-1], dtype=bias or dtype).requires_grad_()}


def check(inputs, target, approximate="tanh", **more):
    long_sums = ("dbias",) if inputs["x"].shape[:-1].numel() > 64 else ()
    return check_op("gelu", ops.gelu, eager, inputs | {"approximate": approximate}, target, long_sums=long_sums, **more)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(target, shape, approximate):
    check(sample(shape, target.dtype), target, approximate)
    check(sample(shape, target.dtype) | {"bias": None}, target, approximate)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts(target, layout):
    check(sample((3, 4, 65), target.dtype, layout), target, grad_layout=layout)
    check(sample((3, 4, 65), target.dtype, layout) | {"bias": None}, target, grad_layout=layout)


def test_bias_of_other_dtypes_and_strides(target):
    check(sample((4, 65), target.dtype, bias=torch.float32), target)
    inputs = sample((4, 24), target.dtype)
    inputs["bias"] = random(24, 2, dtype=target.dtype)[:, 0].requires_grad_()
    check(inputs, target)
    x = random(3, 5, dtype=torch.float32)
    with target.force("gelu"):
        bias = random(5, dtype=torch.bfloat16).requires_grad_()
        y = ops.gelu(x, bias)
        assert same_bits(y, ops.gelu(x, bias.float())) and torch.autograd.grad(y.sum(), bias)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize(("low", "high"), [(-0.01, 0.01), (-4, -2), (2, 4), (-9, 9), (-8, -6), (12, 60)])
def test_ranges(target, approximate, low, high):
    """Near zero, in both tails, where the exponential ends, and beyond: judged apart, so that small values are not lost."""
    x = torch.linspace(low, high, 1999).to(target.dtype).view(1, -1).requires_grad_()
    check({"x": x, "bias": None}, target, approximate)


def test_the_far_tail():
    """Where PyTorch's own 1 + erf and 1 + tanh have cancelled to nothing the kernels have their digits, and then exactly 0."""
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    x = torch.linspace(-12.5, -1, 4001).view(1, -1)
    with backend(gelu="cpp"):
        y, nothing = ops.gelu(x, None, "none").double(), ops.gelu(torch.tensor([[-16.0, -60.0, -1e9]]), None, "none")
        z = ops.gelu(x[x > -9].view(1, -1)).double()
        gone = ops.gelu(torch.tensor([[-12.0, -60.0, -1e9]]))
    right = x.double() * torch.special.erfc(-x.double() / math.sqrt(2)) / 2
    assert ((y - right).abs() <= 2e-5 * right.abs()).all()
    u = x[x > -9].double().view(1, -1)
    right = u * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))
    assert ((z - right).abs() <= 2e-5 * right.abs()).all()
    assert not nothing.any() and not gone.any()


def test_every_bf16_and_every_fp16_number():
    """All finite inputs below 2^10 in magnitude, against float64, to one unit in the last place of the result or 2^-20."""
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
        x = x[x.abs() < 1024].view(1, -1)
        for approximate in ("tanh", "none"):
            with backend(gelu="cpp"):
                y = ops.gelu(x, None, approximate).double()
            right = eager(x.double(), None, approximate)
            assert ((y - right).abs() <= torch.finfo(dtype).eps * right.abs() + 2**-20).all()


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_what_is_not_finite_stays_in_its_place(target, approximate):
    inputs = sample((6, 65), target.dtype)
    with torch.no_grad():
        inputs["x"][2, 7] = math.nan
        inputs["x"][4, 64] = math.nan
    y = check(inputs, target, approximate)["y"]
    assert int(y.isnan().sum()) == 2
    x = torch.tensor([[math.inf, 1e4, -1e4, -math.inf]], dtype=target.dtype)
    with target.force("gelu"):
        y = ops.gelu(x, None, approximate)
    assert y[0, :3].tolist() == [math.inf, float(x[0, 1]), 0.0] and y[0, 3].isnan()


@pytest.mark.parametrize("biased", [True, False])
def test_large_results_are_whole(target, biased):
    """Above 16 MiB results are written past the caches: whole cache lines, a number of rows that leaves a partial group."""
    x, bias = random(3, 3072, dtype=target.dtype), random(3072) if biased else None
    many = x.repeat(1000, 1)
    leaf = backend.impl("gelu", "cpp")
    with testing.poisoned():
        assert same_bits(leaf.forward(many, bias, "tanh"), leaf.forward(x, bias, "tanh").repeat(1000, 1))
        assert same_bits(leaf.backward(many, many, bias, "tanh")[0], leaf.backward(x, x, bias, "tanh")[0].repeat(1000, 1))


def test_without_a_bias_there_is_no_gradient_of_it(target):
    x = random(5, 33, dtype=target.dtype)
    dx, dbias = backend.impl("gelu", "cpp").backward(x, x, None, "tanh")
    assert dx.shape == x.shape and dbias.shape == (0,)


@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_every_instruction_set(isa, precision, approximate):
    target = Target("cpp", precision, "cpp")
    with testing.forced_isa(isa):
        for shape in ((5, 1), (9, 65), (70, 96), (3, 47)):
            check(sample(shape, target.dtype), target, approximate)
        check(sample((2, 1000), target.dtype, scale=6.0) | {"bias": None}, target, approximate)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
def test_one_thread_and_two_give_the_same_bits(isa, biased):
    inputs, results, threads = sample((3000, 33), torch.float32), [], torch.get_num_threads()
    inputs |= {} if biased else {"bias": None}
    with testing.forced_isa(isa), backend(gelu="cpp"):
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(testing.evaluate(ops.gelu, inputs, upstream={"y": torch.ones(3000, 33)}))
        finally:
            torch.set_num_threads(threads)
    for name, value in results[0].items():
        assert all(same_bits(value, other[name]) for other in results[1:]), name


# ---------------------------------------------------------------------------------------------------------- wrong results are seen


def without_bias(x, bias):
    return eager(x) + 0 * bias


def of_the_other_form(x, bias):
    return eager(x, bias, "none")


def slope_without_its_second_term(x, bias):
    u = x + bias
    return u * (eager(u.detach()) / u.detach())


def without_the_cube(x, bias):
    u = x + bias
    return u / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * u))


WRONG = {without_bias: ["y", "dx"], slope_without_its_second_term: ["dx", "dbias"], without_the_cube: ["y", "dx"]}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_wrong_results_are_rejected(precision):
    inputs = sample((9, 24), testing.checks.DTYPES[precision])
    dtype, pull = inputs["x"].dtype, {"y": torch.randn(9, 24).to(testing.checks.DTYPES[precision])}
    own = testing.evaluate(eager, inputs, upstream=pull)
    exact = {name: testing.checks.in_double(value) for name, value in inputs.items()}
    ref = testing.evaluate(eager, exact, upstream={"y": pull["y"].double()})
    for name, value in own.items():
        rule = {"gradient": name != "y"}
        for what, wrong in testing.wrong_results(value).items():
            testing.assert_rejected(f"{name}: {what}", wrong, value, ref[name], **rule)
    for function, names in (WRONG | ({of_the_other_form: ["y", "dx"]} if precision == "fp32" else {})).items():
        found = testing.evaluate(lambda f=function, **a: f(**a).to(dtype), inputs, upstream=pull)
        for name in names:
            testing.assert_rejected(f"{name}: {function.__name__}", found[name], own[name], ref[name], gradient=name != "y")


# ----------------------------------------------------------------------------------------------------- dispatcher, compile, errors


def test_opcheck():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    for dtype, kind in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)):
        x, bias = random(5, 33, dtype=dtype), random(33, dtype=kind)
        for parameter in (bias, None):
            torch.library.opcheck(torch.ops.gptfast.gelu.default, (x, parameter, "tanh"))
            torch.library.opcheck(torch.ops.gptfast.gelu_backward.default, (x, x, parameter, "none"))


def test_leaf_checks_its_contract():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    x, wide = torch.randn(4, 6), torch.randn(4, 12)
    for arguments, message in (
        ((wide[:, ::2], None, "tanh"), "not contiguous"),
        ((x[0], None, "tanh"), "rows need 2"),
        ((x.double(), None, "tanh"), "allowed: fp32, bf16, fp16"),
        ((x, torch.ones(5), "tanh"), "bias has shape"),
        ((x, torch.ones(6).bfloat16(), "tanh"), "bias is"),
        ((x, None, "erf"), "approximate is erf, allowed: tanh, none"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.gptfast.gelu(*arguments)
        with pytest.raises(RuntimeError, match=message):
            torch.ops.gptfast.gelu_backward(arguments[0], *arguments)
    for dy, message in ((wide, "dy has shape"), (x.bfloat16(), "dy is"), (wide[:, ::2], "dy is not contiguous")):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.gptfast.gelu_backward(dy, x, None, "tanh")


def test_compile_with_the_kernels(compiled):
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    inputs, pull = sample((4, 33), torch.float32), {"y": torch.randn(4, 33)}
    with backend(gelu="cpp"):
        right = testing.evaluate(ops.gelu, inputs, upstream=pull)
        found = testing.evaluate(compiled(lambda **a: ops.gelu(**a)), inputs, upstream=pull)
    for name, value in right.items():
        assert same_bits(value, found[name]), name


def test_a_compiled_function_sees_the_choice():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    graphs = []

    def keep(module, inputs):
        graphs.append(" ".join(str(node.target) for node in module.graph.nodes))
        return module.forward

    torch._dynamo.reset()
    function = torch.compile(lambda x: ops.gelu(x), fullgraph=True, backend=keep)
    x = torch.randn(4, 33)
    for name in ("cpp", "eager", "cpp"):
        with torch.no_grad(), backend(gelu=name):
            function(x)
    assert ["gptfast.gelu" in graph for graph in graphs] == [True, False]
    torch._dynamo.reset()
