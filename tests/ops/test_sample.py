"""sample: each rule of generation.md against a definition written independently in float64, and every edge case."""

import math
import random

import pytest
import torch

from gptfast import Error, backend, ops, philox, testing
from gptfast.ops import sample as front_door
from gptfast.ops.sample import filtered, pack_bits, penalised, unpack_bits
from gptfast.testing import Target, same_bits

INF, NAN = float("inf"), float("nan")


def run(logits, temperature=1.0, seed=7, position=11, choice=0, **more):
    """`sample` with numbers repeated for every row."""
    logits = torch.as_tensor(logits, dtype=torch.float32) if not isinstance(logits, torch.Tensor) else logits
    rows = logits.shape[0]

    def each(value, dtype):
        return value if isinstance(value, torch.Tensor) else torch.full((rows,), value, dtype=dtype)

    numbers = {"top_p", "min_p", "typical_p", "repetition", "frequency", "presence"}
    more = {k: each(v, torch.float32 if k in numbers else torch.int64) if k in numbers | {"top_k"} else v for k, v in more.items()}
    keys = {"seed": each(seed, torch.int64), "position": each(position, torch.int64), "choice": each(choice, torch.int64)}
    return front_door(logits, each(temperature, torch.float32), **more, **keys)


def kept(logits, order="gptfast", temperature=1.0, **filters):
    """The set of ids that the filters leave of one row of logits, as the eager definition has it."""
    x = torch.as_tensor([logits], dtype=torch.float32)
    values = [torch.tensor([filters[name]]) if name in filters else None for name in ("top_k", "top_p", "min_p", "typical_p")]
    y, ids = filtered(x, torch.tensor([float(temperature)]), *values, order)
    return set((torch.arange(x.shape[1]) if ids is None else ids[0])[y[0] > -INF].tolist())


@pytest.fixture(params=["eager", "cpp"])
def either(request):
    testing.requires("cpp", backend.EXTENSIONS["_C"] if request.param == "cpp" else None)
    with backend(sample=request.param):
        yield


# ------------------------------------------------------------------------------------------------------------------------ the draw


def test_the_draw_is_gumbel_max_with_the_published_noise():
    logits = torch.randn(5, 1000) * 3
    seed, position, choice = torch.arange(5) * 2**33 - 2**34, torch.arange(5) * 100, torch.arange(5)
    result = run(logits, 0.7, seed, position, choice)
    for b in range(5):
        y = (logits[b] - logits[b].max()) / torch.tensor(0.7)
        g = philox.gumbel(int(seed[b]), torch.arange(1000), int(position[b]), int(choice[b]))
        assert int(result.token[b]) == int((y + g).argmax())
    assert torch.allclose(result.logprob, logits.log_softmax(1).gather(1, result.token[:, None])[:, 0], atol=1e-5)
    assert result.token.dtype == torch.int64 and result.status.tolist() == [0] * 5 and result.status.dtype == torch.int8


def test_a_row_does_not_depend_on_its_batch():
    logits = torch.randn(6, 300) * 4
    seed, position = torch.arange(6), torch.arange(6) + 3
    settings = {"top_k": torch.tensor([0, 5, 300, 1, 20, 0]), "top_p": torch.tensor([1.0, 0.9, 0.5, 1.0, 0.0, 0.99])}
    together = run(logits, 0.9, seed, position, **settings)
    for b in range(6):
        alone = run(logits[b : b + 1], 0.9, seed[b : b + 1], position[b : b + 1], **{k: v[b : b + 1] for k, v in settings.items()})
        assert int(alone.token) == int(together.token[b])


