"""Packed weights: the layout, the definition of their products, and the C++ kernels against both, through `linear`."""

import pytest
import torch

from gptfast import Error, backend, ops, testing
from gptfast.ops.linear import eager
from gptfast.packing import FORMATS, PackedWeight, packed_bytes, product, quantise_rows
from gptfast.testing import LAYOUTS, Target, arrange, check_op, random, same_bits

ISAS = ("plain", "avx2", "avx512")
# rows, K, M: one of everything, a partial word, group, block or panel, and many tiles of rows
SHAPES = [(1, 1, 1), (3, 7, 33), (2, 768, 96), (5, 129, 31), (13, 200, 70), (67, 300, 45), (3, 64, 32), (1, 0, 5), (600, 65, 34)]
QUANTISED = ("int8", "int4")


def case(rows, inputs, outputs, format, dtype=torch.float32):
    weight = random(outputs, inputs, scale=0.1)
    return random(rows, inputs, dtype=dtype), ops.pack_weight(weight, format), random(outputs, dtype=dtype)


def run_cpp(*inputs):
    with backend(linear="cpp"):
        return ops.linear(*inputs)


# ------------------------------------------------------------------------------------------------------------------- the definition


@pytest.mark.parametrize("format", QUANTISED)
def test_the_definition_follows_the_formula(format):
    x, weight, bias = case(3, 150, 5, format)
    wide, codes, scales = 150 if format == "int8" else 64, weight.codes(), weight.scales()
    for row in range(3):
        for output in range(5):
            y = torch.tensor(0.0)
            for group, first in enumerate(range(0, 150, wide)):
                part = x[row, first : first + wide]
                s = part.abs().max() / 127
                q = [max(-127, min(127, round(float(v)))) for v in part / s]  # Python's round goes to even too
                total = sum(a * int(b) for a, b in zip(q, codes[output, first : first + wide], strict=True))
                y = y + torch.tensor(float(total)) * (s * scales[output, group])
            assert same_bits(product(x, weight, bias)[row, output], y + bias[output])


def test_quantised_rows_without_a_sound_scale_are_zero():
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([[0.0, 0.0], [1.0, nan], [-inf, 1.0], [1e-45, 0.0], [-254.0, 1.0], [127.0, 0.5]])
    codes, scales = quantise_rows(x)
    assert codes.tolist() == [[0, 0], [0, 0], [0, 0], [0, 0], [-127, 0], [127, 0]]
    assert scales[0] == 0 and scales[1].isnan() and scales[2] == inf and scales[4] == 2


@pytest.mark.parametrize("format", FORMATS)
def test_dequantise(format):
    weight = random(45, 150)
    packed, limit = ops.pack_weight(weight, format), {"fp32": 0.0, "bf16": 2.0**-8, "int8": 0.5 / 127 + 1e-6, "int4": 0.15}[format]
    back = packed.dequantise()
    assert packed.shape == back.shape == weight.shape and back.dtype == torch.float32
    assert bool(((back - weight).abs() <= limit * weight.abs().amax(1, keepdim=True)).all())
    if format in ("fp32", "bf16"):
        assert torch.equal(back, weight.to(torch.float32 if format == "fp32" else torch.bfloat16).float())


def test_bad_input():
    with pytest.raises(Error, match="weight format is 'int3'; allowed: fp32, bf16, int8, int4"):
        packed_bytes("int3", 1, 1)
    with pytest.raises(Error, match=r"packed int8 weight \[4, 4\] is uint8 of shape \(7,\); needed is uint8 \[384\]"):
        PackedWeight(torch.zeros(7, dtype=torch.uint8), "int8", 4, 4)
    x, weight, bias = case(2, 8, 3, "int8")
    with pytest.raises(Error, match=r"weight has shape \(3, 8\), x \(2, 7\)"):
        ops.linear(x[:, 1:], weight)
    with pytest.raises(Error, match="a packed weight has no backward"):
        ops.linear(x.requires_grad_(), weight)
    with torch.no_grad():
        assert ops.linear(x, weight, bias).shape == (2, 3)
    assert backend.supports("linear", "cuda", (torch.empty(0), weight)) is not None


# -------------------------------------------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", QUANTISED)
def test_quantised_products_have_the_bits_of_the_definition(isa, format):
    with testing.forced_isa(isa):
        for rows, inputs, outputs in SHAPES:
            x, weight, bias = case(rows, inputs, outputs, format)
            assert same_bits(run_cpp(x, weight, bias), eager(x, weight, bias)), (rows, inputs, outputs)
            assert same_bits(run_cpp(x, weight), eager(x, weight)), (rows, inputs, outputs)
        x, weight, bias = case(2, 3072, 40, format)
        assert same_bits(run_cpp(x * 1e-38, weight, bias), eager(x * 1e-38, weight, bias))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", ("fp32", "bf16"))
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_products_by_the_tolerance(isa, format, precision):
    target = Target("cpp", precision, "cpp")
    with testing.forced_isa(isa):
        for rows, inputs, outputs in [*SHAPES, (2, 3072, 40)]:
            x, weight, bias = case(rows, inputs, outputs, format, target.dtype)
            long = ("y",) if inputs > 64 else ()
            check_op("linear", ops.linear, eager, {"x": x, "weight": weight, "bias": bias}, target, long_sums=long)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("format", FORMATS)
