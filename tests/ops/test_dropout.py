"""dropout: the definition against the noise word by word, the glue, edge cases."""

import math

import pytest
import torch

from gptfast import Error, backend, ops, philox, testing
from gptfast.ops.dropout import eager
from gptfast.testing import LAYOUTS, Target, arrange, check_op, random, same_bits

pytestmark = pytest.mark.usefixtures("eager")
SEED = torch.tensor([-7_000_000_000_123])


def forward(x, p, seed):
    assert x.dim() == 2 and x.is_contiguous()
    y = torch.zeros_like(x)
    for n in range(x.shape[0]):
        for c in range(x.shape[1]):
            if int(philox.words(int(seed), c, n, 0, 1)) >= p * 2**32:
                y[n, c] = x[n, c] / (1 - p)
    return y


@pytest.mark.parametrize("upstream", ["dense", "transposed", "expanded"])
def test_formula(formula, same, upstream):
    with formula("dropout", forward, forward):
        same(ops.dropout, eager, [torch.randn(2, 3, 5).double(), 0.3, SEED], upstream=upstream)


def test_strided_input(formula, same):
    with formula("dropout", forward, forward):
        for view in (lambda x: x.t()[:, ::2], lambda x: x[:1].expand(3, 4)):
            same(lambda x: ops.dropout(view(x), 0.5, SEED), lambda x: eager(view(x), 0.5, SEED), [torch.randn(7, 4).double()])  # noqa: B023


def test_share_and_scale():
    x = torch.ones(500, 300)
    y = ops.dropout(x, 0.25, SEED)
    kept = y != 0
    assert abs(float(kept.double().mean()) - 0.75) < 5 * math.sqrt(0.25 * 0.75 / x.numel())
    assert bool((y[kept] == torch.tensor(1 / 0.75)).all())
    assert not torch.equal(y, ops.dropout(x, 0.25, SEED + 1)) and torch.equal(y, ops.dropout(x, 0.25, SEED))


def test_the_boundary_is_exact():
    word = int(philox.words(int(SEED), 0, 0, 0, 1))
    x = torch.ones(1, 1)
    assert ops.dropout(x, word / 2**32, SEED) != 0 and ops.dropout(x, (word + 1) / 2**32, SEED) == 0
    assert ops.dropout(x, (word + 2**-20) / 2**32, SEED) == 0


def test_rows_do_not_depend_on_how_they_are_shaped():
    x = torch.randn(2, 3, 4)
    assert torch.equal(ops.dropout(x, 0.5, SEED).flatten(0, 1), ops.dropout(x.flatten(0, 1), 0.5, SEED))


def test_ends_of_the_range():
    x = torch.randn(3, 4)
    x[1, 1] = math.nan
    assert ops.dropout(x, 0.0, SEED) is x
    assert torch.equal(ops.dropout(x, 1.0, SEED), torch.zeros(3, 4))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (5,), (1, 1)])
def test_sizes(formula, same, shape):
    with formula("dropout", forward, forward):
        same(ops.dropout, eager, [torch.randn(shape).double(), 0.5, SEED])


def test_gradcheck_and_dtype():
    assert torch.autograd.gradcheck(lambda x: ops.dropout(x, 0.4, SEED), torch.randn(3, 5, dtype=torch.float64, requires_grad=True))
    x = torch.randn(3, 5, dtype=torch.bfloat16, requires_grad=True)
    y = ops.dropout(x, 0.4, SEED)
    assert y.dtype == torch.bfloat16 and torch.autograd.grad(y.sum(), x)[0].dtype == torch.bfloat16


def test_compile(compiled, same):
    same(compiled(lambda x, p, s: ops.dropout(x, p, s)), eager, [torch.randn(3, 5).double(), 0.5, SEED])


def test_compile_of_the_glue(formula, compiled, same):
    with formula("dropout", eager, eager):
        same(compiled(lambda x, p, s: ops.dropout(x, p, s)), eager, [torch.randn(3, 5).double(), 0.5, SEED])


def test_bad_input():
    x = torch.randn(3, 4)
    for p in (-0.1, 1.5, math.nan):
        with pytest.raises(Error, match=f"the dropout probability is {p}; allowed: 0 to 1"):
            ops.dropout(x, p, SEED)
    with pytest.raises(Error, match="seed is float32 of shape \\(1,\\); needed is an int64 tensor"):
        ops.dropout(x, 0.5, SEED.float())
    with pytest.raises(Error, match="seed is None"):
        ops.dropout(x, 0.5, None)


# --------------------------------------------------------------------------------------------- the kernels: eager's bits, not less

SHAPES = [(2, 3, 768), (5, 1), (1, 7), (4, 65), (6, 64), (3, 17), (0, 65), (7, 0), (130, 33), (3, 15), (2, 129), (2, 31)]


