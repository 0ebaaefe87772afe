"""The end of a decode step in one op: the last layer normalisation, the head's product and the draw of a token.

    logits = layer_norm(x) weight[:vocab]^T,   then `sample` of them

x [B, C], ln_weight, ln_bias [C] or None, weight [Vp, C] or a PackedWeight, all fp32|bf16|fp16; the sampling arguments and what is
returned are `sample`'s (ops/sample.py). B 1 to 32 in kernels, whose logits never leave the op. No backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import gptfast.backend as backend
from gptfast.errors import Error
from gptfast.ops._common import limit_decode, packed_arguments
from gptfast.ops.layer_norm import layer_norm
from gptfast.ops.linear import linear
from gptfast.ops.sample import Sampled, check_arguments, run_kernel, sample
from gptfast.packing import PackedWeight

_decode = limit_decode("lm_head_sample")


@backend.limits("lm_head_sample")
def _limits(name: str, inputs: tuple[Any, ...], needs_grad: bool) -> str | None:
    tensors = [value for value in inputs if not isinstance(value, str)]
    order, logprobs_mode = inputs[len(tensors) :] or ("gptfast", "raw")
    if (order, logprobs_mode) != ("gptfast", "raw"):
        return f"order {order} with {logprobs_mode} log-probabilities; kernels do gptfast with raw"
    return _decode(name, tuple(tensors), needs_grad)


def eager(
    x: Tensor, ln_weight: Tensor | None, ln_bias: Tensor | None, weight: Tensor | PackedWeight, *, eps: float, vocab: int,
    **sampling: Any,
) -> Sampled:
    """The definition: `layer_norm`, `linear`, `sample`."""
    head = weight if isinstance(weight, PackedWeight) else weight[:vocab]
    return sample(linear(layer_norm(x, ln_weight, ln_bias, eps), head)[:, :vocab], **sampling)


if backend.has_schema("lm_head_sample"):

    @torch.library.register_fake("gptfast::lm_head_sample")  # type: ignore[untyped-decorator]
    def _(
        x: Tensor, ln_weight: Tensor | None, ln_bias: Tensor | None, weight: Tensor, eps: float, temperature: Tensor,
        top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None, typical_p: Tensor | None, repetition: Tensor | None,
        frequency: Tensor | None, presence: Tensor | None, bias: Tensor | None, mask: Tensor | None, prompt: Tensor | None,
        counts: Tensor | None, seed: Tensor, position: Tensor, choice: Tensor, top_n: int, format: str = "", outputs: int = 0,
        vocab: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        rows = x.shape[0]
        token, top_ids = (x.new_empty(shape, dtype=torch.int64) for shape in ((rows,), (rows, top_n)))
        logprob, top_logprobs = (x.new_empty(shape, dtype=torch.float32) for shape in ((rows,), (rows, top_n)))
        return token, x.new_empty(rows, dtype=torch.int8), logprob, top_ids, top_logprobs


def lm_head_sample(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    weight: Tensor | PackedWeight,
    temperature: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    typical_p: Tensor | None = None,
    repetition: Tensor | None = None,
    frequency: Tensor | None = None,
    presence: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    prompt: Tensor | None = None,
    counts: Tensor | None = None,
    *,
    seed: Tensor,
    position: Tensor,
    choice: Tensor,
    top_n: int = 0,
    vocab: int | None = None,
    order: str = "gptfast",
    logprobs_mode: str = "raw",
    eps: float = 1e-5,
) -> Sampled:
    """Draws one token a row from the head's logits of layer_norm(x); shapes in the module's docstring.

    vocab: how many rows of weight are real (default all). Raises gptfast.Error where a shape does not fit and what `sample` raises.
    """
    if x.dim() != 2 or len(weight.shape) != 2 or weight.shape[1] != x.shape[1]:
        raise Error(f"lm_head_sample: weight has shape {tuple(weight.shape)}, x {tuple(x.shape)}; needed are [Vp, C] and [B, C]")
    width = weight.shape[0] if vocab is None else vocab
    if not 0 < width <= weight.shape[0]:
        raise Error(f"lm_head_sample: vocab is {vocab}; allowed: 1 to {weight.shape[0]}, the rows of weight")
    sampling = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "typical_p": typical_p,
        "repetition": repetition, "frequency": frequency, "presence": presence, "bias": bias, "mask": mask, "prompt": prompt,
        "counts": counts, "seed": seed, "position": position, "choice": choice, "top_n": top_n,
    }
    check_arguments(x.shape[0], width, sampling, order, logprobs_mode)
    with torch.no_grad():
        name = backend.choose("lm_head_sample", x, ln_weight, ln_bias, weight, order, logprobs_mode)
        if name == "eager":
            modes = {"order": order, "logprobs_mode": logprobs_mode}
            return eager(x, ln_weight, ln_bias, weight, eps=eps, vocab=width, **sampling, **modes)
        plain = weight if isinstance(weight, PackedWeight) else weight[:width]
        data, packed = packed_arguments(plain, x.dtype)
        leaf, more = backend.impl("lm_head_sample", name).forward, (*packed, width) if packed else ()
        return run_kernel(lambda *values: leaf(x.contiguous(), ln_weight, ln_bias, data, eps, *values, *more), sampling)