def test_draws_follow_the_filtered_probabilities():
    x = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -2.0])
    rows = 5_000
    result = run(x.expand(rows, 6), 0.8, position=torch.arange(rows), top_k=4, top_p=0.9)
    p = torch.where(torch.arange(6) < 3, (x / 0.8).exp(), 0.0)  # 0.96 of the mass of four is in three, 0.83 in two
    expected = rows * p / p.sum()
    counts = torch.bincount(result.token, minlength=6)
    assert counts[3:].sum() == 0
    assert float(((counts - expected)[:3] ** 2 / expected[:3]).sum()) < 13.8


def test_low_precision_and_strided_logits():
    base = (torch.randn(4, 100) * 3).bfloat16()
    assert torch.equal(run(base).token, run(base.float()).token)
    wide = torch.randn(4, 200)
    assert torch.equal(run(wide[:, ::2]).token, run(wide[:, ::2].contiguous()).token)
    before = wide.clone()
    run(wide, 0.5, top_k=3, top_p=0.8, repetition=1.2, prompt=pack_bits(wide > 0))
    assert torch.equal(wide, before)


# --------------------------------------------------------------------------------------------------------------- filters and ties


def brute(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0):
    """The kept set in the order of the definition, by sorting in float64."""
    x = {i: v / temperature for i, v in enumerate(logits) if v > -INF}
    if 0 < top_k < len(logits):
        bound = sorted(x.values(), reverse=True)[min(top_k, len(x)) - 1]
        x = {i: v for i, v in x.items() if v >= bound}

    def prefix(key, share):
        p = {i: math.exp(v) for i, v in x.items()}
        total, mass = sum(p.values()), 0.0
        for i in sorted(x, key=key):
            mass += p[i] / total
            if mass >= share - 1e-9:
                return {j: x[j] for j in x if key(j) <= key(i) + 1e-6}
        return x

    if top_p < 1:
        x = prefix(lambda i: -x[i], top_p)
    if min_p > 0:
        x = {i: v for i, v in x.items() if v >= max(x.values()) + math.log(min_p) - 1e-6}
    if typical_p < 1:
        norm = math.log(sum(math.exp(v) for v in x.values()))
        entropy = -sum(math.exp(v - norm) * (v - norm) for v in x.values())
        x = prefix(lambda i: round(abs(norm - x[i] - entropy), 6), typical_p)
    return set(x)


@pytest.mark.parametrize("seed", range(40))
def test_filters_against_a_definition_by_sorting(seed):
    g = torch.Generator().manual_seed(seed)
    pick = lambda values: values[int(torch.randint(len(values), (1,), generator=g))]  # noqa: E731
    logits = (torch.randn(pick([3, 17, 400]), generator=g).double() * 3).tolist()
    filters = {
        "top_k": pick([0, 1, 2, 5, 1000]), "top_p": pick([0.1, 0.5, 0.93, 1.0]), "min_p": pick([0.0, 0.02, 0.3]),
        "typical_p": pick([0.2, 0.7, 0.95, 1.0]),
    }
    temperature = pick([0.5, 1.0, 2.0])
    logits = torch.tensor(logits, dtype=torch.float32).tolist()
    assert kept(logits, temperature=temperature, **filters) == brute(logits, temperature, **filters)


def test_ties_at_a_boundary_are_all_kept():
    tied = [0.0, 3.0, 1.0, 1.0, 1.0, -2.0]
    assert kept(tied, top_k=2) == {1, 2, 3, 4}
    assert kept(tied, top_p=0.75) == {1, 2, 3, 4}  # 0.68 + a third of the tie
    assert kept([1.0, 1.0, 0.0], min_p=1.0) == {0, 1}
    assert kept([0.0] * 8, typical_p=0.1) == set(range(8))


def test_mass_is_counted_exactly():
    """A value whose mass is exactly half of the best's: a share of one half is reached by the best alone, and by no less."""
    near = torch.tensor(-math.log(2)).view(torch.int32) + torch.arange(-50, 50, dtype=torch.int32)
    half = float(near.view(torch.float32)[philox.mass(near.view(torch.float32)) == 2**39][0])
    assert kept([0.0, half, half], top_p=0.5) == {0} and kept([0.0, half, half, -27.0], top_p=0.5) == {0, 1, 2}
    assert kept([math.log(2.0), 0.0, -30.0], top_p=2 / 3 - 1e-4) == {0}
    assert kept([math.log(2.0), 0.0, -30.0], top_p=2 / 3 + 1e-4) == {0, 1}


