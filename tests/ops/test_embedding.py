"""embedding: the definition against the formula, the glue, ids outside the tables."""

import pytest
import torch

from gptfast import Error, ops
from gptfast.ops.embedding import eager

pytestmark = pytest.mark.usefixtures("eager")


def forward(ids, positions, wte, wpe):
    assert ids.dim() == 2 and ids.shape == positions.shape and ids.is_contiguous() and positions.is_contiguous()
    return wte[ids.long()] + wpe[positions.long()]


def backward(dy, ids, positions, tokens, places):
    assert dy.is_contiguous()
    flat = dy.flatten(0, 1)
    tables = [torch.zeros(n, dy.shape[-1], dtype=dy.dtype) for n in (tokens, places)]
    for table, index in zip(tables, (ids, positions), strict=True):
        table.index_add_(0, index.flatten(), flat)
    return tables[0], tables[1]


def case(ids_shape=(2, 5), dtype=torch.int64):
    return [torch.randint(0, 9, ids_shape, dtype=dtype), torch.arange(5, dtype=dtype).expand(ids_shape),
            torch.randn(9, 6).double(), torch.randn(8, 6).double()]


@pytest.mark.parametrize("upstream", ["dense", "transposed", "expanded"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_formula(formula, same, upstream, dtype):
    with formula("embedding", forward, backward):
        same(ops.embedding, eager, case(dtype=dtype), upstream=upstream)


@pytest.mark.parametrize("shape", [(5,), (3, 2, 5), (0, 5), (1, 5)])
def test_shapes_of_ids(formula, same, shape):
    inputs = case(shape)
    with formula("embedding", forward, backward):
        same(ops.embedding, eager, inputs)
        same(lambda i, p, *tables: ops.embedding(i, torch.arange(5), *tables), eager, inputs)
        same(lambda *a: ops.embedding(*a[:2], a[2].t().contiguous().t(), a[3]), eager, inputs)


@pytest.mark.parametrize("wanted", [(False, False, True, False), (False, False, False, True)])
def test_gradient_of_one_table(formula, same, wanted):
    with formula("embedding", forward, backward):
        same(ops.embedding, eager, case(), wanted)


def test_rows_of_one_id_add_up():
    ids = torch.tensor([[3, 3, 1, 3]])
    wte, wpe = torch.randn(5, 2, dtype=torch.float64, requires_grad=True), torch.randn(4, 2, dtype=torch.float64)
    ops.embedding(ids, torch.arange(4), wte, wpe).sum().backward()
    assert wte.grad.tolist() == [[0, 0], [1, 1], [0, 0], [3, 3], [0, 0]]


def test_gradcheck():
    ids, positions, wte, wpe = case()
    assert torch.autograd.gradcheck(lambda a, b: ops.embedding(ids, positions, a, b), (wte.requires_grad_(), wpe.requires_grad_()))


def test_compile(formula, compiled, same):
    inputs = case()
    same(compiled(lambda *a: ops.embedding(*a)), eager, inputs)
    torch._dynamo.reset()
    with formula("embedding", forward, backward):
        same(compiled(lambda *a: ops.embedding(*a)), eager, inputs)


def test_bad_input():
    ids, positions, wte, wpe = case()
    for wrong in (9, -1):
        ids[1, 2] = wrong
        with pytest.raises(Error, match=f"embedding: ids holds {wrong}; allowed: 0 to 8"):
            ops.embedding(ids, positions, wte, wpe)
    ids[1, 2] = 0
    with pytest.raises(Error, match="positions holds 8; allowed: 0 to 7"):
        ops.embedding(ids, positions + 4, wte, wpe)
    with pytest.raises(Error, match="ids has dtype float32; allowed: int64, int32"):
        ops.embedding(ids.float(), positions, wte, wpe)
    with pytest.raises(Error, match=r"positions have shape \(3,\), ids \(2, 5\)"):
        ops.embedding(ids, torch.arange(3), wte, wpe)
    with pytest.raises(Error, match=r"\(9, 6\) and \(8, 5\)"):
        ops.embedding(ids, positions, wte, wpe[:, :5])
    with pytest.raises(Error, match="the dtypes differ \\(wte float64, wpe float32\\)"):
        ops.embedding(ids, positions, wte, wpe.float())
