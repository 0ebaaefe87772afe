"""adamw_: the definition against the formula and against torch.optim.AdamW, skipped steps, copies, the glue; every kernel by the
tolerance over several steps, its blocks and pieces, dtypes, bits, wrong results that must not pass."""

import math

import pytest
import torch

from gptfast import Error, backend, ops, testing
from gptfast.ops.adamw_ import eager
from gptfast.testing import Target, check_op, random, same_bits

pytestmark = pytest.mark.usefixtures("eager")
SHAPES, DECAY = ((4, 3), (3,), (5, 2), ()), [0.1, 0.0, 0.1, 0.0]


def formula_of(params, grads, exp_avg, exp_avg_sq, copies, lr, step, scale, finite, weight_decay, beta1, beta2, eps):
    assert all(g.is_contiguous() for g in grads)
    if finite != 1:
        return
    step += 1
    for i, (p, grad, m, v, decay) in enumerate(zip(params, grads, exp_avg, exp_avg_sq, weight_decay, strict=True)):
        g = grad.to(p.dtype) * scale.to(p.dtype)[0]
        p.mul_(1 - lr[0] * decay)
        m.mul_(beta1).add_((1 - beta1) * g)
        v.mul_(beta2).add_((1 - beta2) * g * g)
        p -= lr[0] * (m / (1 - beta1 ** float(step))) / ((v / (1 - beta2 ** float(step))).sqrt() + eps)
        if copies is not None:
            copies[i].copy_(p)


def state(dtype=torch.float64, copies=True):
    torch.manual_seed(1)
    params = [torch.randn(s).to(dtype) for s in SHAPES]
    scalars = {"lr": torch.tensor([2**-7], dtype=dtype), "step": torch.zeros(1)}
    scalars |= {"scale": torch.ones(1, dtype=dtype), "finite": torch.ones(1)}
    return {
        "params": params, "exp_avg": [torch.zeros_like(p) for p in params], "exp_avg_sq": [torch.zeros_like(p) for p in params],
        "copies": [torch.zeros_like(p, dtype=torch.bfloat16) for p in params] if copies else None, **scalars,
    }


def advance(state, grads, function=ops.adamw_):
    function(grads=grads, **state, weight_decay=DECAY[: len(grads)], beta1=0.9, beta2=0.95, eps=1e-8)


def gradients(dtype=torch.float64):
    return [torch.randn(s).to(dtype) for s in SHAPES]


def flat(state):
    return [t for value in state.values() if value is not None for t in (value if isinstance(value, list) else [value])]


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_formula(formula, copies, scale):
    eager, fast = state(copies=copies), state(copies=copies)
    for s in (eager, fast):
        s["scale"].fill_(scale)
    for n in range(4):
        grads = gradients()
        grads[2] = grads[2].t().contiguous().t()
        kept = [g.clone() for g in grads]
        for s in (eager, fast):
            s["finite"].fill_(n != 2)
            s["lr"].fill_(0.01 * (n + 1))
        advance(eager, grads)
        with formula("adamw_", formula_of):
            advance(fast, grads)
        assert all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True))
        torch.testing.assert_close(flat(eager), flat(fast), rtol=1e-11, atol=1e-13)
    assert eager["step"] == 3 and (not copies or torch.equal(eager["copies"][0], eager["params"][0].bfloat16()))


@pytest.mark.parametrize("fused", [True, False])
def test_equals_torch_optim(fused):
    s = state(torch.float32, copies=False)
    theirs = [p.clone().requires_grad_() for p in s["params"]]
    groups = [{"params": [theirs[i] for i in range(4) if DECAY[i] == decay], "weight_decay": decay} for decay in (0.1, 0.0)]
    optimizer = torch.optim.AdamW(groups, lr=2**-7, betas=(0.9, 0.95), eps=1e-8, fused=fused, foreach=False)
    for _ in range(5):
        grads = gradients(torch.float32)
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        advance(s, grads)
    for p, q in zip(s["params"], theirs, strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=0 if fused else 1e-5, atol=0 if fused else 1e-6)


def test_a_step_that_is_not_finite_changes_nothing():
    s = state()
    advance(s, gradients())
    s["finite"].zero_()
    before = [t.clone() for t in flat(s)]
    advance(s, [torch.full(shape, math.nan, dtype=torch.float64) for shape in SHAPES])
    assert all(torch.equal(a, b) for a, b in zip(flat(s), before, strict=True))


