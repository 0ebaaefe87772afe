"""embedding: the definition against the formula, the glue, ids outside the tables."""

import pytest
import torch

from gptfast import Error, backend, ops, testing
from gptfast.ops.embedding import eager
from gptfast.testing import Target, check_op, random, same_bits

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


# --------------------------------------------------------------------------------------------------- the kernels, by the tolerance

SHAPES = [((2, 5), 768), ((3, 4), 1), ((1, 7), 65), ((4, 3), 64), ((2, 3), 15), ((5, 2), 33), ((0, 5), 7), ((2, 0), 7), ((2, 3), 0)]


def sample(shape, columns, dtype, vocab=9, context=8, kind=torch.int64):
    """ids, positions, wte, wpe; the tables require grad. Some ids come more than once, some never."""
    tables = {name: random(size, columns, dtype=dtype).requires_grad_() for name, size in (("wte", vocab), ("wpe", context))}
    draw = {name: torch.randint(0, size, shape, dtype=kind) for name, size in (("ids", vocab), ("positions", context))}
    return draw | tables


def check(inputs, target, **more):
    return check_op("embedding", ops.embedding, eager, inputs, target, **more)


@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
@pytest.mark.parametrize(("shape", "columns"), SHAPES, ids=str)
def test_kernel_shapes(target, shape, columns, kind):
    check(sample(shape, columns, target.dtype, kind=kind), target)


def test_ids_of_two_dtypes_and_a_row_of_positions(target):
    inputs = sample((2, 5), 65, target.dtype)
    inputs["ids"], inputs["positions"] = inputs["ids"].int(), torch.arange(5)
    check(inputs, target)
    inputs["positions"] = inputs["positions"].int().expand(2, 5)
    inputs["ids"] = inputs["ids"].long()
    check(inputs, target)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "offset", "sliced"])
def test_layouts(target, layout):
    inputs = sample((3, 4), 33, target.dtype)
    inputs["wte"] = random(33, 18, dtype=target.dtype).t()[::2].detach().requires_grad_()
    inputs["ids"] = torch.randint(0, 9, (4, 6)).t()[::2]
    check(inputs, target, grad_layout=layout)


def test_one_id_many_times(target):
    """A sum of 1,000 rows in their order, exactly as a loop of fp32 additions; every other row of the table is zero."""
    dy = random(4, 250, 47, dtype=target.dtype)
    ids = torch.full((4, 250), 2)
    with testing.poisoned():
        dwte, dwpe = backend.impl("embedding", "cpp").backward(dy, ids, torch.arange(1000).view(4, 250) % 3, 5, 4)
    total, by_place = torch.zeros(47), torch.zeros(4, 47)
    for n, row in enumerate(dy.flatten(0, 1).float()):
        total += row
        by_place[n % 3] += row
    assert same_bits(dwte[2], total) and same_bits(dwpe[:3], by_place[:3]) and not dwpe[3].any() and not dwte[[0, 1, 3, 4]].any()


def test_a_table_past_the_caches():
    """GPT-2's own table: written in streams, zeros included."""
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    ids = torch.randint(0, 50257, (2, 100))
    ids[0, :4] = torch.tensor([0, 50256, 50256, 1])
    dy = random(2, 100, 768)
    with testing.poisoned():
        dwte, dwpe = backend.impl("embedding", "cpp").backward(dy, ids, torch.arange(100).repeat(2, 1), 50257, 1024)
    right = torch.zeros(50257, 768).index_add_(0, ids.flatten(), dy.flatten(0, 1))
    torch.testing.assert_close(dwte, right, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dwpe[:100], dy.sum(0), rtol=1e-6, atol=1e-6)
    assert not dwpe[100:].any()


