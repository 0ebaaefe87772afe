"""add_layer_norm: the definition against the formula, the glue, outputs that nobody uses."""

import pytest
import torch

from gptfast import Error, backend, ops, testing
from gptfast.ops.add_layer_norm import eager
from gptfast.testing import LAYOUTS, Target, arrange, check_op, random, same_bits

pytestmark = pytest.mark.usefixtures("eager")


def forward(residual, x, weight, bias, eps):
    assert all(t.dim() == 2 and t.is_contiguous() for t in (residual, x))
    total = residual + x
    mean = total.mean(1)
    rstd = 1 / torch.sqrt((total - mean[:, None]).pow(2).mean(1) + eps)
    y = (total - mean[:, None]) * rstd[:, None]
    y = y if weight is None else y * weight
    return total, y if bias is None else y + bias, mean, rstd


def backward(dtotal, dy, total, weight, mean, rstd):
    assert dy.is_contiguous() and (dtotal is None or dtotal.is_contiguous())
    hat = (total - mean[:, None]) * rstd[:, None]
    g = dy if weight is None else dy * weight
    d = rstd[:, None] * (g - g.mean(1, keepdim=True) - hat * (g * hat).mean(1, keepdim=True))
    return d if dtotal is None else d + dtotal, (dy * hat).sum(0), dy.sum(0)


def case(weight=True, bias=True, shape=(3, 5, 7)):
    parameters = [torch.randn(shape[-1]).double() if there else None for there in (weight, bias)]
    return [torch.randn(shape).double(), torch.randn(shape).double(), *parameters, 1e-3]


@pytest.mark.parametrize("parameters", [(True, True), (True, False), (False, False), (False, True)])
@pytest.mark.parametrize("upstream", ["dense", "transposed", "expanded"])
def test_formula(formula, same, parameters, upstream):
    with formula("add_layer_norm", forward, backward):
        same(ops.add_layer_norm, eager, case(*parameters), upstream=upstream)


@pytest.mark.parametrize("which", [0, 1])
def test_one_output_used(formula, same, which):
    inputs = case()
    wanted = [True, True, which == 1, which == 1, False]  # the parameters have no part in total
    seen = []

    def watch(dtotal, *rest):
        seen.append(dtotal)
        return backward(dtotal, *rest)

    with formula("add_layer_norm", forward, watch):
        same(lambda *a: ops.add_layer_norm(*a)[which], lambda *a: eager(*a)[which], inputs, wanted)
    assert seen == ([None] if which == 1 else [])


@pytest.mark.parametrize("one", range(4))
def test_gradient_of_one_input(formula, same, one):
    with formula("add_layer_norm", forward, backward):
        same(lambda *a: ops.add_layer_norm(*a)[1], lambda *a: eager(*a)[1], case(), [i == one for i in range(5)])


@pytest.mark.parametrize("shape", [(0, 7), (7,), (1, 1), (2, 0, 3)])
def test_sizes(formula, same, shape):
    with formula("add_layer_norm", forward, backward):
        same(ops.add_layer_norm, eager, case(shape=shape))


def test_strided_and_expanded_inputs(formula, same):
    a, b = torch.randn(6, 4, 10).double(), torch.randn(1, 5).double()

    def through(op):
        return lambda a, b: op(a.transpose(0, 1)[..., ::2], b.expand(4, 6, 5))

    with formula("add_layer_norm", forward, backward):
        same(through(ops.add_layer_norm), through(eager), [a, b])


def test_gradcheck():
    inputs = [x.requires_grad_() if isinstance(x, torch.Tensor) else x for x in case(shape=(3, 5))]
    assert torch.autograd.gradcheck(ops.add_layer_norm, inputs)


