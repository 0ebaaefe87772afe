"""PyTorch's own OpInfo samples, fed to our front doors: the answers and gradients are those of the function they were made for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gptfast import ops

common = pytest.importorskip("torch.testing._internal.common_methods_invocations", reason="OpInfo needs expecttest")
OPINFOS = {info.name: info for info in common.op_db}


def samples(name: str):
    for sample in OPINFOS[name].sample_inputs("cpu", torch.float64, requires_grad=True):
        yield sample.input, sample.args, dict(sample.kwargs)


def agree(ours, theirs, *leaves):
    """Values, and the gradients of the leaves, under one random upstream gradient."""
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, equal_nan=True)
    if theirs.requires_grad:
        pull = torch.randn_like(theirs)
        grads = [torch.autograd.grad(y, leaves, pull, allow_unused=True, materialize_grads=True) for y in (ours, theirs)]
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-11, equal_nan=True)


def test_layer_norm():
    tried = 0
    for x, (shape, *parameters), options in samples("nn.functional.layer_norm"):
        if len(shape) != 1:
            continue  # ours is over the last dimension
        weight, bias = options.pop("weight", None), options.pop("bias", None)
        weight, bias, eps = [*parameters, *(weight, bias, options.pop("eps", 1e-5))[len(parameters):]]
        leaves = [t for t in (x, weight, bias) if t is not None]
        agree(ops.layer_norm(x, weight, bias, eps), F.layer_norm(x, shape, weight, bias, eps), *leaves)
        tried += 1
    assert tried >= 2


def test_gelu():
    tried = 0
    for x, _, options in samples("nn.functional.gelu"):
        if x.dim() == 0:
            continue  # ours has a last dimension
        approximate = options.get("approximate", "none")
        agree(ops.gelu(x, None, approximate), F.gelu(x, approximate=approximate), x)
        tried += 1
    assert tried >= 2


def test_cross_entropy():
    tried = 0
    for logits, (target, *_), options in samples("nn.functional.cross_entropy"):
        plain = not options.get("label_smoothing") and options.get("weight") is None
        if target.is_floating_point() or not plain or logits.dim() > 2:
            continue  # class probabilities, smoothing, weights and classes in the middle are not ours
        options = {k: v for k, v in options.items() if k in ("reduction", "ignore_index")}
        agree(ops.cross_entropy(logits, target, **options), F.cross_entropy(logits, target, **options), logits)
        head = torch.eye(logits.shape[-1], dtype=logits.dtype)
        agree(ops.linear_cross_entropy(logits, head, target, **options), F.cross_entropy(logits, target, **options), logits)
        tried += 1
    assert tried >= 3


def test_attention():
    tried = 0
    for q, (k, v), options in samples("nn.functional.scaled_dot_product_attention"):
        if not options.pop("is_causal") or options.pop("dropout_p") or q.dim() != k.dim() or options:
            continue  # ours is causal, and its dropout has noise of its own
        theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        seen = [t[..., : q.shape[-2], :].reshape(-1, *t.shape[-3:-2], q.shape[-2], t.shape[-1]) for t in (q, k, v)]
        ours = ops.attention(*(t.transpose(1, 2) for t in seen)).transpose(1, 2)
        agree(ours.reshape(theirs.shape), theirs, q, k, v)
        tried += 1
    assert tried >= 4


def test_linear_and_embedding():
    tried = 0
    for x, (weight, *bias), _ in samples("nn.functional.linear"):
        if weight.dim() == 2:
            agree(ops.linear(x, weight, *bias), F.linear(x, weight, *bias), x, weight, *bias)
            tried += 1
    for table, (ids,), options in samples("nn.functional.embedding"):
        if not options:
            zeros = torch.zeros(1, table.shape[1], dtype=table.dtype)
            agree(ops.embedding(ids, torch.zeros_like(ids), table, zeros), F.embedding(ids, table), table)
            tried += 1
    assert tried >= 6
