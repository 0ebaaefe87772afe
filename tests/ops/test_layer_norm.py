"""layer_norm on every backend: its definition, the tolerance in every layout, bits, fakes, wrong results that must not pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gptfast.backend as backend
from gptfast import testing
from gptfast.errors import Error
from gptfast.ops import layer_norm
from gptfast.ops.layer_norm import eager
from gptfast.testing import LAYOUTS, Target, arrange, check_op, random, same_bits

SHAPES = [(2, 3, 768), (5, 1), (1, 7), (4, 65), (3, 1600), (6, 1400), (0, 65), (7, 1023)]
WIDE = [(1, 5000), (130, 33)]


def sample(
    shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", layout: str = "contiguous", parameters: Any = None
) -> dict[str, Any]:
    """x, weight, bias of a case, all requiring grad; `parameters` is the dtype of weight and bias (x's unless given)."""
    columns, kind = shape[-1], parameters or dtype
    x = arrange(random(*shape, dtype=dtype, device=device, shift=0.5), layout)
    weight, bias = random(columns, dtype=kind, device=device, shift=1.0), random(columns, dtype=kind, device=device)
    return {"x": x.requires_grad_(), "weight": weight.requires_grad_(), "bias": bias.requires_grad_()}


def long_sums(shape: tuple[int, ...]) -> tuple[str, ...]:
    return ("dweight", "dbias") if torch.Size(shape[:-1]).numel() > 64 else ()


def check(inputs: dict[str, Any], target: Target, **more: Any) -> dict[str, Tensor]:
    return check_op("layer_norm", layer_norm, eager, inputs, target, long_sums=long_sums(inputs["x"].shape), **more)


def formula(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """The module's docstring, word by word."""
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    rstd = 1 / ((x - mean).square().sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt()
    return (x - mean) * rstd * weight + bias


# --------------------------------------------------------------------------------------------------------------- the definition


def test_eager_is_the_formula() -> None:
    inputs = sample((6, 65), torch.float64)
    torch.testing.assert_close(eager(**inputs), formula(**inputs), rtol=1e-12, atol=1e-12)


def test_eager_backward_is_the_formula() -> None:
    x, weight, bias = (value.detach().requires_grad_() for value in sample((6, 65), torch.float64).values())
    dy = torch.randn(6, 65, dtype=torch.float64)
    y = eager(x, weight, bias)
    dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), dy)
    rstd = (x.var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
    xhat, g = (x - x.mean(-1, keepdim=True)) * rstd, dy * weight
    expected = rstd * (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True))
    for found, right in ((dx, expected), (dweight, (dy * xhat).sum(0)), (dbias, dy.sum(0))):
        torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-11)


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(eager, tuple(sample((3, 5), torch.float64).values()))


def test_mixed_parameters_are_not_rounded() -> None:
    x, weight = random(4, 65, dtype=torch.bfloat16), random(65, shift=1.0)
    y = eager(x, weight)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, eager(x.float(), weight).bfloat16())


# ---------------------------------------------------------------------------------------------------------------- by the tolerance


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(target: Target, shape: tuple[int, ...]) -> None:
    check(sample(shape, target.dtype, target.device), target)


@pytest.mark.parametrize("shape", WIDE, ids=str)
def test_many_columns_and_many_rows(target: Target, shape: tuple[int, ...]) -> None:
    if target.proof == "triton-interpret":
        shape = (min(shape[0], 70), min(shape[1], 2100))  # the interpreter takes some 10 ms a program
    check(sample(shape, target.dtype, target.device), target)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts(target: Target, layout: str) -> None:
    check(sample((3, 4, 65), target.dtype, target.device, layout), target, grad_layout=layout)


def test_parameters_expanded_and_sliced(target: Target) -> None:
    inputs = sample((4, 24), target.dtype, target.device)
    wide = random(24, 2, dtype=target.dtype, device=target.device)
    inputs["weight"] = wide[:, 0].detach().requires_grad_()
    inputs["bias"] = wide[:1, 1].expand(24).detach().requires_grad_()
    check(inputs, target)


@pytest.mark.parametrize("absent", [("weight",), ("bias",), ("weight", "bias")], ids="-".join)
def test_without_parameters(target: Target, absent: tuple[str, ...]) -> None:
    check(sample((4, 65), target.dtype, target.device) | dict.fromkeys(absent), target)


def test_parameters_in_fp32(target: Target) -> None:
    check(sample((4, 65), target.dtype, target.device, parameters=torch.float32), target)


def test_weight_and_bias_of_two_dtypes(target: Target) -> None:
    inputs = sample((4, 65), target.dtype, target.device)
    inputs["bias"] = inputs["bias"].detach().float().requires_grad_()
    fast = check(inputs, target)
    assert fast["dbias"].dtype == torch.float32


