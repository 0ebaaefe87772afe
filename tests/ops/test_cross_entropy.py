"""cross_entropy: the definition against the formula, ignored targets, padded vocabulary, reductions, the glue; every kernel by the
tolerance, its blocks and tails, non-finite rows, bits, wrong results that must not pass."""

import math

import pytest
import torch

from gptfast import Error, backend, ops, testing
from gptfast.ops.cross_entropy import eager
from gptfast.testing import LAYOUTS, Target, arrange, check_op, random, same_bits

pytestmark = pytest.mark.usefixtures("eager")
TARGETS = torch.tensor([[3, -100, 0, 5], [-100, 8, 8, 1]])


def forward(logits, targets, ignore_index, vocab):
    assert logits.dim() == 2 and logits.is_contiguous() and targets.shape == logits.shape[:1] and targets.is_contiguous()
    x = logits[:, :vocab]
    lse = x.logsumexp(1)
    target = torch.where(targets == ignore_index, 0, targets).long()
    return torch.where(targets == ignore_index, 0, lse - x.gather(1, target[:, None])[:, 0]), lse


def backward(dloss, logits, targets, lse, ignore_index, vocab):
    assert dloss.is_contiguous() and dloss.shape == lse.shape
    p = torch.exp(logits - lse[:, None])
    p = p - (torch.arange(logits.shape[1]) == targets[:, None]).to(p.dtype)
    p = torch.where((targets == ignore_index)[:, None] | (torch.arange(logits.shape[1]) >= vocab), 0, p)
    return dloss[:, None] * p


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("vocab", [None, 9])
@pytest.mark.parametrize("upstream", ["dense", "transposed", "expanded"])
def test_formula(formula, same, reduction, vocab, upstream):
    inputs = [torch.randn(2, 4, 13).double() * 3, TARGETS, -100, vocab, reduction]
    with formula("cross_entropy", forward, backward):
        same(ops.cross_entropy, eager, inputs, upstream=upstream)


def test_padded_columns_and_ignored_rows_take_no_gradient():
    logits = torch.randn(2, 4, 13, requires_grad=True)
    with torch.no_grad():
        logits[..., 9:] = math.inf  # whatever lies there
    (g,) = torch.autograd.grad(ops.cross_entropy(logits, TARGETS, vocab=9), logits)
    assert not g[..., 9:].any() and not g[TARGETS == -100].any() and g[TARGETS != -100][:, :9].all()
    wanted = torch.nn.functional.cross_entropy(logits[..., :9].flatten(0, 1), TARGETS.flatten())
    assert torch.equal(ops.cross_entropy(logits, TARGETS, vocab=9), wanted)


@pytest.mark.parametrize("index", [-100, 7, -1])
@pytest.mark.parametrize("context", ["eager", "formula"])
def test_all_ignored(formula, index, context):
    logits, targets = torch.randn(3, 9, requires_grad=True), torch.full((3,), index)
    with backend("eager") if context == "eager" else formula("cross_entropy", forward, backward):
        loss = ops.cross_entropy(logits, targets, index, reduction="sum")
        assert loss == 0 and not torch.autograd.grad(loss, logits)[0].any()
        assert ops.cross_entropy(logits, targets, index).isnan()
        assert not ops.cross_entropy(logits, targets, index, reduction="none").any()


@pytest.mark.parametrize("shape", [(0, 9), (2, 0, 9), (9,), (1, 1)])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_sizes(formula, same, shape, reduction):
    inputs = [torch.randn(shape).double(), torch.zeros(shape[:-1], dtype=torch.int64), -100, None, reduction]
    with formula("cross_entropy", forward, backward):
        same(ops.cross_entropy, eager, inputs)