def test_layouts_of_rows(layout, format):
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    x, weight, bias = case(6, 65, 17, format)
    placed = arrange(x, layout)
    assert same_bits(run_cpp(placed, weight, arrange(bias, "sliced").contiguous()), run_cpp(placed.contiguous(), weight, bias))
    assert run_cpp(x.view(2, 3, 65), weight).shape == (2, 3, 17) and run_cpp(x[0], weight).shape == (17,)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
def test_a_row_has_the_same_bits_alone_and_among_many(isa, format):
    with testing.forced_isa(isa):
        x, weight, bias = case(530, 200, 70, format)
        whole = run_cpp(x, weight, bias)
        for count in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 31, 64, 512):
            first = 530 - count
            assert same_bits(run_cpp(x[first:], weight, bias), whole[first:].contiguous()), count
        for row in range(0, 530, 41):
            assert same_bits(run_cpp(x[row : row + 1], weight, bias), whole[row : row + 1].contiguous()), row


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
def test_any_number_of_threads_gives_the_same_bits(isa, format):
    threads, results = torch.get_num_threads(), []
    with testing.forced_isa(isa):
        inputs = case(40, 1000, 300, format)
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(run_cpp(*inputs))
        finally:
            torch.set_num_threads(threads)
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("format", FORMATS)
def test_gpt2s_vocabulary(format):
    """50,257 outputs: the last panel is partial."""
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    x, weight, _ = case(1, 65, 50257, format)
    y = run_cpp(x, weight)
    if format in QUANTISED:
        assert same_bits(y, eager(x, weight))
    else:
        testing.assert_close_to_reference(y, eager(x, weight), eager(x.double(), weight), long_sum=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_not_finite_stays_alone(format, value):
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    x, weight, bias = case(5, 130, 9, format)
    x[2, 3] = value
    y = run_cpp(x, weight, bias)
    assert not y[2].isfinite().any() and y[[0, 1, 3, 4]].isfinite().all()
    assert torch.equal(y.isnan(), eager(x, weight, bias).isnan())
    plain = random(9, 130)
    plain[4, 129] = value
    y = run_cpp(random(3, 130), ops.pack_weight(plain, format))
    assert not y[:, 4].isfinite().any() and y[:, [0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


def test_wrong_results_are_rejected():
    x, weight, bias = case(20, 96, 33, "bf16")
    own, ref = eager(x, weight, bias), eager(x.double(), weight, bias)
    shorter = ops.pack_weight(weight.dequantise()[:, :-1], "bf16")
    wrong = {"bias ignored": eager(x, weight), "one term missing": eager(x[:, :-1], shorter, bias)}
    for what, value in (testing.wrong_results(own) | wrong).items():
        testing.assert_rejected(what, value, own, ref, long_sum=True)


def test_opcheck_and_compile():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    for format in FORMATS:
        x, weight, bias = case(3, 70, 9, format)
        for shift in (bias, None):
            torch.library.opcheck(torch.ops.gptfast.linear.default, (x, weight.data, shift, format, 9))
        torch._dynamo.reset()
        compiled = torch.compile(lambda x, w=weight, b=bias: ops.linear(x, w, b) * 2, fullgraph=True, backend="aot_eager")
        for name in ("cpp", "eager", "cpp"):
            with backend(linear=name):
                torch.testing.assert_close(compiled(x), ops.linear(x, weight, bias) * 2)
    torch._dynamo.reset()


def test_leaf_checks_its_contract():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    x, weight, bias = case(2, 8, 3, "int8")
    leaf, wide = torch.ops.gptfast.linear, torch.zeros(385, dtype=torch.uint8)
    for arguments, message in (
        ((x, weight.data, bias, "int3", 3), "format is int3"),
        ((x, weight.data, bias, "int4", 3), "packed weight has shape"),
        ((x, weight.data.view(torch.int8), bias, "int8", 3), "packed weight is"),
        ((x, wide.new_zeros(weight.data.numel() + 1)[1:], bias, "int8", 3), "does not begin at a multiple of 64"),
        ((x, weight.data, bias[1:], "int8", 3), "bias has shape"),
        ((x.double(), weight.data, bias, "int8", 3), "allowed: fp32, bf16, fp16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            leaf(*arguments)