def test_a_mean_far_from_zero(target: Target) -> None:
    inputs = sample((4, 300), target.dtype, target.device)
    inputs["x"] = (inputs["x"].detach() + 300).requires_grad_()
    check(inputs, target)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_stays_alone(target: Target, value: float) -> None:
    inputs = sample((5, 65), target.dtype, target.device)
    with torch.no_grad():
        inputs["x"][2, 7] = value
    fast = check(inputs, target)
    assert fast["y"][2].isnan().all()
    assert fast["y"][[0, 1, 3, 4]].isfinite().all()


def test_a_constant_row_is_the_bias(target: Target) -> None:
    inputs = sample((3, 33), target.dtype, target.device)
    with torch.no_grad():
        inputs["x"][1] = 0.25
        with target.force("layer_norm"):
            assert torch.equal(layer_norm(**inputs)[1], inputs["bias"])


def test_only_the_gradients_that_are_asked_for(target: Target) -> None:
    inputs = sample((4, 65), target.dtype, target.device)
    inputs["weight"] = inputs["weight"].detach()
    assert set(check(inputs, target)) == {"y", "dx", "dbias"}


def test_statistics(target: Target) -> None:
    x = random(7, 65, dtype=target.dtype, device=target.device, shift=3.0)
    with testing.poisoned():
        _, mean, rstd = backend.impl("layer_norm", target.backend).forward(x, None, None, 1e-5)
    _, own_mean, own_rstd = torch.native_layer_norm(x.float(), (65,), None, None, 1e-5)
    _, ref_mean, ref_rstd = (t.squeeze(-1) for t in torch.native_layer_norm(x.double(), (65,), None, None, 1e-5))
    testing.assert_close_to_reference(mean, own_mean.squeeze(-1), ref_mean, name="mean")
    testing.assert_close_to_reference(rstd, own_rstd.squeeze(-1), ref_rstd, name="rstd")


# ----------------------------------------------------------------------------------------------------------- wrong results are seen