def test_strided_and_expanded_logits(formula, same):
    def through(op):
        return lambda x, t: op(x.transpose(0, 1)[..., ::2], t, -100, 9) + op(x[:1, :1].expand(4, 2, 26), t)

    with formula("cross_entropy", forward, backward):
        same(through(ops.cross_entropy), through(eager), [torch.randn(2, 4, 26).double(), TARGETS.t()])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction):
    logits = torch.randn(2, 4, 11, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.cross_entropy(x, TARGETS, vocab=9, reduction=reduction), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_are_computed_in_fp32(dtype):
    logits = torch.randn(8, 50, requires_grad=True)
    low, targets = logits.detach().to(dtype).requires_grad_(), torch.randint(0, 50, (8,), dtype=torch.int32)
    with torch.autocast("cpu", dtype):
        loss = ops.cross_entropy(low, targets)
    assert loss.dtype == torch.float32 and torch.equal(loss, ops.cross_entropy(low.float(), targets))
    assert torch.autograd.grad(loss, low)[0].dtype == dtype


def test_shift_changes_nothing_and_large_logits_stay_finite():
    logits = torch.randn(2, 4, 13).double()
    torch.testing.assert_close(ops.cross_entropy(logits + 1e4, TARGETS), ops.cross_entropy(logits, TARGETS))
    assert ops.cross_entropy(logits * 1e300, TARGETS).isfinite()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile(formula, compiled, same, reduction):
    inputs = [torch.randn(2, 4, 13).double(), TARGETS, -100, 9, reduction]
    same(compiled(lambda *a: ops.cross_entropy(*a)), eager, inputs)
    torch._dynamo.reset()
    with formula("cross_entropy", forward, backward):
        same(compiled(lambda *a: ops.cross_entropy(*a)), eager, inputs)


@pytest.mark.parametrize("op", [ops.cross_entropy, lambda x, *a, **k: ops.cross_entropy_(x.clone(), *a, **k),
                                lambda x, *a, **k: ops.linear_cross_entropy(x, torch.eye(13), *a, **k)])
def test_bad_input(op):
    logits = torch.randn(2, 4, 13)
    for wrong in (9, -1, 13):
        with pytest.raises(Error, match=f"targets holds {wrong}; allowed: 0 to 8"):
            op(logits, torch.where(TARGETS == 5, wrong, TARGETS), vocab=9)
    with pytest.raises(Error, match=r"targets have shape \(2, 3\), needed is \(2, 4\)"):
        op(logits, TARGETS[:, :3])
    with pytest.raises(Error, match="reduction is 'avg'; allowed: mean, sum, none"):
        op(logits, TARGETS, reduction="avg")
    for vocab in (0, 14):
        with pytest.raises(Error, match=f"vocab is {vocab}; allowed: 1 to 13"):
            op(logits, TARGETS, vocab=vocab)
    with pytest.raises(Error, match="targets has dtype float32"):
        op(logits, TARGETS.float())


# ------------------------------------------------------------------------------------------------------------- kernels, by the rule

ISAS = ("plain", "avx2", "avx512")
# columns around a register, four of them and a block of 1024
COLUMNS = (1, 3, 16, 17, 63, 65, 130, 1023, 1025, 2100)


def parts(targets, vocab, ignore_index=-100):
    """Target columns, other real columns of rows that count, padded columns and ignored rows, to be compared apart."""
    flat = targets.reshape(-1).long()
    counted = flat != ignore_index

    def split(gradient):
        rows = gradient.reshape(-1, gradient.shape[-1])
        hit = torch.arange(vocab, device=rows.device) == flat[:, None]
        real = rows[counted, :vocab]
        return {"target": real[hit[counted]], "others": real[~hit[counted]], "padding": rows[:, vocab:], "ignored": rows[~counted]}

    return split


def sample(rows, columns, dtype, device="cpu", vocab=None, layout="contiguous", kind=torch.int64, **more):
    size = columns if vocab is None else vocab
    targets = torch.randint(0, size, (rows,), dtype=kind, device=device)
    targets[1::5] = -100
    logits = arrange(random(rows, columns, dtype=dtype, device=device, scale=3.0), layout).requires_grad_()
    return {"logits": logits, "targets": targets, "ignore_index": -100, "vocab": size, "reduction": "none"} | more


def check(inputs, target, **more):
    slices = {"dlogits": parts(inputs["targets"], inputs["vocab"])}
    fast = check_op("cross_entropy", ops.cross_entropy, eager, inputs, target, slices=slices, **more)
    assert not fast["dlogits"][..., inputs["vocab"] :].any()
    return fast


@pytest.mark.parametrize("columns", COLUMNS)
def test_columns(target: Target, columns):
    check(sample(6, columns, target.dtype, target.device), target)
    check(sample(3, columns, target.dtype, target.device, vocab=max(1, columns - 5), kind=torch.int32), target)


def test_the_vocabulary_of_gpt2(target: Target):
    columns, vocab = (1100, 1057) if target.proof == "triton-interpret" else (50304, 50257)
    check(sample(5, columns, target.dtype, target.device, vocab=vocab), target)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts(target: Target, layout):
    check(sample(6, 70, target.dtype, target.device, vocab=65, layout=layout), target, grad_layout=layout)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(target: Target, reduction):
    check(sample(70, 33, target.dtype, target.device, reduction=reduction), target, long_sums=("y",))


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_a_maximum_that_moves_from_block_to_block(target: Target, order):
    inputs = sample(6, 2100, target.dtype, target.device)
    ramp = torch.linspace(-40, 40, 2100) * (1 if order == "rising" else -1)
    inputs["logits"] = (inputs["logits"].detach() + ramp.to(inputs["logits"])).requires_grad_()
    check(inputs, target)


@pytest.mark.parametrize("columns", [20, 1030])
def test_rows_that_are_sure_of_their_target(target: Target, columns):
    """The loss is a small number, not the rounding of a large one."""
    inputs = sample(8, columns, target.dtype, target.device)
    logits = inputs["logits"].detach() * 0.1
    inputs["targets"] = torch.arange(columns - 8, columns, device=target.device)
    logits[torch.arange(8), inputs["targets"]] = 12.0
    check(inputs | {"logits": logits.requires_grad_()}, target)


@pytest.mark.parametrize("place", [0, 18, 1029])
def test_rows_that_are_not_finite(target: Target, place):
    inputs = sample(8, 1030, target.dtype, target.device)
    inputs["targets"] = torch.tensor([3, place, 3, place, 3, place, 3, 3], device=target.device)
    with torch.no_grad():
        for row, value in ((0, math.inf), (1, math.inf), (2, math.nan), (3, -math.inf), (4, -math.inf)):
            inputs["logits"][row, place] = value
        inputs["logits"][5] = -math.inf
        inputs["logits"][6, 4:] = -math.inf
    fast = check(inputs, target)
    assert fast["y"][[0, 1, 2, 5]].isnan().all() and fast["y"][3] == math.inf and fast["dlogits"][[0, 1, 2, 5]].isnan().all()


def test_logits_at_the_ends_of_the_range(target: Target):
    inputs = sample(3, 40, target.dtype, target.device)
    largest = torch.finfo(target.dtype).max
    with torch.no_grad():
        inputs["logits"][0, 5], inputs["logits"][0, 6], inputs["logits"][2] = largest, -largest, -largest
    check(inputs | {"targets": torch.tensor([5, 1, 7], device=target.device)}, target)


def test_an_ignored_row_may_hold_anything(target: Target):
    inputs = sample(4, 40, target.dtype, target.device)
    with torch.no_grad():
        inputs["logits"][1] = math.nan
    with target.force("cross_entropy"):
        loss = ops.cross_entropy(**inputs)
        (dlogits,) = torch.autograd.grad(loss, inputs["logits"], torch.ones_like(loss))
    assert loss[1] == 0 and not dlogits[1].any() and dlogits[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
def test_a_target_outside_the_vocabulary_gives_a_nan_row(target: Target, kind):
    forward, backward = backend.impl("cross_entropy", target.backend)
    logits = random(7, 24, dtype=target.dtype, device=target.device)
    targets = torch.tensor([2, -1, 20, 23, 2**31 - 1, -(2**31), 19], dtype=kind, device=target.device)
    if kind == torch.int64:
        targets[1:3] = torch.tensor([-(2**62), 2**32 + 1])
    loss, lse = forward(logits, targets, -100, 20)
    dlogits = backward(torch.ones_like(loss), logits, targets, lse, -100, 20)
    assert loss.isnan().tolist() == [False, True, True, True, True, True, False] and lse.isfinite().all()
    assert dlogits[1:6, :20].isnan().all() and dlogits[[0, 6]].isfinite().all() and not dlogits[:, 20:].any()


def test_lse(target: Target):
    logits = random(5, 1300, dtype=target.dtype, device=target.device, scale=3.0)
    _, lse = backend.impl("cross_entropy", target.backend).forward(logits, torch.zeros(5, dtype=torch.int64), -100, 1290)
    own, ref = (logits[:, :1290].to(kind).logsumexp(1) for kind in (torch.float32, torch.float64))
    testing.assert_close_to_reference(lse, own, ref, name="lse", long_sum=True)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_instruction_set(isa, precision):
    target = Target("cpp", precision, "cpp")
    with testing.forced_isa(isa):
        for columns, vocab in ((1, 1), (7, 5), (16, 16), (41, 37), (70, 64), (1100, 1061)):
            check(sample(6, columns, target.dtype, vocab=vocab), target)
        check(sample(2, 50304, target.dtype, vocab=50257), target)  # as many terms as there are to sum


@pytest.mark.parametrize("isa", ISAS)
def test_bits_do_not_depend_on_threads(isa):
    results, threads, inputs = [], torch.get_num_threads(), sample(50, 3001, torch.float32)
    with testing.forced_isa(isa), backend.use(cross_entropy="cpp"):
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(testing.evaluate(ops.cross_entropy, inputs, upstream={"y": torch.ones(50)}))
        finally:
            torch.set_num_threads(threads)
    for name, value in results[0].items():
        assert all(same_bits(value, other[name]) for other in results[1:]), name


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_large_gradient_equals_its_parts(isa, dtype):
    """Past 32 MiB it is written around the caches, from the first aligned column of a row on."""
    with testing.forced_isa(isa):
        forward, backward = backend.impl("cross_entropy", "cpp")
        rows, columns = 42 * 16 // torch.empty(0, dtype=dtype).itemsize, 50261
        logits, targets, dloss = torch.randn(rows, columns).to(dtype), torch.randint(0, 50257, (rows,)), torch.randn(rows)
        logits, targets[5] = logits.roll(1), -100
        assert logits.nbytes >= 32 << 20
        _, lse = forward(logits, targets, -100, 50257)
        with testing.poisoned():
            whole = backward(dloss, logits, targets, lse, -100, 50257)
        for some in (slice(0, 3), slice(5, 9), slice(rows - 2, rows)):
            part = backward(dloss[some], logits[some], targets[some], lse[some], -100, 50257)
            assert same_bits(whole[some], part)


def test_row_offsets_exceed_32_bits():
    """Three rows of 2^30 columns, of which memory holds only what is written: 64 real columns each."""
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    logits = torch.empty(3, 1 << 30, dtype=torch.bfloat16)
    logits[:, :64] = torch.randn(3, 64)
    targets = torch.tensor([1, 2, 3])
    loss, lse = backend.impl("cross_entropy", "cpp").forward(logits, targets, -100, 64)
    wanted = backend.impl("cross_entropy", "cpp").forward(logits[:, :64].contiguous(), targets, -100, 64)
    assert same_bits(loss, wanted[0]) and same_bits(lse, wanted[1])


WRONG = {
    "the last column is not in the sum": lambda x, t: eager(x[:, :-1], t, reduction="none") + 0 * x.sum(1),
    "without the target's term": lambda x, t: x.logsumexp(1),
    "the target's neighbour": lambda x, t: eager(x.roll(1, 1), t, reduction="none"),
    "twice the softmax": lambda x, t: eager(x, t, reduction="none") + x.logsumexp(1) - x.logsumexp(1).detach(),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_wrong_results_are_rejected(precision):
    dtype = testing.checks.DTYPES[precision]
    x, targets, upstream = random(9, 40, dtype=dtype).requires_grad_(), torch.arange(9), {"y": torch.randn(9)}

    def run(function, x):
        given = {"x": x, "t": targets}
        return testing.evaluate(function, given, upstream={"y": upstream["y"].to(torch.promote_types(x.dtype, torch.float32))})

    right = run(lambda x, t: eager(x, t, reduction="none"), x)
    ref = run(lambda x, t: eager(x, t, reduction="none"), x.detach().double().requires_grad_())
    split = parts(targets, 40)
    for name, value in right.items():
        rule = {"gradient": name == "dx", "slices": split if name == "dx" else None}
        testing.assert_close_to_reference(value, value, ref[name], name=name, **rule)
        for what, wrong in testing.wrong_results(value).items():
            testing.assert_rejected(f"{name}: {what}", wrong, value, ref[name], **rule)
    for what, function in WRONG.items():
        wrong = run(lambda x, t, f=function: f(x.float(), t), x)
        for name in ("y", "dx") if "twice" not in what else ("dx",):
            rule = {"gradient": name == "dx", "slices": split if name == "dx" else None}
            testing.assert_rejected(f"{name}: {what}", wrong[name], right[name], ref[name], **rule)


# ------------------------------------------------------------------------------------------------------ dispatcher, compile, errors


def test_opcheck():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    for dtype, kind in ((torch.float32, torch.int64), (torch.bfloat16, torch.int32)):
        logits, targets = random(5, 33, dtype=dtype), torch.arange(5, dtype=kind)
        _, lse = torch.ops.gptfast.cross_entropy(logits, targets, -100, 30)
        torch.library.opcheck(torch.ops.gptfast.cross_entropy.default, (logits, targets, -100, 30))
        torch.library.opcheck(torch.ops.gptfast.cross_entropy_backward.default, (torch.ones(5), logits, targets, lse, -100, 30))


def test_leaf_checks_its_contract():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    x, t = torch.randn(4, 6), torch.arange(4)
    for arguments, message in (
        ((torch.randn(4, 12)[:, ::2], t, -100, 6), "logits is not contiguous"),
        ((x[0], t, -100, 6), "rows need 2"),
        ((x.double(), t, -100, 6), "allowed: fp32, bf16, fp16"),
        ((x, t[:3], -100, 6), "targets has shape"),
        ((x, t.short(), -100, 6), "targets is Short, allowed: int64, int32"),
        ((x, t, -100, 7), "vocab is 7, allowed: 1 to 6"),
        ((x, t, -100, 0), "vocab is 0"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.gptfast.cross_entropy(*arguments)
    four = torch.ones(4)
    for dloss, lse, message in ((four[:3], four, "dloss has shape"), (four, four[:3], "lse has"), (four, four.double(), "lse is")):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.gptfast.cross_entropy_backward(dloss, x, t, lse, -100, 6)


def test_compile_sees_the_choice(compiled):
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    logits, targets = torch.randn(2, 4, 13, requires_grad=True), TARGETS
    function = compiled(lambda x, t: ops.cross_entropy(x, t, vocab=9))
    for name in ("cpp", "eager", "cpp"):
        with backend.use(cross_entropy=name):
            loss, plain = function(logits, targets), ops.cross_entropy(logits, targets, vocab=9)
            assert same_bits(loss, plain)
            assert same_bits(*(torch.autograd.grad(y, logits)[0] for y in (loss, plain)))