@pytest.mark.parametrize("finite", [1, 0])
def test_compile_reads_the_scalars_at_run_time(compiled, finite):
    step = compiled(lambda s, grads: advance(s, grads))
    # without the 0-dimensional one: AOTAutograd of torch 2.13 loses the mutation of such a float64 tensor on the CPU
    eager, traced = ({k: v[:3] if isinstance(v, list) else v for k, v in state().items()} for _ in range(2))
    for n, flag in enumerate((finite, 1, 1)):
        for s in (eager, traced):
            s["finite"].fill_(flag)
            s["scale"].fill_(1 / (n + 1))
        grads = gradients()[:3]
        advance(eager, grads)
        step(traced, grads)
        torch.testing.assert_close(flat(eager), flat(traced), rtol=1e-12, atol=1e-13)
    assert traced["step"] == 2 + finite


def test_gradients_of_another_dtype_and_parameters_that_require_grad():
    s, wanted = state(torch.float32), state(torch.float32)
    grads = gradients(torch.bfloat16)
    advance(wanted, [g.float() for g in grads])
    for p in s["params"]:
        p.requires_grad_()
    advance(s, grads)
    assert all(torch.equal(a.detach(), b) for a, b in zip(flat(s), flat(wanted), strict=True))


def test_nothing_to_do():
    ops.adamw_([], [], [], [], None, *(torch.ones(1) for _ in range(4)), [], 0.9, 0.95, 1e-8)


def test_limits_of_kernels(monkeypatch):
    monkeypatch.setitem(backend._missing, ("adamw_", "cpp"), None)
    with backend(adamw_="cpp"), pytest.raises(Error, match="adamw_: backend cpp was forced and cannot run: float64"):
        advance(state(), gradients())


def test_bad_input():
    for label, wrong in (("exp_avg", state()["exp_avg"][:3]), ("copies", state()["copies"][::-1])):
        with pytest.raises(Error, match=f"adamw_: {label} do not have the shapes of the 4 params"):
            advance(state() | {label: wrong}, gradients())
    with pytest.raises(Error, match="grads do not have the shapes"):
        advance(state(), gradients()[:2])
    s = state()
    s["params"][0] = s["params"][0].t().contiguous().t()
    with pytest.raises(Error, match="params holds a tensor that is not contiguous"):
        advance(s, gradients())
    with pytest.raises(Error, match=r"lr has shape \(\); needed is a tensor \[1\]"):
        advance(state() | {"lr": torch.tensor(0.1)}, gradients())
    with pytest.raises(Error, match="weight_decay has 3 numbers for 4 params"):
        ops.adamw_(grads=gradients(), **state(), weight_decay=DECAY[:3], beta1=0.9, beta2=0.95, eps=1e-8)


# ------------------------------------------------------------------------------------------------------------- kernels, by the rule

ISAS = ("plain", "avx2", "avx512")
STEPS = 4
# around a register, a piece of 1024 and a block of 65536, which ends in the middle of a tensor
MANY = ((4, 3), (0,), (), (1023,), (1025,), (33, 65), (65536,), (17,), (0,), (3, 5))


def named(shapes, dtype, device="cpu", grads=None, copies=None, scale=1.0, finite=1.0):
    """Every tensor of the lists under its own name, so that check_op compares each one."""
    tensors = {}
    for i, shape in enumerate(shapes):
        tensors[f"p{i}"] = random(*shape, dtype=dtype, device=device)
        tensors[f"m{i}"] = random(*shape, dtype=dtype, device=device, scale=0.1)
        tensors[f"v{i}"] = random(*shape, dtype=dtype, device=device, scale=0.1).square()
        if copies is not None:
            tensors[f"c{i}"] = torch.zeros(shape, dtype=copies, device=device)
        for step in range(STEPS):
            tensors[f"g{step}_{i}"] = random(*shape, dtype=grads or dtype, device=device)
    numbers = {"lr": 0.01, "step": 3.0, "scale": scale, "finite": finite}
    return tensors | {name: torch.full((1,), value, device=device) for name, value in numbers.items()}


