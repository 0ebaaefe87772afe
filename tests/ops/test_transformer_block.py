"""transformer_block: the same bits as op by op, the tolerance, and the model's use of it where nobody could tell the difference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gptfast.backend as backend
from gptfast import ops, testing
from gptfast.config import GPT2Config
from gptfast.errors import Error
from gptfast.model import Block, GPT2LMHeadModel
from gptfast.ops.transformer_block import PARAMETERS, eager, transformer_block
from gptfast.testing import LAYOUTS, Target, arrange, check_op, random, same_bits

CONFIG = {"vocab_size": 40, "n_positions": 70, "n_embd": 64, "n_layer": 2, "n_head": 2}
IDS = torch.arange(3 * 66).view(3, 66) * 7 % 40


def make(**config: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**{**CONFIG, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **config}))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p)  # a gradient that meets only zeros could be wrong unseen
    return model.train()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The backends that blocks took, one entry a call of the op."""
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    seen: list[str] = []
    choose = backend.choose

    def record(op: str, *inputs: Any, needs_grad: bool = False) -> str:
        name = choose(op, *inputs, needs_grad=needs_grad)
        if op == "transformer_block":
            seen.append(name)
        return name

    monkeypatch.setattr(backend, "choose", record)
    with backend.use("cpp"):
        yield seen


@pytest.fixture
def op_by_op(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Calling it makes every block go through its modules from then on."""
    return lambda: monkeypatch.setattr(Block, "_weights", lambda self: None)


def run(model: GPT2LMHeadModel, document_ids: Tensor | None = None, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    model = model.to(dtype)
    torch.manual_seed(1)
    loss, _ = model.loss_sum(IDS, IDS.roll(-1, 1), document_ids)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def assert_close(one: Tensor, other: Tensor) -> None:
    assert float((one - other).float().norm()) <= 2 * torch.finfo(one.dtype).eps * float(other.float().norm())


def assert_same(model: GPT2LMHeadModel, fused: list[Tensor], separate: list[Tensor]) -> None:
    """Loss and gradients bit for bit, but those of the embeddings: the two gradients of the stream that enters the first block are
    added in one kernel and not by autograd, which rounds once less."""
    for (name, _), one, other in zip([("loss", None), *model.named_parameters()], fused, separate, strict=True):
        if name.startswith("transformer.w"):
            assert_close(one, other)
        else:
            assert same_bits(one, other), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        {}, {"activation_function": "gelu"}, {"n_inner": 40}, {"scale_attn_by_inverse_layer_idx": True},
        {"layer_norm_epsilon": 1e-2}, {"resid_pdrop": 0.3},
        {"attn_pdrop": 0.3}, {"resid_pdrop": 0.2, "attn_pdrop": 0.2, "embd_pdrop": 0.2},
    ],
    ids=str,
)  # fmt: skip
def test_the_same_bits_as_op_by_op(
    taken: list[str], op_by_op: Callable[[], None], config: dict[str, Any], dtype: torch.dtype
) -> None:
    model = make(**config)
    fused = run(model, dtype=dtype)
    assert taken == ["cpp"] * 2
    op_by_op()
    separate = run(model, dtype=dtype)
    assert taken == ["cpp"] * 2
    assert_same(model, fused, separate)


def test_documents_and_padding(taken: list[str], op_by_op: Callable[[], None]) -> None:
    document_ids = torch.zeros_like(IDS)
    document_ids[:, 30:], document_ids[1, 60:] = 1, -1
    model = make()
    fused = run(model, document_ids)
    assert taken == ["cpp"] * 2
    op_by_op()
    assert_same(model, fused, run(model, document_ids))


def test_gradients_reach_what_comes_in(taken: list[str], op_by_op: Callable[[], None]) -> None:
    model = make()
    embeds = torch.randn(2, 9, 64, requires_grad=True)
    fused = torch.autograd.grad(model(inputs_embeds=embeds).logits.square().sum(), embeds)
    assert taken == ["cpp"] * 2
    op_by_op()
    assert_close(fused[0], torch.autograd.grad(model(inputs_embeds=embeds).logits.square().sum(), embeds)[0])


def test_evaluation_drops_nothing(taken: list[str]) -> None:
    model = make(resid_pdrop=0.5, attn_pdrop=0.5).eval()
    one, other = run(model)[0], run(make())[0]
    assert same_bits(one, other) and taken == ["cpp"] * 4


class Doubled(nn.Module):
    """Stands for an adapter around a module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.weight, self.bias = inner, inner.weight, inner.bias

    def forward(self, *inputs: Any) -> Any:
        return self.inner(*inputs) * 2


def _adapt(model: GPT2LMHeadModel) -> None:
    attn = model.transformer.h[0].attn
    attn.c_attn = Doubled(attn.c_attn)  # type: ignore[assignment]


CHANGES: dict[str, Callable[[GPT2LMHeadModel], Any]] = {
    "hook": lambda model: model.transformer.h[0].mlp.register_forward_hook(lambda module, inputs, output: output * 2),
    "pre-hook": lambda model: model.transformer.h[0].ln_2.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,)),
    "backward hook": lambda model: model.transformer.h[0].attn.c_proj.register_full_backward_hook(lambda *a: None),
    "adapter": _adapt,
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_block_goes_through_its_modules(taken: list[str], what: str) -> None:
    model = make()
    CHANGES[what](model)
    model(IDS, labels=IDS).loss.backward()
    assert taken == ["cpp"], "the other block is as it was"