def test_a_wide_nucleus_beyond_the_first_candidates():
    logits = [-i * 1e-3 for i in range(5000)]
    count = len(kept(logits, top_p=0.9))
    mass = [math.exp(v) for v in logits]
    assert sum(mass[: count - 1]) < 0.9 * sum(mass) <= sum(mass[:count]) * (1 + 1e-9)
    assert count > 1024


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize(
    "off",
    [*({"top_k": k} for k in (0, -1, 50, 2**31)), {"top_p": 1.0}, {"top_p": 1.5}, {"min_p": 0.0}, {"typical_p": 1.0}],
)
def test_off_is_off_bit_for_bit(off):
    logits = torch.randn(64, 50) * 2
    positions = torch.arange(64)
    assert torch.equal(run(logits, position=positions, **off).token, run(logits, position=positions).token)
    assert kept(logits[0].tolist(), **off) == set(range(50))


def test_orders_differ_as_their_libraries_do():
    x = [2.0, 1.0, 0.0, -1.0]  # 0.64, 0.24, 0.09, 0.03
    # a nucleus of 0.9 needs three at temperature 1, two at 0.5; llama.cpp applies the temperature last
    assert kept(x, temperature=0.5, top_p=0.9) == kept(x, "hf", 0.5, top_p=0.9) == kept(x, "vllm", 0.5, top_p=0.9) == {0, 1}
    assert kept(x, "llama.cpp", 0.5, top_p=0.9) == {0, 1, 2}
    # min_p 0.1 first drops two and renormalises: a nucleus of 0.72 is then one token instead of two
    assert kept(x, top_p=0.72, min_p=0.2) == {0, 1} and kept(x, "vllm", top_p=0.72, min_p=0.2) == {0}


def test_llama_typical_before_top_p_may_drop_the_best():
    x = [3.0] + [0.0] * 30
    assert 0 not in kept(x, "llama.cpp", typical_p=0.3, top_p=0.5, min_p=0.5)


# ----------------------------------------------------------------------------------------------------------------------- edge cases


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("greedy", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_k": 1}, {"temperature": 1e-42}])
def test_greedy_takes_the_lowest_of_equal_ids(greedy):
    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0]] * 50)
    result = run(logits, position=torch.arange(50), **greedy)
    assert result.token.unique().tolist() == [1]


@pytest.mark.parametrize("temperature", [1e-8, 1e-37, 1e30, 3e38])
def test_extreme_temperatures(temperature):
    logits = torch.tensor([[1e30, -1e30, 1e30 * 0.999, 0.0]] * 40)
    token = run(logits, temperature, position=torch.arange(40)).token
    assert token.unique().tolist() == ([0] if temperature < 1 else token.unique().tolist())
    flat = run(torch.randn(200, 4), temperature, position=torch.arange(200)).token
    assert len(flat.unique()) == 4


@pytest.mark.parametrize("value", [-1.0, NAN, INF])
def test_temperatures_that_are_not_allowed(value):
    with pytest.raises(Error, match="temperature"):
        run([[0.0, 1.0]], value)


@pytest.mark.usefixtures("either")
def test_nan_fails_its_row_alone():
    logits = torch.randn(4, 20)
    logits[1, 3] = NAN
    mask = pack_bits(torch.arange(20).expand(4, 20) != 3)
    for more in ({}, {"mask": mask}, {"top_k": 5, "top_p": 0.9, "typical_p": 0.9, "min_p": 0.1, "repetition": 1.1, "prompt": mask}):
        clean = torch.where(logits.isnan(), 0.0, logits)
        result, expected = run(logits, top_n=2, **more), run(clean, top_n=2, **more)
        assert result.status.tolist() == [0, 1, 0, 0] and result.token[1] == -1 and result.logprob[1] == 0
        assert torch.equal(result.token[[0, 2, 3]], expected.token[[0, 2, 3]])