def several_steps(op, decay=(0.1, 0.0), beta1=0.9, beta2=0.95, eps=1e-8):
    def run(**t):
        count = sum(name[0] == "p" for name in t)
        lists = [[t[f"{kind}{i}"] for i in range(count)] for kind in "pmv"]
        copies = [t[f"c{i}"] for i in range(count)] if "c0" in t else None
        for step in range(STEPS):
            grads, decays = [t[f"g{step}_{i}"] for i in range(count)], [decay[i % len(decay)] for i in range(count)]
            scalars = (t["lr"], t["step"], t["scale"], t["finite"])
            op(lists[0], grads, lists[1], lists[2], copies, *scalars, decays, beta1, beta2, eps)
        return ()

    return run


def check(inputs, target, **more):
    mutated = [name for name in inputs if name[0] in "pmvc" or name == "step"]
    front, definition = several_steps(ops.adamw_, **more), several_steps(eager, **more)
    return check_op("adamw_", front, definition, inputs, target, outputs=(), mutates=mutated)


def test_many_tensors(target: Target):
    check(named(MANY, target.dtype, target.device, scale=0.5), target)


@pytest.mark.parametrize("grads", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("copies", ["fp32", "bf16", "fp16"])
def test_dtypes_of_gradients_and_copies(target: Target, grads, copies):
    kinds = testing.checks.DTYPES
    fast = check(named(((1030,), (7, 3)), target.dtype, target.device, kinds[grads], kinds[copies]), target)
    assert all(torch.equal(fast[f"c{i}"], fast[f"p{i}"].to(kinds[copies])) for i in range(2))


def test_dtypes_may_differ_from_place_to_place():
    target = Target("cpp", "fp32", "cpp")
    testing.requires("cpp", target.reason("adamw_"))
    inputs = named(((70,), (70,), (70,)), torch.float32)
    low = {name: value.bfloat16() for name, value in inputs.items() if name in ("p1", "m1", "v1", "g0_2", "g1_0")}
    run, alone = several_steps(ops.adamw_, decay=(0.1,)), several_steps(ops.adamw_, decay=(0.1,))
    together = {name: testing.copy_of(value) for name, value in (inputs | low).items()}
    with backend.use(adamw_="cpp"):
        run(**together)
        for i in range(3):
            one = {name.removesuffix(str(i)) + "0" if name[0] in "pmvg" else name: testing.copy_of(value)
                   for name, value in (inputs | low).items() if name[0] not in "pmvg" or name.endswith(str(i))}
            alone(**one)
            assert all(same_bits(together[f"{kind}{i}"], one[f"{kind}0"]) for kind in "pmv")


@pytest.mark.parametrize("beta1", [0.0, 0.3, 0.5, 0.999])
@pytest.mark.parametrize("beta2", [0.0, 0.999])
def test_betas(target: Target, beta1, beta2):
    check(named(((40,), (3,)), target.dtype, target.device), target, beta1=beta1, beta2=beta2, eps=1e-3)


@pytest.mark.parametrize("scale", [1e-4, -3.0, 4096.0])
def test_scale(target: Target, scale):
    inputs = named(((40,), (3,)), target.dtype, target.device, scale=scale)
    if abs(scale) > 100:
        inputs |= {name: value / scale for name, value in inputs.items() if name[0] == "g"}
    check(inputs, target)


def test_tensors_that_begin_anywhere(target: Target):
    inputs = named(((1029,),), target.dtype, target.device, copies=torch.bfloat16)
    check({name: testing.arrange(value, "offset") if value.numel() > 1 else value for name, value in inputs.items()}, target)


def test_gradients_with_strides(target: Target):
    inputs = named(((6, 33),), target.dtype, target.device)
    check({name: testing.arrange(value, "transposed") if name[0] == "g" else value for name, value in inputs.items()}, target)


def test_first_steps_of_a_new_optimizer(target: Target):
    inputs = named(((50,),), target.dtype, target.device)
    check(inputs | {name: torch.zeros_like(value) for name, value in inputs.items() if name in ("m0", "v0", "step")}, target)


def test_nothing_happens_where_finite_is_0(target: Target):
    inputs = named(((50,), (3,)), target.dtype, target.device, copies=torch.float16, finite=0.0)
    inputs["g0_0"][4], inputs["g1_1"][:] = math.nan, math.inf
    before = {name: value.clone() for name, value in inputs.items()}
    with target.force("adamw_"):
        several_steps(ops.adamw_)(**inputs)
    assert all(same_bits(value, before[name]) for name, value in inputs.items())


def test_numbers_in_float64():
    testing.requires("cpp", backend.supports("adamw_", "cpp"))
    results = []
    for kind in (torch.float32, torch.float64):
        torch.manual_seed(3)
        inputs = named(((50,),), torch.float32)
        inputs |= {name: value.to(kind) for name, value in inputs.items() if value.shape == (1,)}
        inputs["lr"].fill_(2**-7)
        with backend.use(adamw_="cpp"):
            several_steps(ops.adamw_)(**inputs)
        assert inputs["step"] == 3 + STEPS and inputs["step"].dtype == kind
        results.append(inputs)
    assert all(same_bits(results[0][name], results[1][name]) for name in ("p0", "m0", "v0"))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_instruction_set(isa, precision):
    target = Target("cpp", precision, "cpp")
    with testing.forced_isa(isa):
        check(named(((1,), (7, 5), (64,), (1091,)), target.dtype, copies=torch.bfloat16), target)


@pytest.mark.parametrize("isa", ISAS)
def test_bits_do_not_depend_on_threads(isa):
    results, threads = [], torch.get_num_threads()
    start = named(((150001,), (17,), (33, 9)), torch.float32, copies=torch.bfloat16)
    with testing.forced_isa(isa), backend.use(adamw_="cpp"):
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append({name: value.clone() for name, value in start.items()})
                several_steps(ops.adamw_)(**results[-1])
        finally:
            torch.set_num_threads(threads)
    assert all(same_bits(value, other[name]) for name, value in results[0].items() for other in results[1:])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_copies(isa, kind):
    """Past 32 MiB they are written around the caches, from the first aligned element on."""
    count = (1 << 24) + 77
    p, g, m, v = torch.randn(count), torch.full((count,), 0.5), torch.zeros(count), torch.zeros(count)
    copy = torch.full((count + 3,), 7.0, dtype=kind)
    numbers = [torch.full((1,), value) for value in (0.01, 0.0, 1.0, 1.0)]
    with testing.forced_isa(isa), backend.use(adamw_="cpp"):
        ops.adamw_([p], [g], [m], [v], [copy[1:-2]], *numbers, [0.1], 0.9, 0.95, 1e-8)
    right = p.to(kind)
    same = (copy[1:-2] == right) | (p.abs() < torch.finfo(torch.float32).tiny)  # which AVX-512's bf16 instruction makes 0
    assert same.all() and (copy[0], copy[-2], copy[-1]) == (7, 7, 7)


WRONG = {
    "no decay": {"decay": (0.0,)}, "decay on everything": {"decay": (0.1,)}, "another beta1": {"beta1": 0.91},
    "another beta2": {"beta2": 0.951}, "another eps": {"eps": 1e-4},
}  # fmt: skip


def test_wrong_results_are_rejected():
    inputs = named(((40,), (33,)), torch.float32, scale=0.5)

    def run(tensors, **more):
        fresh = {name: testing.copy_of(value) for name, value in tensors.items()}
        several_steps(eager, **more)(**fresh)
        return fresh

    own, ref = run(inputs), run({name: testing.checks.in_double(value) for name, value in inputs.items()})
    changed = {
        "scale ignored": {"scale": torch.ones(1)}, "another rate": {"lr": torch.full((1,), 0.0101)},
        "bias correction of another step": {"step": torch.full((1,), 4.0)},
        "one gradient stale": {"g3_0": inputs["g2_0"], "g3_1": inputs["g2_1"]},
    }  # fmt: skip
    wrongs = {what: run(inputs, **more) for what, more in WRONG.items()} | {w: run(inputs | c) for w, c in changed.items()}
    for what, wrong in wrongs.items():
        bad = []
        for name in ("p0", "p1", "m0", "m1", "v0", "v1"):
            testing.assert_close_to_reference(own[name], own[name], ref[name], name=name)
            try:
                testing.assert_close_to_reference(wrong[name], own[name], ref[name], name=name)
            except AssertionError:
                bad.append(name)
        assert "p0" in bad or "p1" in bad, what
    for name in ("p0", "m0", "v0"):
        for what, wrong in testing.wrong_results(own[name]).items():
            testing.assert_rejected(f"{name}: {what}", wrong, own[name], ref[name])


# ------------------------------------------------------------------------------------------------------ dispatcher, compile, errors


def leaf_arguments(count=3, **more):
    lists = {"params": [torch.ones(4, 2) for _ in range(count)]}
    lists |= {name: [torch.ones(4, 2) for _ in range(count)] for name in ("grads", "exp_avg", "exp_avg_sq")} | {"copies": None}
    numbers = {name: torch.ones(1) for name in ("lr", "step", "scale", "finite")}
    return (lists | numbers | {"weight_decay": [0.1] * count, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}) | more


def test_opcheck():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    for copies in (None, [torch.zeros(4, 2, dtype=torch.bfloat16) for _ in range(3)]):
        torch.library.opcheck(torch.ops.gptfast.adamw_.default, tuple(leaf_arguments(copies=copies).values()))


def test_leaf_checks_its_contract():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    strided, double, low = torch.ones(2, 4).t(), torch.ones(4, 2).double(), torch.ones(4, 2).bfloat16()
    for name, value, message in (
        ("params", strided, "params is not contiguous"), ("grads", strided, "grads is not contiguous"),
        ("exp_avg", torch.ones(2), "exp_avg has shape"), ("exp_avg", low, "exp_avg is BFloat16, needs Float"),
        ("exp_avg_sq", low, "exp_avg_sq is BFloat16, needs Float"), ("grads", double, "allowed: fp32, bf16, fp16"),
    ):  # fmt: skip
        wrong = leaf_arguments()
        wrong[name][2] = value
        with pytest.raises(RuntimeError, match=message):
            torch.ops.gptfast.adamw_(*wrong.values())
    for name, value, message in (
        ("grads", [torch.ones(4, 2)], "grads has 1 tensors for 3 params"), ("weight_decay", [0.1], "weight_decay has 1 numbers"),
        ("copies", [torch.ones(4, 2)], "copies has 1 tensors"), ("lr", torch.ones(2), "lr has shape"),
        ("step", torch.tensor(1.0), "step has"), ("scale", torch.ones(1).bfloat16(), "scale is BFloat16, allowed: fp32, fp64"),
        ("finite", torch.ones(0), "finite has shape"),
    ):  # fmt: skip
        arguments = leaf_arguments(**{name: value})
        with pytest.raises(RuntimeError, match=message):
            torch.ops.gptfast.adamw_(*arguments.values())
        assert (arguments["params"][0] == 1).all() and (name == "step" or arguments["step"] == 1)


def test_bad_input_is_named_as_on_eager():
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    s = state(torch.float32)
    for change, message in (
        ({"exp_avg": s["exp_avg"][:3]}, "exp_avg do not have the shapes of the 4 params"),
        ({"copies": s["copies"][::-1]}, "copies do not have the shapes"),
        ({"lr": torch.tensor(0.1)}, r"lr has shape \(\); needed is a tensor \[1\]"),
        ({"params": [s["params"][0].t().contiguous().t(), *s["params"][1:]]}, "params holds a tensor that is not contiguous"),
    ):
        with backend.use(adamw_="cpp"), pytest.raises(Error, match=f"adamw_: {message}"):
            advance(s | change, gradients(torch.float32))
    with backend.use(adamw_="cpp"), pytest.raises(RuntimeError, match="exp_avg is BFloat16"):
        advance(s | {"exp_avg": [m.bfloat16() for m in s["exp_avg"]]}, gradients(torch.float32))


@pytest.mark.parametrize("copies", [True, False])
def test_compile_sees_the_choice(compiled, copies):
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    function = compiled(lambda s, grads: advance(s, grads))
    traced, plain = ({k: v[:3] if isinstance(v, list) else v for k, v in state(torch.float32, copies).items()} for _ in range(2))
    for name, finite in (("cpp", 1), ("eager", 1), ("cpp", 0), ("cpp", 1)):
        grads = gradients(torch.float32)[:3]
        for s in (traced, plain):
            s["finite"].fill_(finite)
        with backend.use(adamw_=name):
            function(traced, grads)
            advance(plain, grads)
        torch.testing.assert_close(flat(traced), flat(plain), rtol=1e-6, atol=1e-7)
    assert traced["step"] == 3