def test_y_is_of_total_as_rounded_and_dtypes(formula):
    residual, x = torch.randn(4, 64).bfloat16(), torch.randn(4, 64).bfloat16()
    total, y = ops.add_layer_norm(residual, x)
    assert torch.equal(total, residual + x) and torch.equal(y, torch.nn.functional.layer_norm(total, (64,)))
    residual, x, weight = residual.float().requires_grad_(), x.requires_grad_(), torch.randn(64).requires_grad_()
    for context in (backend("eager"), formula("add_layer_norm", forward, backward)):
        with context, torch.autocast("cpu", torch.bfloat16):
            total, y = ops.add_layer_norm(residual, x, weight)
            assert total.dtype == y.dtype == torch.float32
            grads = torch.autograd.grad(y.sum() + total.sum(), (residual, x, weight))
            assert [g.dtype for g in grads] == [torch.float32, torch.bfloat16, torch.float32]


def test_compile(formula, compiled, same):
    same(compiled(lambda *a: ops.add_layer_norm(*a)), eager, case())
    torch._dynamo.reset()
    with formula("add_layer_norm", forward, backward):
        same(compiled(lambda *a: ops.add_layer_norm(*a)), eager, case())


def test_bad_input():
    with pytest.raises(Error, match=r"residual has shape \(3, 4\), x \(3, 5\)"):
        ops.add_layer_norm(torch.randn(3, 4), torch.randn(3, 5))
    with pytest.raises(Error, match=r"bias has shape \(4,\), needed is \(5,\)"):
        ops.add_layer_norm(torch.randn(3, 5), torch.randn(3, 5), None, torch.randn(4))


# --------------------------------------------------------------------------------------------------- the kernels, by the tolerance

SHAPES = [(2, 3, 768), (5, 1), (1, 7), (4, 65), (3, 33), (6, 64), (0, 65), (7, 0), (130, 33), (37, 16), (1, 5000), (6, 1400)]


def sample(shape, dtype, layout="contiguous", parameters=None):
    """residual, x, weight, bias, all requiring grad; `parameters` is the dtype of weight and bias (x's unless given)."""
    kind = parameters or dtype
    rows = {name: arrange(random(*shape, dtype=dtype, shift=0.5), layout).requires_grad_() for name in ("residual", "x")}
    return rows | {name: random(shape[-1], dtype=kind, shift=1.0).requires_grad_() for name in ("weight", "bias")}


def check(inputs, target, outputs=("total", "y"), front=ops.add_layer_norm, own=eager, **more):
    long_sums = ("dweight", "dbias") if inputs["x"].shape[:-1].numel() > 64 else ()
    return check_op("add_layer_norm", front, own, inputs, target, outputs=outputs, long_sums=long_sums, **more)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(target, shape):
    inputs = sample(shape, target.dtype)
    fast = check(inputs, target)
    assert same_bits(fast["total"], (inputs["residual"] + inputs["x"]).detach())


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts(target, layout):
    check(sample((3, 4, 65), target.dtype, layout), target, grad_layout=layout)


@pytest.mark.parametrize("absent", [("weight",), ("bias",), ("weight", "bias")], ids="-".join)
def test_without_parameters(target, absent):
    check(sample((4, 65), target.dtype) | dict.fromkeys(absent), target)


def test_parameters_of_other_dtypes_and_strides(target):
    check(sample((4, 65), target.dtype, parameters=torch.float32), target)
    inputs = sample((4, 24), target.dtype)
    inputs["weight"] = random(24, 2, dtype=target.dtype)[:, 0].requires_grad_()
    inputs["bias"] = random(1, dtype=torch.float32).expand(24).detach().requires_grad_()
    assert check(inputs, target)["dbias"].dtype == torch.float32


@pytest.mark.parametrize("which", [0, 1])
def test_one_output_used_by_the_kernels(target, which):
    """Where only y is used there is no dtotal; where only total is used there is nothing to compute."""
    inputs = sample((9, 65), target.dtype)
    if which == 0:
        inputs |= {name: inputs[name].detach() for name in ("weight", "bias")}
    name = ("total", "y")[which]
    check(inputs, target, (name,), lambda **a: ops.add_layer_norm(**a)[which], lambda **a: eager(**a)[which])


def test_a_mean_far_from_zero(target):
    inputs = sample((5, 300), target.dtype)
    inputs["residual"] = (inputs["residual"].detach() + 300).requires_grad_()
    check(inputs, target)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_stays_alone(target, value):
    inputs = sample((6, 65), target.dtype)
    with torch.no_grad():
        inputs["x"][2, 64] = value
    fast = check(inputs, target)
    assert fast["y"][2].isnan().all() and fast["y"][[0, 1, 3, 4, 5]].isfinite().all()


