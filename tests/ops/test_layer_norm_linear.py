"""layer_norm_linear: the definition against the formula, the door to kernels."""

import pytest
import torch
import torch.nn.functional as F

from gptfast import Error, backend, ops, testing
from gptfast.ops.layer_norm_linear import ACTIVATIONS, eager
from gptfast.packing import FORMATS
from gptfast.testing import LAYOUTS, Target, arrange, check_op, random, same_bits

ISAS = ("plain", "avx2", "avx512")
pytestmark = pytest.mark.usefixtures("eager")


def formula_of(x, ln_weight, ln_bias, weight, bias, activation, eps):
    assert x.dim() == 2 and x.is_contiguous()
    hat = (x - x.mean(1, keepdim=True)) / torch.sqrt((x - x.mean(1, keepdim=True)).pow(2).mean(1, keepdim=True) + eps)
    hat = hat if ln_weight is None else hat * ln_weight
    y = (hat if ln_bias is None else hat + ln_bias) @ weight.t()
    y = y if bias is None else y + bias
    return y if activation == "none" else F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")


def case(shape=(2, 3, 5), parameters=True):
    there = [torch.randn(n).double() if parameters else None for n in (5, 5, 4)]
    return [torch.randn(shape).double(), there[0], there[1], torch.randn(5, 4).double().t(), there[2]]


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("parameters", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 5), (5,), (0, 5)])
def test_formula(formula, activation, parameters, shape):
    inputs = [*case(shape, parameters), activation, 1e-3]
    eager = ops.layer_norm_linear(*inputs)
    with formula("layer_norm_linear", formula_of):
        torch.testing.assert_close(ops.layer_norm_linear(*inputs), eager, rtol=1e-12, atol=1e-12)
    assert eager.shape == (*shape[:-1], 4)


def test_gradcheck():
    assert torch.autograd.gradcheck(lambda *a: ops.layer_norm_linear(*a, "gelu"), [t.requires_grad_() for t in case((2, 5))])


def test_compile(compiled):
    inputs = [*case(), "gelu_tanh"]
    assert torch.equal(compiled(lambda *a: ops.layer_norm_linear(*a))(*inputs), ops.layer_norm_linear(*inputs))


def test_bad_input():
    x, *rest = case()
    with pytest.raises(Error, match="activation is 'relu'; allowed: none, gelu, gelu_tanh"):
        ops.layer_norm_linear(x, *rest, "relu")
    with pytest.raises(Error, match=r"weight has shape \(4, 5\), x \(2, 3, 4\)"):
        ops.layer_norm_linear(x[..., :4], *rest)


# -------------------------------------------------------------------------------------------------------------------------- kernels


def kernel_case(rows, inputs, outputs, dtype=torch.float32, activation="gelu_tanh", parameters=True):
    vectors = [random(n, dtype=dtype) if parameters else None for n in (inputs, inputs, outputs)]
    weight = random(outputs, inputs, dtype=dtype, scale=0.2)
    names = ("x", "ln_weight", "ln_bias", "weight", "bias", "activation", "eps")
    x = random(rows, inputs, dtype=dtype, shift=0.5)
    return dict(zip(names, (x, *vectors[:2], weight, vectors[2], activation, 1e-5), strict=True))


def packed(inputs, format):
    return {**inputs, "weight": ops.pack_weight(inputs["weight"], format)}


def run_cpp(inputs):
    with backend(layer_norm_linear="cpp"):
        return ops.layer_norm_linear(**inputs)


def check(inputs, target):
    long = ("y",) if inputs["x"].shape[-1] > 64 else ()
    return check_op("layer_norm_linear", ops.layer_norm_linear, eager, inputs, target, long_sums=long)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 33), (32, 65, 17), (1, 768, 96), (5, 129, 50)], ids=str)
def test_shapes(target: Target, shape, activation):
    inputs = kernel_case(*shape, target.dtype, activation)
    check(inputs, target)
    check({**inputs, "weight": inputs["weight"].t().contiguous().t()}, target)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts(target: Target, layout):
    inputs = kernel_case(6, 65, 17, target.dtype)
    check({**inputs, "x": arrange(inputs["x"], layout)}, target)