def _freeze(model: GPT2LMHeadModel) -> None:
    model.transformer.h[0].mlp.c_fc.weight.requires_grad_(False)


def _mix(model: GPT2LMHeadModel) -> None:
    model.transformer.h[0].ln_1.bfloat16()


@pytest.mark.parametrize("change", [_freeze, _mix])
def test_what_the_kernel_does_not_take_runs_op_by_op(taken: list[str], change: Callable[[GPT2LMHeadModel], None]) -> None:
    model = make()
    change(model)
    model(IDS, labels=IDS).loss.backward()
    assert taken == ["eager", "cpp"]


@pytest.mark.parametrize("config", [{"activation_function": "relu"}, {"reorder_and_upcast_attn": True}], ids=str)
def test_other_architectures_go_op_by_op(taken: list[str], config: dict[str, Any]) -> None:
    run(make(**config))
    assert taken == []


def test_an_op_on_another_backend_autocast_and_caches(taken: list[str]) -> None:
    model = make()
    with backend.use(gelu="eager"):
        run(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(IDS)
    assert taken == ["eager"] * 4
    with torch.no_grad():
        model(IDS, use_cache=True)
    assert len(taken) == 4
    with torch.no_grad():
        logits = model(IDS, use_cache=False).logits
    assert taken[4:] == ["cpp"] * 2 and same_bits(logits, model(IDS).logits.detach())


def test_the_order_of_parameters_is_the_blocks() -> None:
    block = make().transformer.h[0]
    weights = block._weights()
    assert weights is not None
    names = {id(p): name for name, p in block.named_parameters()}
    assert tuple(names[id(w)] for w in weights) == PARAMETERS


# ------------------------------------------------------------------------------------------------------------------------- the op


def operands(
    dtype: torch.dtype, shape: tuple[int, int, int] = (2, 9, 64), inner: int = 40, layout: str = "contiguous", first: bool = False
) -> dict[str, Any]:
    """residual, x and the twelve weights by name, all requiring grad, scaled so that no op saturates."""
    width = shape[-1]
    sizes = [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)]
    sizes += [(width,), (width,), (width, inner), (inner,), (inner, width), (width,)]
    scales = [width**-0.5 if len(size) == 2 else 0.5 for size in sizes]
    residual, x = (arrange(random(*shape, dtype=dtype), layout) for _ in range(2))
    given: dict[str, Any] = {"residual": residual, "x": None if first else x}
    given |= {f"w{n}": random(*size, dtype=dtype, scale=s) for n, (size, s) in enumerate(zip(sizes, scales, strict=True))}
    return {name: None if value is None else value.requires_grad_() for name, value in given.items()}


def through(function: Any, **more: Any) -> Callable[..., Any]:
    """`function` of residual, x and twelve weights; two heads."""
    more = {"heads": 2, "scale": 0.17, "eps": 1e-5, "approximate": "tanh"} | more
    return lambda residual, x, **weights: function(residual, x, tuple(weights.values()), **more)


def check(inputs: dict[str, Any], target: Target, grad_layout: str = "contiguous", **more: Any) -> dict[str, Tensor]:
    with backend.use("eager"):  # the definition takes each op where it is asked for: here on eager, in the dtype and in float64
        definition = through(eager, **more)

        def kernel(*inputs: Any, **weights: Any) -> Any:
            with backend.use("cpp", transformer_block="cpp"):
                return through(transformer_block, **more)(*inputs, **weights)

        rules = {"outputs": ("total", "out"), "long_sums": ["total", "out", *(f"d{name}" for name in inputs)]}
        return check_op("transformer_block", kernel, definition, inputs, target, grad_layout=grad_layout, **rules)  # type: ignore[arg-type]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("shape", [(2, 9, 64), (1, 1, 64), (3, 65, 80), (0, 4, 64), (2, 0, 64)], ids=str)
def test_by_the_tolerance(target: Target, shape: tuple[int, int, int], first: bool) -> None:
    check(operands(target.dtype, shape, first=first), target)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts(target: Target, layout: str) -> None:
    check(operands(target.dtype, layout=layout), target, grad_layout=layout)


def test_documents_dropout_and_erf(target: Target) -> None:
    documents = torch.zeros(2, 9, dtype=torch.int64)
    documents[0, 4:], documents[1, 7:] = 1, -1
    seeds = torch.tensor([3, 5, 7])
    check(
        operands(target.dtype), target, document_ids=documents, attention_p=0.25, residual_p=0.25, seeds=seeds, approximate="none"
    )