def test_it_is_addition_and_layer_norm(target):
    """y is computed from total as rounded: the very bits of layer_norm's kernel on total, alone or among other rows."""
    inputs = {name: value.detach() for name, value in sample((7, 100), target.dtype).items()}
    with target.force("add_layer_norm"), backend(layer_norm="cpp"):
        total, y = ops.add_layer_norm(**inputs)
        assert same_bits(y, ops.layer_norm(total, inputs["weight"], inputs["bias"]))
        assert same_bits(y[5:6], ops.layer_norm(total[5:6], inputs["weight"], inputs["bias"]))


def test_large_results_are_whole(target):
    """Above 16 MiB results are written past the caches: a width of whole cache lines, a last group that is not full."""
    inputs = {name: value.detach() for name, value in sample((8193, 1024), target.dtype).items()}
    leaf, (residual, x, weight, bias) = backend.impl("add_layer_norm", "cpp"), inputs.values()
    with testing.poisoned():
        total, y, mean, rstd = leaf.forward(residual, x, weight, bias, 1e-5)
        d, dweight, dbias = leaf.backward(y, x, total, weight, mean, rstd)
        for rows in (slice(0, 5), slice(4097, 4099), slice(8190, 8193)):
            few = leaf.forward(residual[rows], x[rows], weight, bias, 1e-5)
            assert all(same_bits(whole[rows], part) for whole, part in zip((total, y, mean, rstd), few, strict=True))
            back = leaf.backward(y[rows], x[rows], total[rows], weight, mean[rows], rstd[rows])
            assert same_bits(d[rows], back[0])
    torch.testing.assert_close(dbias.double(), x.double().sum(0), rtol=1e-2, atol=1e-2)
    assert dweight.isfinite().all() and d.isfinite().all()


@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_instruction_set(isa, precision):
    target = Target("cpp", precision, "cpp")
    with testing.forced_isa(isa):
        for shape in ((5, 1), (9, 65), (70, 96), (3, 111), (6, 1400)):
            check(sample(shape, target.dtype), target)


@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
def test_one_thread_and_two_give_the_same_bits(isa):
    inputs, results, threads = sample((3000, 33), torch.float32), [], torch.get_num_threads()
    pulls = {"total": torch.randn(3000, 33), "y": torch.randn(3000, 33)}
    with testing.forced_isa(isa), backend(add_layer_norm="cpp"):
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(testing.evaluate(ops.add_layer_norm, inputs, ("total", "y"), pulls))
        finally:
            torch.set_num_threads(threads)
    for name, value in results[0].items():
        assert all(same_bits(value, other[name]) for other in results[1:]), name


# ---------------------------------------------------------------------------------------------------------- wrong results are seen


def without_bias(residual, x, weight, bias):
    total, y = eager(residual, x, weight)
    return total, y + 0 * bias


def residual_only(residual, x, weight, bias):
    return residual + 0 * x, eager(residual, x, weight, bias)[1]


def of_x_alone(residual, x, weight, bias):
    return residual + x, eager(0 * residual, x, weight, bias)[1]


def dtotal_ignored(residual, x, weight, bias):
    total, y = eager(residual, x, weight, bias)
    return total.detach() + 0 * y, y