@pytest.mark.usefixtures("either")
def test_nothing_allowed_ends_the_row():
    logits = torch.stack((torch.full((8,), -INF), torch.zeros(8)))
    assert run(logits).status.tolist() == [2, 0] and run(logits, 0.0).token.tolist()[0] == -1
    banned = run(torch.zeros(2, 8), mask=pack_bits(torch.tensor([[False] * 8, [True] * 8])))
    assert banned.status.tolist() == [2, 0] and int(banned.token[0]) == -1 and not bool(banned.logprob.isnan().any())


@pytest.mark.usefixtures("either")
def test_plus_infinity_forces():
    logits = torch.zeros(3, 6)
    logits[0, 4] = INF
    logits[1, [2, 5]] = INF
    bias = torch.zeros(3, 6)
    bias[2, 3] = INF
    result = run(logits, bias=bias, top_k=3, top_p=0.5)
    assert result.token.tolist() == [4, 2, 3] and result.status.tolist() == [0, 0, 0]
    assert torch.allclose(result.logprob, torch.tensor([0.0, -math.log(2), -math.log(6)]))


@pytest.mark.usefixtures("either")
def test_masked_ids_are_excluded():
    """The only allowed ids are the least probable ones; a banned +inf does not force, a bias of -inf bans."""
    logits = torch.tensor([[INF, 50.0, -90.0, -91.0]]).repeat(300, 1)
    mask = pack_bits(torch.tensor([[False, False, True, True]] * 300))
    assert set(run(logits, position=torch.arange(300), mask=mask).token.tolist()) == {2, 3}
    bias = torch.tensor([[-INF, -INF, 0.0, -INF]]).repeat(300, 1)
    assert set(run(logits, position=torch.arange(300), bias=bias).token.tolist()) == {2}


@pytest.mark.usefixtures("either")
def test_padded_vocabulary_is_never_sampled():
    logits = torch.zeros(500, 40)
    logits[:, 33:] = NAN
    logits[:, 35] = INF
    result = run(logits, position=torch.arange(500), vocab=33, top_n=33)
    assert result.status.eq(0).all() and int(result.token.max()) == 32 and int(result.top_ids.max()) == 32


# ----------------------------------------------------------------------------------------------- penalties, bits, log-probabilities


def test_penalties_by_the_book():
    x = torch.tensor([[2.0, -2.0, 1.0, -1.0, 0.5]])
    counts = torch.tensor([[0, 3, 1, 0, 0]], dtype=torch.int32)
    prompt = pack_bits(torch.tensor([[True, False, False, False, False]]))
    r, f, p = torch.tensor([2.0]), torch.tensor([0.25]), torch.tensor([0.5])
    y = penalised(x, r, f, p, None, None, prompt, counts)
    assert y.tolist() == [[1.0, -4.0 - 0.75 - 0.5, 0.5 - 0.25 - 0.5, -1.0, 0.5]]
    assert penalised(x, r, None, None, None, None, prompt, None).tolist() == [[1.0, -2.0, 1.0, -1.0, 0.5]]
    biased = penalised(x, r, None, None, torch.tensor([[-4.0, 0, 0, 0, 0]]), None, prompt, None)
    assert biased[0, 0] == -4.0  # the bias comes before the penalty: 2 - 4 is negative, and is multiplied


