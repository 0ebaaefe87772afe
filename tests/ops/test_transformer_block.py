"""A block as one node of autograd's graph: the same bits as op by op, and only where nobody could tell the difference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gptfast.backend as backend
from gptfast import testing
from gptfast.config import GPT2Config
from gptfast.model import Block, GPT2LMHeadModel
from gptfast.ops import _block
from gptfast.testing import same_bits

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
    """The layers that went as one node, one entry a call."""
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    seen: list[str] = []
    block = _block.block
    monkeypatch.setattr(_block, "block", lambda names, *rest: (seen.append(names["linear"]), block(names, *rest))[1])
    with backend.use("cpp"):
        yield seen


@pytest.fixture
def op_by_op(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
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
    assert len(taken) == 2
    op_by_op()
    separate = run(model, dtype=dtype)
    assert len(taken) == 2
    assert_same(model, fused, separate)


def test_documents_and_padding(taken: list[str], op_by_op: Callable[[], None]) -> None:
    document_ids = torch.zeros_like(IDS)
    document_ids[:, 30:], document_ids[1, 60:] = 1, -1
    model = make()
    fused = run(model, document_ids)
    assert len(taken) == 2
    op_by_op()
    assert_same(model, fused, run(model, document_ids))


def test_gradients_reach_what_comes_in(taken: list[str], op_by_op: Callable[[], None]) -> None:
    model = make()
    embeds = torch.randn(2, 9, 64, requires_grad=True)
    fused = torch.autograd.grad(model(inputs_embeds=embeds).logits.square().sum(), embeds)
    assert len(taken) == 2
    op_by_op()
    assert_close(fused[0], torch.autograd.grad(model(inputs_embeds=embeds).logits.square().sum(), embeds)[0])


def test_evaluation_drops_nothing(taken: list[str]) -> None:
    model = make(resid_pdrop=0.5, attn_pdrop=0.5).eval()
    one, other = run(model)[0], run(make())[0]
    assert same_bits(one, other) and len(taken) == 4


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
    "frozen": lambda model: model.transformer.h[0].mlp.c_fc.weight.requires_grad_(False),
    "another dtype": lambda model: model.transformer.h[0].ln_1.bfloat16(),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_block_goes_op_by_op(taken: list[str], what: str) -> None:
    model = make()
    CHANGES[what](model)
    model(IDS, labels=IDS).loss.backward()
    assert len(taken) == 1, "the other block is as it was"


@pytest.mark.parametrize("config", [{"activation_function": "relu"}, {"reorder_and_upcast_attn": True}], ids=str)
def test_other_architectures_go_op_by_op(taken: list[str], config: dict[str, Any]) -> None:
    run(make(**config))
    assert taken == []


def test_eager_autocast_caches_and_inference_go_op_by_op(taken: list[str]) -> None:
    model = make()
    with backend.use(gelu="eager"):
        run(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(IDS)
    model(IDS, use_cache=True)
    with torch.no_grad():
        model(IDS)
    assert taken == []


def test_the_order_of_parameters_is_the_blocks() -> None:
    block = make().transformer.h[0]
    weights = block._weights()
    assert weights is not None
    names = {id(p): name for name, p in block.named_parameters()}
    assert tuple(names[id(w)] for w in weights) == _block.PARAMETERS
