"""linear_add: the definition against the formula, the door to kernels."""

import pytest
import torch

from gptfast import Error, backend, ops, testing
from gptfast.ops.linear_add import eager
from gptfast.packing import FORMATS
from gptfast.testing import LAYOUTS, Target, arrange, check_op, random, same_bits

ISAS = ("plain", "avx2", "avx512")
pytestmark = pytest.mark.usefixtures("eager")


def formula_of(x, weight, bias, residual):
    assert x.dim() == residual.dim() == 2 and x.is_contiguous() and residual.is_contiguous()
    y = residual + x @ weight.t()
    return y if bias is None else y + bias


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("rows", [(2, 3), (1,), (), (0, 3)])
def test_formula(formula, biased, rows):
    weight, bias = torch.randn(7, 4).double().t(), torch.randn(4).double() if biased else None
    x, residual = torch.randn(7, *rows).double().movedim(0, -1), torch.randn(4).double().expand(*rows, 4)
    eager = ops.linear_add(x, weight, bias, residual)
    with formula("linear_add", formula_of):
        torch.testing.assert_close(ops.linear_add(x, weight, bias, residual), eager, rtol=1e-12, atol=1e-12)
    assert eager.shape == residual.shape


def test_gradcheck_and_dtypes():
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 5), (3, 5), (3,), (2, 3))]
    assert torch.autograd.gradcheck(ops.linear_add, inputs)
    x, weight, bias, residual = (t.detach().float() for t in inputs)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.linear_add(x, weight, bias, residual)
    assert y.dtype == torch.float32 and ops.linear_add(x, weight, bias, residual.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(y, residual + torch.nn.functional.linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16()))


def test_compile(compiled):
    inputs = [torch.randn(s).double() for s in ((2, 5), (3, 5), (3,), (2, 3))]
    assert torch.equal(compiled(lambda *a: ops.linear_add(*a))(*inputs), ops.linear_add(*inputs))


@pytest.mark.parametrize(("rows", "grad", "reason"), [(32, False, None), (33, False, "33 rows; kernels take 1 to 32"),
                                                      (0, False, "0 rows; kernels take 1 to 32"), (1, True, "it has no backward")])
def test_limits_of_kernels(monkeypatch, rows, grad, reason):
    for op in ("linear_add", "layer_norm_linear"):
        monkeypatch.setitem(backend._missing, (op, "cpp"), None)
        assert backend.supports(op, "cpp", (torch.randn(rows, 5), torch.randn(3, 5)), grad) == reason


def test_bad_input():
    with pytest.raises(Error, match=r"residual has shape \(2, 4\), x \(2, 5\), weight \(3, 5\)"):
        ops.linear_add(torch.randn(2, 5), torch.randn(3, 5), None, torch.randn(2, 4))


# -------------------------------------------------------------------------------------------------------------------------- kernels


def kernel_case(rows, inputs, outputs, dtype=torch.float32, biased=True):
    x, residual = random(rows, inputs, dtype=dtype), random(rows, outputs, dtype=dtype)
    weight = random(outputs, inputs, dtype=dtype, scale=0.2)
    return {"x": x, "weight": weight, "bias": random(outputs, dtype=dtype) if biased else None, "residual": residual}


def packed(inputs, format):
    return {**inputs, "weight": ops.pack_weight(inputs["weight"], format)}


def run_cpp(inputs):
    with backend(linear_add="cpp"):
        return ops.linear_add(**inputs)