def test_counts_take_the_drawn_tokens():
    counts = torch.zeros(3, 10, dtype=torch.int32)
    logits = torch.randn(3, 10)
    logits[2, 0] = NAN
    first = run(logits, counts=counts, frequency=0.5)
    expected = torch.zeros(3, 10, dtype=torch.int32)
    expected[0, first.token[0]] = expected[1, first.token[1]] = 1
    assert torch.equal(counts, expected)


@pytest.mark.parametrize("count", [1, 31, 32, 33, 95])
def test_bits_there_and_back(count):
    mask = torch.rand(3, count) < 0.5
    words = pack_bits(mask)
    assert words.dtype == torch.int32 and words.shape == (3, (count + 31) // 32) and torch.equal(unpack_bits(words, count), mask)
    assert (int(words[0, 0]) >> 0) & 1 == int(mask[0, 0])


def test_top_log_probabilities():
    logits = torch.tensor([[1.0, 3.0, 3.0, -0.0, 0.0, 2.0]])
    result = run(logits, 0.0, top_n=6)
    assert result.top_ids.tolist() == [[1, 2, 5, 0, 3, 4]]  # of equal ones the lower id first
    assert torch.equal(result.top_logprobs[0, 0], result.logprob[0])
    assert torch.allclose(result.top_logprobs.exp().sum(), torch.tensor(1.0))
    assert run(logits, 0.0).top_ids.shape == (1, 0)


def test_processed_log_probabilities_are_those_of_the_draw():
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]])
    result = run(logits, 0.5, top_k=2, logprobs_mode="processed", top_n=4)
    expected = torch.tensor([6.0, 4.0]).log_softmax(0)
    assert result.top_ids[0, :2].tolist() == [1, 2] and torch.allclose(result.top_logprobs[0, :2], expected)
    assert bool((result.top_logprobs[0, 2:] == -INF).all())
    raw = run(logits, 0.5, top_k=2, top_n=4)
    assert torch.allclose(raw.top_logprobs[0], logits[0].log_softmax(0).sort(descending=True).values)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"top_n": 9}, "top_n"), ({"order": "best"}, "order"), ({"vocab": 9}, "vocab"), ({"logprobs_mode": "x"}, "logprobs_mode"),
        ({"top_k": torch.zeros(3, dtype=torch.int64)}, "top_k"), ({"bias": torch.zeros(2, 3)}, "bias"), ({"top_p": -0.5}, "top_p"),
        ({"repetition": NAN}, "repetition"), ({"mask": torch.zeros(2, 2, dtype=torch.int32)}, "mask"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(Error, match=words):
        run(torch.zeros(2, 8), **arguments)


def test_forced_backend_that_has_no_kernel_yet():
    if backend.supports("sample", "cpp") is None:
        pytest.skip("sample has a C++ kernel")
    with backend(sample="cpp"), pytest.raises(Error, match="sample"):
        run([[0.0, 1.0]])


def test_the_front_door_is_exported():
    assert ops.sample is front_door


# --------------------------------------------------------------------------------------------------------------------- the kernels

ISAS = ["plain", "avx2", "avx512"]


def hard_logits(pick, rows, vocab):
    """Normal, coarse (many ties), wide, flat or partly excluded logits; now and then NaN, +inf and rows without a finite one."""
    x = torch.randn(rows, vocab) * pick(0.5, 3, 8)
    x = pick(lambda: x, lambda: (x * 2).round() / 2, lambda: x * 50, lambda: (x * 0.1).round(),
             lambda: x.masked_fill(torch.rand(rows, vocab) < 0.3, -INF))()
    row, column = pick(*range(rows)), pick(*range(vocab))
    for value in (NAN, INF, -INF):
        if pick(False, False, False, True):
            x[row, ... if value == -INF else column] = value
    return x


def hard_case(seed, vocab, dtype=torch.float32):
    """Logits and a random combination of everything that `sample` takes."""
    generator = random.Random(seed)
    torch.manual_seed(seed)
    pick = lambda *values: values[generator.randrange(len(values))]  # noqa: E731
    rows = pick(1, 2, 3, 5)
    maybe = lambda make: make() if pick(False, True) else None  # noqa: E731
    each = lambda *values: lambda: torch.tensor([pick(*values) for _ in range(rows)], dtype=torch.float32)  # noqa: E731
    whole = lambda low, high: torch.tensor([generator.randrange(low, high) for _ in range(rows)])  # noqa: E731
    bits = lambda share: lambda: pack_bits(torch.rand(rows, vocab) < share)  # noqa: E731
    return hard_logits(pick, rows, vocab).to(dtype), {
        "temperature": each(0.0, 1.0, 0.7, 1.5, 1e-3, 100.0)(),
        "top_k": maybe(lambda: torch.tensor([pick(0, -1, 1, 2, 5, 50, vocab, vocab - 1, vocab // 3) for _ in range(rows)])),
        "top_p": maybe(each(0.0, 0.1, 0.5, 0.9, 0.95, 0.999, 1.0)), "min_p": maybe(each(0.0, 0.01, 0.1, 1.0, 1e-30)),
        "typical_p": maybe(each(0.0, 0.2, 0.5, 0.9, 0.99, 1.0)), "repetition": maybe(each(1.0, 1.3, 0.7, 0.0)),
        "frequency": maybe(each(0.0, 0.5, -0.3)), "presence": maybe(each(0.0, 0.6, -0.2)),
        "bias": maybe(lambda: (torch.randn(rows, vocab) * 2).masked_fill(torch.rand(rows, vocab) < 0.1, -INF)),
        "mask": maybe(bits(pick(0.5, 0.95, 0.02))), "prompt": maybe(bits(0.3)),
        "counts": maybe(lambda: (torch.rand(rows, vocab) < 0.1).int() * 2),
        "seed": whole(-(2**63), 2**63), "position": whole(0, 2048), "choice": whole(0, 4),
        "top_n": min(vocab, pick(0, 1, 5, 20, 513)),
    }  # fmt: skip


def sampled(name, logits, case):
    """What a backend draws, and the counts it leaves."""
    counts = None if case["counts"] is None else case["counts"].clone()
    with backend(sample=name), testing.poisoned():
        return ops.sample(logits, **{**case, "counts": counts}), counts


def assert_same_sample(logits, case, label=""):
    """Token, status, ids and counts equal to eager's; log-probabilities within fp32's rounding of a log-sum-exp."""
    before = logits.clone()
    (right, counted), (found, counts) = sampled("eager", logits, case), sampled("cpp", logits, case)
    for field in ("token", "status", "top_ids"):
        assert torch.equal(getattr(right, field), getattr(found, field)), (label, field)
    for field in ("logprob", "top_logprobs"):
        torch.testing.assert_close(getattr(found, field), getattr(right, field), rtol=1e-6, atol=4e-6, equal_nan=True)
    assert counts is None or torch.equal(counts, counted)
    assert same_bits(logits, before)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("part", range(4))
def test_every_combination_is_exact(isa, part):
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    widths = (1, 2, 3, 7, 31, 33, 64, 65, 100, 511, 512, 513, 1000, 1025, 1553, 3001)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    with testing.forced_isa(isa):
        for seed in range(48 * part, 48 * part + 48):
            assert_same_sample(*hard_case(seed, widths[seed % 16], dtypes[seed % 3]), (seed, isa))


@pytest.mark.parametrize("seed", range(3))
def test_a_real_vocabulary_is_exact(target: Target, seed):
    assert_same_sample(*hard_case(1000 + seed, 50257, target.dtype), seed)
    testing.record("sample", target.proof, target.precision, "forward")


@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 50}, {"top_p": 0.95}, {"top_k": 50, "top_p": 0.95}, {"min_p": 0.02}, {"typical_p": 0.9}], ids=str
)
def test_each_filter_at_a_real_vocabulary(target: Target, filters):
    """Several draws of one row, so that the noise matters, at scales that keep few ids and nearly all."""
    for scale in (0.3, 2.0):
        logits = (torch.randn(1, 50257) * scale).to(target.dtype).expand(12, -1)
        with backend("eager"):
            right = run(logits, 0.9, position=torch.arange(12), **filters)
        with target.force("sample"):
            found = run(logits, 0.9, position=torch.arange(12), **filters)
        assert torch.equal(right.token, found.token) and len(found.token.unique()) > 1


@pytest.mark.parametrize("vocab", [1, 5, 512, 700])
def test_log_probabilities_of_every_id(target: Target, vocab):
    """All of them as top_n, by the tolerance: eager in fp32 beside float64."""
    logits = (torch.randn(3, vocab) * 4).to(target.dtype)
    with backend("eager"):
        own = run(logits, 0.0, top_n=vocab).top_logprobs
    with target.force("sample"), testing.poisoned():
        found = run(logits, 0.0, top_n=vocab)
    exact = logits.double().log_softmax(1)
    assert torch.equal(found.top_ids.sort(1).values, torch.arange(vocab).expand(3, -1))
    testing.assert_close_to_reference(found.top_logprobs, own, exact.gather(1, found.top_ids), long_sum=True)
    testing.assert_close_to_reference(found.logprob, own[:, 0], exact.amax(1), long_sum=True)


def test_layouts_of_everything(target: Target):
    """Padded, strided and expanded logits; bias and counts that are parts of wider tensors; other integer dtypes."""
    wide, bias = (torch.randn(4, 160) * 3).to(target.dtype), torch.randn(1, 100).expand(4, 100)
    case = {
        "temperature": torch.ones(()).expand(4), "top_k": torch.tensor([0, 3, 50, 99]).int(), "repetition": torch.full((4,), 1.2),
        "presence": torch.tensor([0.5]).expand(4), "bias": bias, "prompt": pack_bits(torch.rand(4, 100) < 0.3), "top_n": 3,
        "seed": torch.arange(4), "position": torch.arange(4), "choice": torch.arange(4),
    }  # fmt: skip
    for logits in (wide[:, :100], wide[:, 7:107], wide.t().contiguous().t()[:, :100], wide[:1, :100].expand(4, 100)):
        for dtype in (torch.int32, torch.int64):
            results = []
            for name in ("eager", "cpp"):
                counts = torch.ones(4, 200, dtype=dtype)
                part = counts[:, ::2] if dtype == torch.int64 else counts[:, 50:150]
                with backend(sample=name):
                    drawn = ops.sample(logits, **{**case, "counts": part})
                results.append((drawn.token, drawn.top_ids, counts))
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
            assert int(results[1][2].sum()) == 804


@pytest.mark.parametrize("isa", ISAS)
def test_one_thread_and_two_give_the_same_bits(isa):
    results, threads = [], torch.get_num_threads()
    case = hard_case(3, 3001)[1] | {"counts": None, "top_n": 4}
    logits = torch.randn(case["seed"].shape[0], 3001)
    with testing.forced_isa(isa):
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(sampled("cpp", logits, case)[0])
        finally:
            torch.set_num_threads(threads)
    assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_many_equal_values_and_wide_ranges_are_selected(target: Target):
    """What a search by halves may trip over: all equal, two values, numbers of every exponent, neighbours in the last bit."""
    spread = torch.cat((-(2.0 ** torch.arange(-20, 60).float()), torch.zeros(3)))
    close = (torch.full((700,), -1.0).view(torch.int32) + torch.arange(700, dtype=torch.int32) % 50).view(torch.float32)
    for values in (torch.zeros(600), torch.arange(600).float() % 2, spread, close):
        logits = values.to(target.dtype).expand(3, -1).contiguous()
        logits = logits.masked_fill(logits.isinf(), -6e4)
        for filters in ({"top_k": 7}, {"top_k": 40}, {"top_p": 0.3}, {"top_p": 0.9999}, {"typical_p": 0.5}, {"min_p": 0.6}):
            found = []
            for name in ("eager", "cpp"):
                with backend(sample=name):
                    found.append(run(logits, 1.3, position=torch.arange(3), top_n=60, **filters))
            assert torch.equal(found[0].token, found[1].token) and torch.equal(found[0].top_ids, found[1].top_ids), filters


def leaf_arguments(rows, vocab, dtype=torch.float32, top_n=2):
    f, n = (lambda v: torch.full((rows,), v)), (lambda v: torch.full((rows,), v, dtype=torch.int64))
    bits = pack_bits(torch.rand(rows, vocab) < 0.9)
    numbers = [f(0.9), n(5), f(0.9), f(0.01), f(0.9), f(1.1), f(0.1), f(0.1)]
    tables = [torch.randn(rows, vocab), bits, bits, torch.zeros(rows, vocab, dtype=torch.int32)]
    return [torch.randn(rows, vocab).to(dtype), *numbers, *tables, n(1), n(2), n(0), top_n]


def test_opcheck():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        full = leaf_arguments(3, 70, dtype)
        torch.library.opcheck(torch.ops.gptfast.sample.default, tuple(full))
        torch.library.opcheck(torch.ops.gptfast.sample.default, (full[0], full[1], *[None] * 11, *full[13:16], 0))
    empty = torch.ops.gptfast.sample(*(t[:0] if isinstance(t, torch.Tensor) else t for t in leaf_arguments(3, 70)))
    assert [tuple(t.shape) for t in empty] == [(0,), (0,), (0,), (0, 2), (0, 2)]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(3), "dimensions, needs 2"), (0, torch.zeros(3, 70).double(), "allowed: fp32, bf16, fp16"),
        (0, torch.zeros(3, 140)[:, ::2], "rows that are not contiguous"), (0, torch.zeros(3, 0), "has 0 columns"),
        (1, torch.zeros(3).double(), "temperature is Double"), (2, torch.zeros(3).int(), "top_k is Int"),
        (3, torch.zeros(2), "top_p has shape"),
        (9, torch.zeros(3, 70).half(), "bias is Half"), (9, torch.zeros(3, 71), "bias has shape"),
        (10, torch.zeros(3, 2, dtype=torch.int32), "mask has shape"), (11, torch.zeros(3, 3), "prompt is Float"),
        (12, torch.zeros(3, 70), "counts is Float"), (12, torch.zeros(2, 70, dtype=torch.int32), "counts has shape"),
        (13, torch.zeros(3), "seed is Float"), (14, torch.zeros(6, dtype=torch.int64)[::2], "position is not contiguous"),
        (16, 71, "top_n is 71"),
    ],
)  # fmt: skip
def test_leaf_checks_its_contract(place, value, message):
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    arguments = leaf_arguments(3, 70)
    arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.gptfast.sample(*arguments)


def test_compile_on_cpp_and_a_backend_switched():
    """Counts are written inside the graph too. Eager looks at values, which a graph has not, so it is compiled with breaks."""
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    torch._dynamo.reset()
    logits, counts = torch.randn(3, 70), torch.zeros(3, 70, dtype=torch.int32)
    draw = lambda x, c: run(x, 0.8, top_k=9, top_p=0.9, presence=0.3, counts=c)  # noqa: E731
    with backend(sample="eager"):
        right, counted = draw(logits, wanted := counts.clone()), wanted
    for full, names in ((True, ("cpp",)), (False, ("eager", "cpp"))):
        compiled = torch.compile(draw, fullgraph=full, backend="aot_eager")
        for name in names:
            with backend(sample=name):
                found = compiled(logits, written := counts.clone())
            assert torch.equal(found.token, right.token) and torch.equal(written, counted), name
    torch._dynamo.reset()