@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
def test_an_id_outside_the_table_is_a_row_of_nan_and_no_gradient(target, kind):
    """In a compiled graph nobody checks ids before the kernel."""
    inputs = {name: value.detach() for name, value in sample((3, 4), 33, target.dtype, kind=kind).items()}
    wrong = torch.iinfo(kind)
    clean = {name: value.clone() for name, value in inputs.items()}
    for place, (name, value) in {(0, 0): ("ids", 9), (0, 1): ("ids", -1), (1, 2): ("positions", 8), (1, 3): ("positions", -1),
                                 (2, 0): ("ids", wrong.max), (2, 3): ("positions", wrong.min)}.items():
        inputs[name][place] = value
    leaf = backend.impl("embedding", "cpp")
    y = leaf.forward(*inputs.values())
    right = leaf.forward(*clean.values())
    bad = torch.tensor([[True, True, False, False], [False, False, True, True], [True, False, False, True]])
    assert y[bad].isnan().all() and same_bits(y[~bad], right[~bad])
    dy = random(3, 4, 33, dtype=target.dtype)
    dwte, dwpe = leaf.backward(dy, inputs["ids"], inputs["positions"], 9, 8)
    for found, name, size in ((dwte, "ids", 9), (dwpe, "positions", 8)):
        inside = (inputs[name] >= 0) & (inputs[name] < size)
        expected = torch.zeros(size, 33).index_add_(0, inputs[name][inside].long(), dy[inside].float())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_nan_in_a_table_stays_in_its_rows(target):
    inputs = sample((2, 5), 33, target.dtype)
    with torch.no_grad():
        inputs["wte"][3, 32] = float("nan")
    y = check(inputs, target)["y"]
    assert torch.equal(y.isnan().any(-1), inputs["ids"] == 3)


@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_instruction_set(isa, precision):
    target = Target("cpp", precision, "cpp")
    with testing.forced_isa(isa):
        for shape, columns in (((2, 5), 1), ((3, 7), 65), ((2, 40), 96)):
            check(sample(shape, columns, target.dtype), target)
    if precision == "fp32":
        with testing.forced_isa(isa):
            dy, ids = random(1, 50, 768), torch.arange(50).view(1, 50) * 120
            dwte = backend.impl("embedding", "cpp").backward(dy, ids, ids, 6000, 0)[0]
        assert same_bits(dwte[::120], dy[0]) and int((dwte != 0).any(1).sum()) == 50


@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
def test_one_thread_and_two_give_the_same_bits(isa):
    inputs, results, threads = sample((8, 300), 33, torch.float32, 5000, 300), [], torch.get_num_threads()
    with testing.forced_isa(isa), backend(embedding="cpp"):
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(testing.evaluate(ops.embedding, inputs, upstream={"y": torch.ones(8, 300, 33)}))
        finally:
            torch.set_num_threads(threads)
    for name, value in results[0].items():
        assert all(same_bits(value, other[name]) for other in results[1:]), name


# ---------------------------------------------------------------------------------------------------------- wrong results are seen


def without_positions(ids, positions, wte, wpe):
    return wte[ids] + 0 * wpe[positions]


def of_the_next_id(ids, positions, wte, wpe):
    return wte[(ids + 1) % 9] + wpe[positions]


def last_token_missing(ids, positions, wte, wpe):
    """The right y with gradients that lack the last token's share."""
    y = eager(ids, positions, wte, wpe)
    return torch.cat([y[:, :-1], y[:, -1:].detach()], 1)


def first_of_equal_ids_only(ids, positions, wte, wpe):
    y = eager(ids, positions, wte, wpe)
    return torch.where(ids.unsqueeze(-1) == ids[0, 0], y.detach(), y)