def check(x, target, p=0.3, **more):
    fast = check_op("dropout", ops.dropout, eager, {"x": x, "p": p, "seed": SEED}, target, **more)
    assert same_bits(fast["y"], eager(x.detach(), p, SEED))
    return fast


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(target, shape):
    check(random(*shape, dtype=target.dtype).requires_grad_(), target)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts(target, layout):
    check(arrange(random(3, 4, 65, dtype=target.dtype), layout).requires_grad_(), target, grad_layout=layout)


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63), 1 << 32])
@pytest.mark.parametrize("p", [2.0**-33, 0.1, 0.5, 0.9, 1 - 2.0**-33, 1.0])
def test_probabilities_and_seeds(seed, p):
    """What is dropped is eager's choice, bit for bit, forward and backward, NaN and infinity among the dropped."""
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    x, seed = random(5, 203), torch.tensor([seed])
    x[1, 3:90], x[2, 5:70] = math.nan, math.inf
    leaf = backend.impl("dropout", "cpp")
    assert same_bits(leaf.forward(x, p, seed), eager(x, p, seed))
    assert same_bits(leaf.backward(x, p, seed), eager(x, p, seed))


def test_the_boundary_is_exact_in_the_kernel():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    x, words = torch.ones(2, 70), philox.row_words(SEED, 70, torch.arange(2).view(2, 1), 0, philox.PURPOSE_DROPOUT)
    for n, c in ((0, 0), (0, 69), (1, 5), (1, 64)):
        word = int(words[n, c])
        for threshold in (word / 2**32, (word + 1) / 2**32, (word + 2**-20) / 2**32):
            y = torch.ops.gptfast.dropout(x, threshold, SEED)
            assert bool(y[n, c] != 0) == (threshold * 2**32 <= word)
    assert same_bits(torch.ops.gptfast.dropout(x, 0.0, SEED), x)


@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_instruction_set(isa, precision):
    target = Target("cpp", precision, "cpp")
    with testing.forced_isa(isa):
        for shape in ((5, 1), (9, 65), (70, 96), (3, 47)):
            check(random(*shape, dtype=target.dtype).requires_grad_(), target)


@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
def test_one_thread_and_two_give_the_same_bits(isa):
    x, threads = random(3000, 33), torch.get_num_threads()
    with testing.forced_isa(isa):
        try:
            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(torch.ops.gptfast.dropout(x, 0.3, SEED))
        finally:
            torch.set_num_threads(threads)
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


def test_wrong_results_are_rejected():
    """The selection is compared bit by bit above; the rule alone sees another seed, row or column, and a missing scale."""
    x = random(9, 24)
    own, ref = eager(x, 0.3, SEED), eager(x.double(), 0.3, SEED)
    keep = eager(torch.ones_like(x), 0.3, SEED) != 0
    wrong = testing.wrong_results(own) | {
        "no scale": x * keep, "all kept": x / 0.7, "kept and dropped swapped": x / 0.7 * ~keep,
        "another seed": eager(x, 0.3, SEED + 1), "the next row's noise": x / 0.7 * keep.roll(1, 0),
        "the next column's noise": x / 0.7 * keep.roll(1, 1),
    }  # fmt: skip
    for what, value in wrong.items():
        testing.assert_rejected(what, value, own, ref)


def test_opcheck():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    for dtype in (torch.float32, torch.bfloat16):
        for leaf in (torch.ops.gptfast.dropout.default, torch.ops.gptfast.dropout_backward.default):
            torch.library.opcheck(leaf, (random(5, 33, dtype=dtype), 0.3, SEED))


def test_leaf_checks_its_contract():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    x = torch.randn(4, 6)
    for arguments, message in (
        ((x[:, ::2], 0.5, SEED), "not contiguous"),
        ((x[0], 0.5, SEED), "rows need 2"),
        ((x.double(), 0.5, SEED), "allowed: fp32, bf16, fp16"),
        ((x, 1.5, SEED), "p is 1.5, allowed: 0 to 1"),
        ((x, -0.5, SEED), "p is -0.5"),
        ((x, math.nan, SEED), "p is nan"),
        ((x, 0.5, SEED.int()), "seed is Int"),
        ((x, 0.5, SEED.repeat(2)), "seed has 2 elements"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.gptfast.dropout(*arguments)


def test_compile_with_the_kernels(compiled):
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    inputs, pull = {"x": random(4, 33).requires_grad_(), "p": 0.3, "seed": SEED}, {"y": torch.randn(4, 33)}
    with backend(dropout="cpp"):
        right = testing.evaluate(ops.dropout, inputs, upstream=pull)
        found = testing.evaluate(compiled(lambda **a: ops.dropout(**a)), inputs, upstream=pull)
    assert all(same_bits(value, found[name]) for name, value in right.items())


def test_a_compiled_function_sees_the_choice():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    graphs = []

    def keep(module, inputs):
        graphs.append(" ".join(str(node.target) for node in module.graph.nodes))
        return module.forward

    torch._dynamo.reset()
    function = torch.compile(lambda x, s: ops.dropout(x, 0.5, s), fullgraph=True, backend=keep)
    for name in ("cpp", "eager", "cpp"):
        with torch.no_grad(), backend(dropout=name):
            function(torch.randn(4, 33), SEED)
    assert ["gptfast.dropout" in graph for graph in graphs] == [True, False]
    torch._dynamo.reset()
