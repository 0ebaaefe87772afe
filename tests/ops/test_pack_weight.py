"""pack_weight: bytes equal to the definition's from every instruction set, and quantisers as good as they claim to be."""

import pytest
import torch

from gptfast import Error, backend, ops, testing
from gptfast.ops.pack_weight import eager
from gptfast.packing import FORMATS, PackedWeight
from gptfast.testing import LAYOUTS, Target, arrange, random, same_bits

ISAS = ("plain", "avx2", "avx512")
SHAPES = [(1, 1), (33, 7), (64, 128), (45, 150), (0, 5), (3, 0), (70, 193)]


def run_cpp(weight, format):
    with backend(pack_weight="cpp"), testing.poisoned():
        return ops.pack_weight(weight, format).data


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
def test_bytes_are_the_definitions(isa, format):
    with testing.forced_isa(isa):
        for shape in SHAPES:
            weight = random(*shape)
            assert same_bits(run_cpp(weight, format), eager(weight, format)), shape
        for scale in (1e-38, 1e-44, 1e37):  # inverse scales that overflow, scales that are denormal
            weight = random(40, 70) * scale
            assert same_bits(run_cpp(weight, format), eager(weight, format)), scale
        zero = torch.zeros(5, 70)
        assert same_bits(run_cpp(zero, format), eager(zero, format))


def test_dtypes_and_rows_proven(target: Target):
    for format in FORMATS:
        weight = random(45, 150, dtype=target.dtype)
        with target.force("pack_weight"):
            assert same_bits(ops.pack_weight(weight, format).data, eager(weight, format))
    testing.record("pack_weight", target.proof, target.precision, "forward")


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("format", FORMATS)
def test_layouts(layout, format):
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    weight = arrange(random(45, 150), layout)
    before = weight.clone()
    assert same_bits(run_cpp(weight, format), eager(weight.contiguous(), format)) and same_bits(weight, before)


def test_any_number_of_threads_gives_the_same_bytes():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    weight, threads, results = random(200, 100), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run_cpp(weight, "int4"))
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(results[0], other) for other in results[1:])


def test_int4s_search_beats_plain_rounding():
    """Against the symmetric scale max|w| / 7 and llama.cpp's q4_0 rule, w / -8 of the largest weight, both in groups of 64."""
    weight = random(64, 768)
    groups = weight.view(-1, 64)
    largest = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    found = (ops.pack_weight(weight, "int4").dequantise() - weight).square().mean()
    for scale in (largest.abs() / 7, largest / -8):
        plain = (groups / scale).round().clamp(-8, 7) * scale
        assert found < 0.9 * (plain - groups).square().mean()


def test_a_group_that_is_constant_is_kept_to_the_scales_precision():
    weight = torch.full((3, 64), 0.3)
    for format, limit in (("int4", 2.0**-8), ("int8", 1e-6)):
        assert (ops.pack_weight(weight, format).dequantise() / weight - 1).abs().max() <= limit


def test_opcheck_and_compile():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    torch._dynamo.reset()
    for format in FORMATS:
        for weight in (random(9, 70), random(70, 9).t()):
            torch.library.opcheck(torch.ops.gptfast.pack_weight.default, (weight, format))
    compiled = torch.compile(lambda w: ops.pack_weight(w, "int8").data + 0, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(weight), eager(weight, "int8"))
    torch._dynamo.reset()


def test_bad_input():
    with pytest.raises(Error, match="format is 'int3'; allowed: fp32, bf16, int8, int4"):
        ops.pack_weight(random(2, 2), "int3")
    with pytest.raises(Error, match=r"weight is float32 of shape \(2,\); needed is a float tensor \[M, K\]"):
        ops.pack_weight(random(2), "int8")
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    with pytest.raises(RuntimeError, match="weight is Double"):
        torch.ops.gptfast.pack_weight(random(2, 2).double(), "int8")
    with pytest.raises(RuntimeError, match="weight has 1 dimensions"):
        torch.ops.gptfast.pack_weight(random(2), "int8")
    assert isinstance(ops.pack_weight(random(2, 2).requires_grad_(), "int8"), PackedWeight)