def test_without_parameters(target: Target):
    check(kernel_case(4, 33, 17, target.dtype, parameters=False), target)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_packed_weights(isa, format, activation, precision):
    """After the normalised rows, which are layer_norm's bit for bit, the product and the activation by the tolerance; without an
    activation int8 and int4 bit for bit. (A normalised value on the edge between two codes may round otherwise in float64.)"""
    target = Target("cpp", precision, "cpp")
    with testing.forced_isa(isa):
        for shape in [(1, 1, 1), (3, 7, 33), (32, 65, 17), (2, 768, 96)]:
            inputs = packed(kernel_case(*shape, target.dtype, activation), format)
            with testing.poisoned():
                y = run_cpp(inputs)
            with backend(layer_norm="cpp"):
                normal = ops.layer_norm(inputs["x"], inputs["ln_weight"], inputs["ln_bias"], inputs["eps"])

            def rest(x, inputs=inputs, activation=activation):
                y = ops.linear(x, inputs["weight"], inputs["bias"])
                return y if activation == "none" else ops.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")

            own, ref = rest(normal), rest(normal.double())
            if format in ("int8", "int4") and activation == "none":
                assert same_bits(y, own), shape
            testing.assert_close_to_reference(y, own, ref.double(), long_sum=shape[1] > 64, name=f"{format} {shape}")
    testing.record("layer_norm_linear", "cpp", precision, "forward")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("isa", ISAS)
def test_a_row_has_the_same_bits_alone_and_on_any_number_of_threads(isa, format):
    threads = torch.get_num_threads()
    with testing.forced_isa(isa):
        inputs = packed(kernel_case(32, 200, 300), format)
        whole = run_cpp(inputs)
        for row in (0, 7, 31):
            assert same_bits(run_cpp({**inputs, "x": inputs["x"][row : row + 1]}), whole[row : row + 1].contiguous())
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert same_bits(run_cpp(inputs), whole)
        finally:
            torch.set_num_threads(threads)


def test_a_row_that_is_not_finite_stays_alone(target: Target):
    inputs = kernel_case(5, 70, 33, target.dtype)
    inputs["x"][2, 3] = float("nan")
    for case_ in (inputs, *(packed(inputs, format) for format in FORMATS)):
        with target.force("layer_norm_linear"):
            y = ops.layer_norm_linear(**case_)
        assert not y[2].isfinite().any() and y[[0, 1, 3, 4]].isfinite().all()


def test_autocast_takes_the_composed_ops():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    inputs = kernel_case(2, 9, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in backend.supports("layer_norm_linear", "cpp", tuple(inputs.values()))
        assert ops.layer_norm_linear(**inputs).dtype == torch.bfloat16
        assert run_cpp(packed(inputs, "int8")).dtype == torch.float32


def test_opcheck_and_leaf():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    leaf = torch.ops.gptfast.layer_norm_linear
    inputs = kernel_case(3, 70, 9)
    torch.library.opcheck(leaf.default, tuple(inputs.values()))
    for format in FORMATS:
        weight = ops.pack_weight(inputs["weight"], format)
        torch.library.opcheck(leaf.default, (*{**inputs, "weight": weight.data}.values(), format, 9))
    for change, message in (({"activation": "relu"}, "activation is relu"), ({"weight": random(9, 71)}, "weight has shape"),
                            ({"ln_weight": random(71)}, "weight has shape"), ({"bias": random(8)}, "bias has shape"),
                            ({"x": random(3, 140)[:, ::2]}, "not contiguous")):
        with pytest.raises(RuntimeError, match=message):
            leaf(*{**inputs, **change}.values())


def test_compile_on_cpp_and_a_backend_switched(compiled):
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    inputs = packed(kernel_case(3, 70, 9), "int8")
    function = compiled(lambda x: ops.layer_norm_linear(**{**inputs, "x": x}) * 2)
    for name in ("cpp", "eager", "cpp"):
        with backend(layer_norm_linear=name):
            torch.testing.assert_close(function(inputs["x"]), ops.layer_norm_linear(**inputs) * 2)


def test_wrong_results_are_rejected():
    inputs = kernel_case(20, 24, 33)
    wide = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    own, ref = eager(**inputs), eager(**wide)
    wrong = {"bias ignored": eager(**{**inputs, "bias": None}), "shift ignored": eager(**{**inputs, "ln_bias": None}),
             "another gelu": eager(**{**inputs, "activation": "gelu"}), "no activation": eager(**{**inputs, "activation": "none"})}
    for what, value in (testing.wrong_results(own) | wrong).items():
        testing.assert_rejected(what, value, own, ref)