def without_bias(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return eager(x, weight, None) + 0 * bias


def one_column_missing(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean, rstd = x[..., :-1].mean(-1, keepdim=True), (x.var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
    return (x - mean) * rstd * weight + bias


def unbiased_variance(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) * (x.var(-1, keepdim=True) + 1e-5).rsqrt() * weight + bias


def mean_term_missing(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The right y with a dx that lacks mean(g)."""
    rstd = (x.var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
    return (x - x.mean(-1, keepdim=True).detach()) * rstd * weight + bias


def projection_missing(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The right y with a dx that lacks xhat * mean(g * xhat)."""
    rstd = (x.var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt().detach()
    return (x - x.mean(-1, keepdim=True)) * rstd * weight + bias


WRONG = {
    without_bias: ("y",), one_column_missing: ("y", "dx"), unbiased_variance: ("y", "dx", "dweight"), mean_term_missing: ("dx",),
    projection_missing: ("dx",),
}  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_wrong_results_are_rejected(precision: str) -> None:
    inputs = sample((9, 24), testing.checks.DTYPES[precision])
    exact = testing.checks.in_double(list(inputs.values()))
    dy = torch.randn(9, 24).to(inputs["x"].dtype)
    own = testing.evaluate(eager, inputs, upstream={"y": dy})
    ref = testing.evaluate(eager, dict(zip(inputs, exact, strict=True)), upstream={"y": dy.double()})
    for name, value in own.items():
        rule = {"gradient": name != "y"}
        testing.assert_close_to_reference(value, value, ref[name], name=name, **rule)
        for what, wrong in testing.wrong_results(value).items():
            testing.assert_rejected(f"{name}: {what}", wrong, value, ref[name], **rule)
    for function, names in WRONG.items():
        wrong_values = testing.evaluate(lambda f=function, **args: f(**args).to(dy.dtype), inputs, upstream={"y": dy})
        for name in names:
            wrong = wrong_values[name].to(own[name].dtype)
            testing.assert_rejected(f"{name}: {function.__name__}", wrong, own[name], ref[name], gradient=name != "y")


# ---------------------------------------------------------------------------------------------------------------- properties, bits


def test_shift_and_scale_of_x_do_not_matter(target: Target) -> None:
    """y(a x + b) = y(x) for powers of two a and shifts b that lose no bit, up to eps."""
    x = (torch.randint(-8, 8, (5, 64)) / 4).to(target.dtype).to(target.device)
    with target.force("layer_norm"):
        y, moved = layer_norm(x, eps=1e-30), layer_norm(x * 4 + 16, eps=1e-30)
    assert (y.float() - moved.float()).abs().max() <= 8 * torch.finfo(target.dtype).eps


def test_a_row_does_not_depend_on_the_others(target: Target) -> None:
    x, weight = random(6, 65, dtype=target.dtype, device=target.device), random(65, dtype=target.dtype, device=target.device)
    with target.force("layer_norm"):
        assert same_bits(layer_norm(x, weight)[3:4], layer_norm(x[3:4], weight))


@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
def test_large_results_are_whole(isa: str) -> None:
    """Above 16 MiB results are written past the caches: whole cache lines, a last group that is not full."""
    x, weight, bias = random(4, 1024).repeat(1025, 1)[:4099], random(1024), random(1024)
    with testing.forced_isa(isa), testing.poisoned():
        y, mean, rstd = torch.ops.gptfast.layer_norm(x, weight, bias, 1e-5)
        dx, _, _ = torch.ops.gptfast.layer_norm_backward(y, x, weight, mean, rstd)
        few, mean, rstd = torch.ops.gptfast.layer_norm(x[:4], weight, bias, 1e-5)
        back, _, _ = torch.ops.gptfast.layer_norm_backward(few, x[:4], weight, mean, rstd)
    assert same_bits(y, few.repeat(1025, 1)[:4099]) and same_bits(dx, back.repeat(1025, 1)[:4099])


@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_instruction_set(isa: str, precision: str) -> None:
    target = Target("cpp", precision, "cpp")
    with testing.forced_isa(isa):
        for shape in ((5, 1), (9, 65), (70, 96), (3, 111), (6, 1400)):
            check(sample(shape, target.dtype), target)


@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
def test_one_thread_and_two_give_the_same_bits(isa: str) -> None:
    inputs = sample((3000, 33), torch.float32)
    results, threads = [], torch.get_num_threads()
    with testing.forced_isa(isa), backend.use(layer_norm="cpp"):
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(testing.evaluate(layer_norm, inputs, upstream={"y": torch.ones(3000, 33)}))
        finally:
            torch.set_num_threads(threads)
    for name, value in results[0].items():
        assert all(same_bits(value, other[name]) for other in results[1:]), name


def conversions() -> Tensor:
    """Numbers at which rounding to 16 bits goes wrong: every fp16 and its neighbours in fp32."""
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    bits = halves.view(torch.int32)
    return torch.cat([(bits + step).view(torch.float32) for step in (-4097, -4096, -1, 0, 1, 4095, 4096, 4097)])


@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_conversion_to_16_bits_rounds_as_torch(isa: str, precision: str) -> None:
    """A row of one value v and bias b gives y = b, rounded: the kernels' conversions against torch's on 2^19 values."""
    dtype = testing.checks.DTYPES[precision]
    values = conversions()
    with testing.forced_isa(isa):
        y = torch.ops.gptfast.layer_norm(torch.zeros(1, values.numel(), dtype=dtype), None, values, 1e-5)[0][0]
    right = values.to(dtype)
    tiny = values.abs() < torch.finfo(torch.float32).tiny  # the bf16 instruction of AVX-512 flushes these to zero
    same = (y == right) | (y.isnan() & right.isnan()) | (tiny & (precision == "bf16") & (isa == "avx512"))
    assert same.all(), values[~same][:5]


# ------------------------------------------------------------------------------------------------------ dispatcher, compile, errors


def test_opcheck() -> None:
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    for dtype, parameters in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)):
        x, dy, weight = random(5, 33, dtype=dtype), random(5, 33, dtype=dtype), random(33, dtype=parameters)
        _, mean, rstd = torch.ops.gptfast.layer_norm(x, weight, weight, 1e-5)
        torch.library.opcheck(torch.ops.gptfast.layer_norm.default, (x, weight, weight, 1e-5))
        torch.library.opcheck(torch.ops.gptfast.layer_norm.default, (x, None, None, 1e-5))
        torch.library.opcheck(torch.ops.gptfast.layer_norm_backward.default, (dy, x, weight, mean, rstd))
        torch.library.opcheck(torch.ops.gptfast.layer_norm_backward.default, (dy, x, None, mean, rstd))


def test_leaf_checks_its_contract() -> None:
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    x, wide = torch.randn(4, 6), torch.randn(4, 12)
    for arguments, message in (
        ((wide[:, ::2], None, None, 1e-5), "not contiguous"),
        ((x[0], None, None, 1e-5), "rows need 2"),
        ((x.double(), None, None, 1e-5), "allowed: fp32, bf16, fp16"),
        ((x, torch.ones(5), None, 1e-5), "weight has shape"),
        ((x, torch.ones(6, dtype=torch.bfloat16), None, 1e-5), "weight is"),
        ((x.bfloat16(), torch.ones(6), torch.ones(6, dtype=torch.bfloat16), 1e-5), "bias is"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.gptfast.layer_norm(*arguments)


def test_float64_takes_eager() -> None:
    x = torch.randn(3, 5, dtype=torch.float64)
    assert torch.equal(layer_norm(x), eager(x))
    if backend.EXTENSIONS["_C"] is None:
        with backend.use(layer_norm="cpp"), pytest.raises(Error, match="cpp was forced and cannot run: float64"):
            layer_norm(x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.randn(3, 4), torch.ones(5)), "weight has shape \\(5,\\), x's last dimension needs \\(4,\\)"),
        ((torch.randn(3, 4), None, torch.ones(3)), "bias has shape"),
        ((torch.tensor(1.0),), "x has no dimensions"),
    ],
)
def test_bad_shapes(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(Error, match=message):
        layer_norm(*arguments)


def test_double_backward_raises(target: Target) -> None:
    inputs = sample((3, 5), target.dtype, target.device)
    with target.force("layer_norm"):
        (dx,) = torch.autograd.grad(layer_norm(**inputs).float().square().sum(), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