def check(inputs, target):
    return check_op("linear_add", ops.linear_add, eager, inputs, target, long_sums=("y",) * (inputs["x"].shape[-1] > 64))


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 33), (32, 65, 17), (1, 768, 96), (5, 129, 50)], ids=str)
def test_shapes(target: Target, shape, biased):
    inputs = kernel_case(*shape, target.dtype, biased)
    check(inputs, target)
    check({**inputs, "weight": inputs["weight"].t().contiguous().t()}, target)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts(target: Target, layout):
    inputs = kernel_case(6, 65, 17, target.dtype)
    check({**inputs, "x": arrange(inputs["x"], layout), "residual": arrange(inputs["residual"], layout)}, target)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_packed_weights(isa, format, precision):
    target = Target("cpp", precision, "cpp")
    with testing.forced_isa(isa):
        for shape in [(1, 1, 1), (3, 7, 33), (32, 65, 17), (2, 3072, 96)]:
            for biased in (True, False):
                inputs = packed(kernel_case(*shape, target.dtype, biased), format)
                y = check(inputs, target)["y"]
                if format in ("int8", "int4") and precision == "fp32":
                    assert same_bits(y, eager(**inputs)), shape


@pytest.mark.parametrize("other", [torch.bfloat16, torch.float16])
def test_a_residual_of_another_dtype(other):
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    for x, residual in ((torch.float32, other), (other, torch.float32)):
        inputs = {**kernel_case(3, 33, 17, x), "residual": random(3, 17, dtype=residual)}
        for case in (inputs, packed(inputs, "int8")):
            y = check(case, Target("cpp", "fp32", "cpp"))["y"]
            assert y.dtype == residual


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("isa", ISAS)
def test_a_row_has_the_same_bits_alone_and_on_any_number_of_threads(isa, format):
    threads = torch.get_num_threads()
    with testing.forced_isa(isa):
        inputs = packed(kernel_case(32, 200, 300), format)
        whole = run_cpp(inputs)
        for row in (0, 7, 31):
            alone = {**inputs, "x": inputs["x"][row : row + 1], "residual": inputs["residual"][row : row + 1]}
            assert same_bits(run_cpp(alone), whole[row : row + 1].contiguous())
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert same_bits(run_cpp(inputs), whole)
        finally:
            torch.set_num_threads(threads)


def test_a_row_that_is_not_finite_stays_alone(target: Target):
    inputs = kernel_case(5, 70, 33, target.dtype)
    inputs["x"][2, 3] = float("inf")
    for case in (inputs, *(packed(inputs, format) for format in FORMATS)):
        with target.force("linear_add"):
            y = ops.linear_add(**case)
        assert not y[2].isfinite().any() and y[[0, 1, 3, 4]].isfinite().all()


def test_opcheck_and_leaf():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    leaf, inputs = torch.ops.gptfast.linear_add, kernel_case(3, 70, 9)
    torch.library.opcheck(leaf.default, tuple(inputs.values()))
    for format in FORMATS:
        weight = ops.pack_weight(inputs["weight"], format)
        torch.library.opcheck(leaf.default, (*{**inputs, "weight": weight.data}.values(), format, 9))
    for change, message in (({"residual": random(3, 8)}, "residual has shape"), ({"weight": random(9, 71)}, "weight has shape"),
                            ({"bias": random(8)}, "bias has shape"), ({"x": random(3, 140)[:, ::2]}, "not contiguous")):
        with pytest.raises(RuntimeError, match=message):
            leaf(*{**inputs, **change}.values())


def test_compile_on_cpp_and_a_backend_switched(compiled):
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    inputs = packed(kernel_case(3, 70, 9), "int4")
    function = compiled(lambda x: ops.linear_add(**{**inputs, "x": x}) * 2)
    for name in ("cpp", "eager", "cpp"):
        with backend(linear_add=name):
            torch.testing.assert_close(function(inputs["x"]), ops.linear_add(**inputs) * 2)


def test_wrong_results_are_rejected():
    inputs = kernel_case(20, 24, 33)
    own, ref = eager(**inputs), eager(**{name: value.double() for name, value in inputs.items()})
    wrong = {"bias ignored": eager(**{**inputs, "bias": None}), "residual ignored": own - inputs["residual"],
             "one term missing": eager(inputs["x"][:, 1:], inputs["weight"][:, 1:], inputs["bias"], inputs["residual"])}
    for what, value in (testing.wrong_results(own) | wrong).items():
        testing.assert_rejected(what, value, own, ref)
