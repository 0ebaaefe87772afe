"""lm_head_sample: the definition against its three parts, the order of a kernel's arguments, the kernels."""

import math

import pytest
import torch

from gptfast import Error, backend, ops, packing, testing
from gptfast.ops.sample import Sampled
from gptfast.packing import PackedWeight

pytestmark = pytest.mark.usefixtures("eager")


def case(rows=4):
    parts = {"temperature": torch.full((rows,), 0.9), "top_k": torch.full((rows,), 6), "top_p": torch.full((rows,), 0.95)}
    parts |= {"seed": torch.arange(rows) + 7, "position": torch.arange(rows) * 3, "choice": torch.zeros(rows, dtype=torch.int64)}
    return [torch.randn(rows, 8), torch.randn(8), torch.randn(8), torch.randn(13, 8)], parts


def same(a, b):
    assert len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("vocab", [None, 11])
@pytest.mark.parametrize("modes", [{}, {"order": "hf", "logprobs_mode": "processed"}])
def test_parts(vocab, modes):
    tensors, parts = case()
    x, ln_weight, ln_bias, weight = tensors
    drawn = ops.lm_head_sample(*tensors, **parts, top_n=3, vocab=vocab, eps=1e-3, **modes)
    logits = torch.nn.functional.layer_norm(x, (8,), ln_weight, ln_bias, 1e-3) @ weight[:vocab].t()
    same(drawn, ops.sample(logits, **parts, top_n=3, **modes))
    assert int(drawn.token.max()) < (vocab or 13) and not drawn.logprob.requires_grad


def test_counts_are_updated():
    tensors, parts = case()
    counts = torch.zeros(4, 13, dtype=torch.int32)
    drawn = ops.lm_head_sample(*tensors, **parts, counts=counts)
    assert torch.equal(counts.nonzero()[:, 1], drawn.token) and int(counts.sum()) == 4


def test_order_of_a_kernels_arguments(formula):
    tensors, parts = case()

    def leaf(
        x, ln_weight, ln_bias, weight, eps, temperature, top_k, top_p, min_p, typical_p, repetition, frequency, presence, bias,
        mask, prompt, counts, seed, position, choice, top_n,
    ):
        assert (min_p, typical_p, repetition, frequency, presence, bias, mask, prompt, counts) == (None,) * 9
        logits = ops.linear(ops.layer_norm(x, ln_weight, ln_bias, eps), weight)
        return ops.sample(logits, temperature, top_k, top_p, seed=seed, position=position, choice=choice, top_n=top_n)

    wanted = ops.lm_head_sample(*tensors, **parts, top_n=2, vocab=11)
    with formula("lm_head_sample", leaf):
        drawn = ops.lm_head_sample(*tensors, **parts, top_n=2, vocab=11)
    assert isinstance(drawn, Sampled)
    same(drawn, wanted)


def test_limits_of_kernels(monkeypatch):
    monkeypatch.setitem(backend._missing, ("lm_head_sample", "cpp"), None)
    tensors, _ = case()
    assert backend.supports("lm_head_sample", "cpp", (*tensors, "gptfast", "raw")) is None
    assert "order hf with raw" in backend.supports("lm_head_sample", "cpp", (*tensors, "hf", "raw"))
    assert "33 rows" in backend.supports("lm_head_sample", "cpp", (torch.randn(33, 8), *tensors[1:], "gptfast", "raw"))


def test_bad_input():
    tensors, parts = case()
    with pytest.raises(Error, match=r"weight has shape \(13, 8\), x \(4, 7\)"):
        ops.lm_head_sample(tensors[0][:, :7], *tensors[1:], **parts)
    with pytest.raises(Error, match="vocab is 14; allowed: 1 to 13"):
        ops.lm_head_sample(*tensors, **parts, vocab=14)


# --------------------------------------------------------------------------------------------------------------------- the kernels

ISAS = ("plain", "avx2", "avx512")
FORMATS = (None, "fp32", "bf16", "int8", "int4")  # None: a plain weight


def kernel_case(rows, width, vocab, dtype=torch.float32, format=None, table=None):
    x, ln_weight, ln_bias = torch.randn(rows, width), torch.randn(width), torch.randn(width)
    weight = torch.randn(table or vocab, width) * 0.2
    tensors = [t.to(dtype) for t in (x, ln_weight, ln_bias)]
    whole = lambda value: torch.full((rows,), value)  # noqa: E731
    sampling = {"seed": torch.arange(rows) + 7, "position": torch.arange(rows) * 3, "choice": whole(0), "vocab": vocab, "eps": 1e-3}
    sampling["temperature"] = torch.tensor([(0.0, 0.9, 1.0)[row % 3] for row in range(rows)])
    return [*tensors, weight.to(dtype) if format is None else ops.pack_weight(weight, format)], sampling


def drawn_by(name, tensors, sampling):
    counts = sampling.get("counts")
    more = {} if counts is None else {"counts": counts.clone()}
    with backend(name), testing.poisoned():
        return ops.lm_head_sample(*tensors, **{**sampling, **more}), more.get("counts")