WRONG = {without_positions: ["y", "dwpe"], of_the_next_id: ["y", "dwte"], last_token_missing: ["dwte", "dwpe"],
         first_of_equal_ids_only: ["dwte"]}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_wrong_results_are_rejected(precision):
    inputs = sample((4, 5), 24, testing.checks.DTYPES[precision])
    pull = {"y": torch.randn(4, 5, 24).to(inputs["wte"].dtype)}
    own = testing.evaluate(eager, inputs, upstream=pull)
    exact = {name: testing.checks.in_double(value) for name, value in inputs.items()}
    ref = testing.evaluate(eager, exact, upstream={"y": pull["y"].double()})
    for name, value in own.items():
        for what, wrong in testing.wrong_results(value).items():
            if not (what == "stale row" and same_bits(wrong, value)):
                testing.assert_rejected(f"{name}: {what}", wrong, value, ref[name], gradient=name != "y")
    for function, names in WRONG.items():
        found = testing.evaluate(function, inputs, upstream=pull)
        for name in names:
            testing.assert_rejected(f"{name}: {function.__name__}", found[name], own[name], ref[name], gradient=name != "y")


# ----------------------------------------------------------------------------------------------------- dispatcher, compile, errors


def test_opcheck():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    for dtype, kind in ((torch.float32, torch.int64), (torch.bfloat16, torch.int32)):
        inputs = [value.detach() for value in sample((2, 5), 33, dtype, kind=kind).values()]
        torch.library.opcheck(torch.ops.gptfast.embedding.default, inputs)
        torch.library.opcheck(torch.ops.gptfast.embedding_backward.default, (random(2, 5, 33, dtype=dtype), *inputs[:2], 9, 8))


def test_leaf_checks_its_contract():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    ids, positions, wte, wpe = (value.detach() for value in sample((2, 5), 6, torch.float32).values())
    for arguments, message in (
        ((ids.float(), positions, wte, wpe), "ids is Float, allowed: int64, int32"),
        ((ids, positions.short(), wte, wpe), "positions is Short"),
        ((ids[0], positions[0], wte, wpe), "ids has 1 dimensions"),
        ((ids, positions[:1], wte, wpe), "positions has shape"),
        ((ids.t(), positions.t(), wte, wpe), "not contiguous"),
        ((ids, positions, wte[:, ::2], wpe), "not contiguous"),
        ((ids, positions, wte, wpe[:, :3].contiguous()), "wpe has shape"),
        ((ids, positions, wte, wpe.bfloat16()), "wpe is"),
        ((ids, positions, wte.double(), wpe.double()), "allowed: fp32, bf16, fp16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.gptfast.embedding(*arguments)
    dy = torch.randn(2, 5, 6)
    for arguments, message in (
        ((dy[0], ids, positions, 9, 8), "dy has 2 dimensions"),
        ((dy[:1], ids, positions, 9, 8), "dy has shape"),
        ((dy.double(), ids, positions, 9, 8), "allowed: fp32, bf16, fp16"),
        ((dy[..., ::2], ids, positions, 9, 8), "not contiguous"),
        ((dy, ids, positions, -1, 8), "vocab is -1"),
        ((dy, ids.bool(), positions, 9, 8), "ids is Bool"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.gptfast.embedding_backward(*arguments)


def test_compile_with_the_kernels(compiled):
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    inputs, pull = sample((2, 5), 33, torch.float32), {"y": torch.randn(2, 5, 33)}
    with backend(embedding="cpp"):
        right = testing.evaluate(ops.embedding, inputs, upstream=pull)
        found = testing.evaluate(compiled(lambda **a: ops.embedding(**a)), inputs, upstream=pull)
    assert all(same_bits(value, found[name]) for name, value in right.items())


def test_a_compiled_function_sees_the_choice():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    graphs = []

    def keep(module, inputs):
        graphs.append(" ".join(str(node.target) for node in module.graph.nodes))
        return module.forward

    torch._dynamo.reset()
    function = torch.compile(lambda *a: ops.embedding(*a), fullgraph=True, backend=keep)
    for name in ("cpp", "eager", "cpp"):
        with torch.no_grad(), backend(embedding=name):
            function(*sample((2, 5), 33, torch.float32).values())
    assert ["gptfast.embedding" in graph for graph in graphs] == [True, False]
    torch._dynamo.reset()