def mean_term_missing(residual, x, weight, bias):
    total = residual + x
    mean, rstd = total.mean(-1, keepdim=True).detach(), (total.var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
    return total, (total - mean) * rstd * weight + bias


WRONG = {without_bias: ["y"], residual_only: ["total", "dx"], of_x_alone: ["y", "dweight"], dtotal_ignored: ["dresidual", "dx"],
         mean_term_missing: ["dx"]}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_wrong_results_are_rejected(precision):
    inputs = sample((9, 24), testing.checks.DTYPES[precision])
    dtype, outputs = inputs["x"].dtype, ("total", "y")
    pulls = {name: torch.randn(9, 24).to(dtype) for name in outputs}
    own = testing.evaluate(eager, inputs, outputs, pulls)
    exact = {name: testing.checks.in_double(value) for name, value in inputs.items()}
    ref = testing.evaluate(eager, exact, outputs, {name: pull.double() for name, pull in pulls.items()})
    for name, value in own.items():
        rule = {"gradient": name not in outputs}
        testing.assert_close_to_reference(value, value, ref[name], name=name, **rule)
        for what, wrong in testing.wrong_results(value).items():
            testing.assert_rejected(f"{name}: {what}", wrong, value, ref[name], **rule)
    for function, names in WRONG.items():
        found = testing.evaluate(lambda f=function, **a: tuple(t.to(dtype) for t in f(**a)), inputs, outputs, pulls)
        for name in names:
            rule = {"gradient": name not in outputs}
            testing.assert_rejected(f"{name}: {function.__name__}", found[name].to(own[name].dtype), own[name], ref[name], **rule)


# ----------------------------------------------------------------------------------------------------- dispatcher, compile, errors


def test_opcheck():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    leaf, back = torch.ops.gptfast.add_layer_norm.default, torch.ops.gptfast.add_layer_norm_backward.default
    for dtype, kind in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)):
        x, dy, weight = random(5, 33, dtype=dtype), random(5, 33, dtype=dtype), random(33, dtype=kind)
        total, _, mean, rstd = leaf(x, dy, weight, weight, 1e-5)
        torch.library.opcheck(leaf, (x, dy, weight, weight, 1e-5))
        torch.library.opcheck(leaf, (x, dy, None, None, 1e-5))
        torch.library.opcheck(back, (dy, dy, total, weight, mean, rstd))
        torch.library.opcheck(back, (None, dy, total, None, mean, rstd))


def test_leaf_checks_its_contract():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    x, wide, one = torch.randn(4, 6), torch.randn(4, 12), torch.ones(4)
    for arguments, message in (
        ((x, wide[:, ::2], None, None, 1e-5), "not contiguous"),
        ((wide[:, ::2], x, None, None, 1e-5), "not contiguous"),
        ((x, x[0], None, None, 1e-5), "rows need 2"),
        ((wide, x, None, None, 1e-5), "residual has shape"),
        ((x.bfloat16(), x, None, None, 1e-5), "residual is"),
        ((x.double(), x.double(), None, None, 1e-5), "allowed: fp32, bf16, fp16"),
        ((x, x, torch.ones(5), None, 1e-5), "weight has shape"),
        ((x, x, torch.ones(6), torch.ones(6).bfloat16(), 1e-5), "bias is"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.gptfast.add_layer_norm(*arguments)
    for arguments, message in (
        ((wide, x, x, None, one, one), "dtotal has shape"),
        ((x.bfloat16(), x, x, None, one, one), "dtotal is"),
        ((None, wide, x, None, one, one), "dy has shape"),
        ((None, x, x, None, one[:3], one), "mean has shape"),
        ((None, x, x, None, one, one.double()), "rstd is"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.gptfast.add_layer_norm_backward(*arguments)


def test_compile_with_the_kernels(compiled):
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    inputs, pulls = sample((4, 33), torch.float32), {"total": torch.randn(4, 33), "y": torch.randn(4, 33)}
    function = compiled(lambda **a: ops.add_layer_norm(**a))
    with backend(add_layer_norm="cpp"):
        right = testing.evaluate(ops.add_layer_norm, inputs, ("total", "y"), pulls)
        found = testing.evaluate(function, inputs, ("total", "y"), pulls)
    for name, value in right.items():
        assert same_bits(value, found[name]), name


def test_a_compiled_function_sees_the_choice():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    graphs = []

    def keep(module, inputs):
        graphs.append(" ".join(str(node.target) for node in module.graph.nodes))
        return module.forward

    torch._dynamo.reset()
    function = torch.compile(lambda a, b: ops.add_layer_norm(a, b), fullgraph=True, backend=keep)
    x = torch.randn(4, 33)
    for name in ("cpp", "eager", "cpp"):
        with torch.no_grad(), backend(add_layer_norm=name):
            function(x, x)
    assert ["gptfast.add_layer_norm" in graph for graph in graphs] == [True, False]
    torch._dynamo.reset()