@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    with testing.forced_isa(isa):
        for precision in ("fp32", "bf16", "fp16"):
            target = Target("cpp", precision, "cpp")
            check(operands(target.dtype), target)


def test_opcheck() -> None:
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    for first in (False, True):
        residual, x, *weights = (None if t is None else t.detach() for t in operands(torch.float32, first=first).values())
        for seeds, p in ((None, 0.0), (torch.tensor([1, 2, 3]), 0.2)):
            statics = (2, 0.2, 1e-5, "tanh", p, p)
            arguments = (residual, x, weights, None, seeds, *statics)
            torch.library.opcheck(torch.ops.gptfast.transformer_block.default, arguments)
            total, out, *kept = torch.ops.gptfast.transformer_block(*arguments)
            back = (total, out, residual if first else total, total, kept, weights, None, seeds, 2, 0.2, "tanh", p, p, False)
            torch.library.opcheck(torch.ops.gptfast.transformer_block_backward.default, back)


def test_leaf_checks_its_contract() -> None:
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    residual, x, *weights = (t.detach() for t in operands(torch.float32).values())
    statics = (0.2, 1e-5, "tanh", 0.0, 0.0)
    for arguments, message in (
        ((residual[0], x, weights, None, None, 2, *statics), "needs 3"),
        ((residual, x, weights[:5], None, None, 2, *statics), "5 weights"),
        ((residual, x, weights, None, None, 3, *statics), "heads is 3"),
        ((residual, x, weights, None, torch.tensor([1]), 2, *statics), "seeds has shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.gptfast.transformer_block(*arguments)


def test_compiled_on_two_backends() -> None:
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    torch._dynamo.reset()
    inputs = operands(torch.float32)
    function = torch.compile(through(transformer_block), fullgraph=True, backend="aot_eager")
    with backend.use("eager"):
        wanted = testing.evaluate(through(eager), inputs, ("total", "out"), {n: torch.ones(2, 9, 64) for n in ("total", "out")})
    for name in ("cpp", "eager", "cpp"):
        with backend.use(name):
            found = testing.evaluate(function, inputs, ("total", "out"), {n: torch.ones(2, 9, 64) for n in ("total", "out")})
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_gradcheck() -> None:
    inputs = operands(torch.float64, (1, 3, 4), 6)
    names = list(inputs)
    function = through(eager)
    assert torch.autograd.gradcheck(lambda *a: function(*a[:2], **dict(zip(names[2:], a[2:], strict=True))), tuple(inputs.values()))


def test_forced_where_it_cannot_run() -> None:
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    inputs = operands(torch.float32)
    with backend.use(transformer_block="cpp", gelu="eager"), pytest.raises(Error, match="cannot run: gelu runs on eager here"):
        through(transformer_block)(**inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": torch.zeros(3, 64)}, r"have shape \(3, 64\) and \(2, 9, 64\); needed is one \[B, T, C\]"),
        ({"x": torch.zeros(2, 8, 64)}, r"needed is one"),
        ({"w2": torch.zeros(64, 64)}, r"attn.c_attn.weight has shape \(64, 64\), needed is \(64, 192\)"),
        ({"w11": torch.zeros(3)}, r"mlp.c_proj.bias has shape \(3,\)"),
    ],
)  # fmt: skip
def test_bad_shapes(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(Error, match=message):
        through(transformer_block)(**(operands(torch.float32) | change))
    with pytest.raises(Error, match="heads is 5; allowed: divisors of the width 64"):
        through(transformer_block, heads=5)(**operands(torch.float32))
    with pytest.raises(Error, match="approximate is 'erf'"):
        through(ops.transformer_block, approximate="erf")(**operands(torch.float32))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_wrong_results_are_rejected(precision: str) -> None:
    inputs = operands(testing.checks.DTYPES[precision])
    exact = {name: testing.checks.in_double(value) for name, value in inputs.items()}
    upstream = {name: random(2, 9, 64, dtype=inputs["residual"].dtype) for name in ("total", "out")}
    with backend.use("eager"):
        own = testing.evaluate(through(eager), inputs, ("total", "out"), upstream)
        ref = testing.evaluate(through(eager), exact, ("total", "out"), {name: value.double() for name, value in upstream.items()})
        wrong = {
            "scale": testing.evaluate(through(eager, scale=1.0), inputs, ("total", "out"), upstream),
            "gelu": testing.evaluate(through(eager, approximate="none"), inputs, ("total", "out"), upstream),
            "epsilon": testing.evaluate(through(eager, eps=1.0), inputs, ("total", "out"), upstream),
        }
    rule = {"gradient": True, "long_sum": True}
    for name, value in own.items():
        for what, made in testing.wrong_results(value).items():
            testing.assert_rejected(f"{name}: {what}", made, value, ref[name], **rule)
    for what, values in wrong.items():
        if what != "gelu" or precision == "fp32":  # the two forms of gelu differ by less than 16 bits resolve
            testing.assert_rejected(f"another {what}", values["out"], own["out"], ref["out"], **rule)
