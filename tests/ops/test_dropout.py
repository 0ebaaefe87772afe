"""dropout: the definition against the noise word by word, the glue, edge cases."""

import math

import pytest
import torch

from gptfast import Error, ops, philox
from gptfast.ops.dropout import eager

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