def in_double(tensors, vocab):
    """Logits in fp64, with the quantisation of activations where the definition has one."""
    x, ln_weight, ln_bias, weight = tensors
    normal = torch.nn.functional.layer_norm(x.double(), x.shape[1:], ln_weight.double(), ln_bias.double(), 1e-3)
    if not isinstance(weight, PackedWeight):
        return normal @ weight[:vocab].double().t()
    rounded = normal.float().double() if weight.format == "fp32" else normal.float()
    return packing.product(rounded, weight)[:, :vocab].double()


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_kernel_draws_from_the_heads_logits(isa, format):
    """All log-probabilities by the tolerance; ids, statuses and counts are those of `sample` on logits with these differences."""
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    with testing.forced_isa(isa):
        for rows, width, vocab, table in ((1, 64, 513, None), (5, 33, 70, 77), (32, 16, 1, 3), (2, 130, 1100, None)):
            for filters in ({}, {"top_k": torch.full((rows,), 6), "top_p": torch.full((rows,), 0.9)}):
                tensors, sampling = kernel_case(rows, width, vocab, format=format, table=table)
                sampling |= filters | {"top_n": vocab, "counts": torch.zeros(rows, vocab, dtype=torch.int32)}
                sampling |= {"presence": torch.full((rows,), 0.3)}
                found, counted = drawn_by("cpp", tensors, sampling)
                own, _ = drawn_by("eager", tensors, sampling)
                exact = in_double(tensors, vocab).log_softmax(1)
                by_id = [r.top_logprobs.gather(1, r.top_ids.argsort(1)) for r in (found, own)]
                if format in (None, "fp32"):
                    testing.assert_close_to_reference(by_id[0], by_id[1], exact, long_sum=True)
                else:  # a code may be its neighbour where the layer norm is rounded differently
                    assert (by_id[0] - exact).abs().max() < 0.02 * exact.std().clamp(min=0.1)
                assert not found.status.any() and bool((found.token < vocab).all())
                asked = {k: v for k, v in sampling.items() if k not in ("eps", "counts", "presence", "vocab")}
                same_logits = ops.sample(by_id[0], **asked)
                assert torch.equal(found.token, same_logits.token)
                assert torch.equal(counted.nonzero()[:, 1], found.token) and int(counted.sum()) == rows


def test_kernel_rows_do_not_look_at_each_other():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    for format in FORMATS[1:]:
        tensors, sampling = kernel_case(9, 64, 700, format=format)
        tensors[0][4] = math.nan
        found, _ = drawn_by("cpp", tensors, sampling | {"top_n": 5})
        assert found.status.tolist() == [0] * 4 + [1] + [0] * 4 and int(found.token[4]) == -1
        for row in (0, 1, 8):
            single = {key: value[row : row + 1] if torch.is_tensor(value) else value for key, value in sampling.items()}
            alone, _ = drawn_by("cpp", [tensors[0][row : row + 1], *tensors[1:]], single | {"top_n": 5})
            assert all(testing.same_bits(a, b[row : row + 1]) for a, b in zip(alone, found, strict=True))


def test_kernel_threads_and_dtypes():
    """Bits do not depend on threads; bf16 and fp16 by their tolerance."""
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    threads = torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for format in (None, "fp32"):
            tensors, sampling = kernel_case(3, 64, 900, dtype, format)
            results = []
            try:
                for count in (1, 2, 3):
                    torch.set_num_threads(count)
                    results.append(drawn_by("cpp", tensors, sampling | {"top_n": 900})[0])
            finally:
                torch.set_num_threads(threads)
            if format is not None:
                assert all(testing.same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
            own, _ = drawn_by("eager", tensors, sampling | {"top_n": 900})
            exact = in_double(tensors, 900)
            by_id = [r.top_logprobs.gather(1, r.top_ids.argsort(1)).double() for r in (results[0], own)]
            error = [(one - exact.log_softmax(1)).abs().max() for one in by_id]
            assert error[0] <= 2 * error[1] + 2 * torch.finfo(dtype).eps * exact.abs().max()


def test_kernel_wrong_results_are_rejected():
    tensors, _ = kernel_case(3, 64, 700)
    exact = in_double(tensors, 700).log_softmax(1)
    x, ln_weight, ln_bias, weight = tensors
    logits = torch.nn.functional.layer_norm(x, (64,), ln_weight, ln_bias, 1e-3) @ weight.t()
    right = logits.log_softmax(1)
    wrong = testing.wrong_results(right)
    wrong["without the layer norm's bias"] = (logits - ln_bias @ weight.t()).log_softmax(1)
    wrong["a column too few in the sum"] = logits - logits[:, :-1].logsumexp(1, keepdim=True)
    wrong["another epsilon"] = (torch.nn.functional.layer_norm(x, (64,), ln_weight, ln_bias, 1e-1) @ weight.t()).log_softmax(1)
    for what, value in wrong.items():
        testing.assert_rejected(what, value, right, exact, long_sum=True)


def test_opcheck():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    leaf = torch.ops.gptfast.lm_head_sample.default
    for format in (None, "int8"):
        (x, ln_weight, ln_bias, weight), sampling = kernel_case(3, 32, 70, format=format)
        keys = [sampling[key] for key in ("seed", "position", "choice")]
        more = () if format is None else (format, 70, 70)
        data = weight if format is None else weight.data
        counts = torch.zeros(3, 70, dtype=torch.int32)
        given = (x, ln_weight, ln_bias, data, 1e-5, sampling["temperature"], *[None] * 10, counts, *keys, 2, *more)
        torch.library.opcheck(leaf, given)
    with pytest.raises(RuntimeError, match="vocab is 71"):
        leaf(x, None, None, data, 1e-5, sampling["temperature"], *[None] * 11, *keys, 2, "int8", 70, 71)
    with pytest.raises(RuntimeError, match="format is int7"):
        leaf(x, None, None, data, 1e-5, sampling["temperature"], *[None] * 11, *keys, 2, "int7", 70, 70)


def test_compile(compiled):
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    tensors, sampling = kernel_case(3, 32, 70)
    with backend("cpp"):
        same(compiled(lambda *a: ops.lm_head_sample(*a, **sampling))(*tensors), ops.lm_head_sample(*tensors, **sampling))
