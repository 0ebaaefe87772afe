"""Sampling one token a row: penalties, filters, a Gumbel-max draw with the noise of gptfast.philox, log-probabilities.

Per row of logits x [V] (fp32); m_i: id i is allowed, c_i: how often it is in the output, s_i: it is in the prompt or the output:

    x_i = -inf where not m_i;  x_i += bias_i;  x_i = x_i / r if x_i > 0 else x_i * r  where s_i;  x_i -= f c_i;  x_i -= p [c_i > 0]
    y_i = (x_i - max x) / temperature            (one subtraction, one division: fp32, round to nearest)
    top_k      keep y_i >= the k-th largest y
    top_p      keep y_i >= b, the largest b with mass{y_i >= b} >= top_p mass{all}
    min_p      keep y_i >= max y + log(min_p)
    typical_p  keep d_i <= b, the smallest b with mass{d_i <= b} >= typical_p mass{all};  d_i = |H - (-log p_i)|, H the entropy
    token = argmax_i (y_i + g_i),  g_i = gumbel(seed, id i, position, choice)

Mass is counted in integers, w_i = floor(exp(z_i) 2^40) with z_i = y_i - max y and the published exp: a kept set depends on no order
of summation. In d_i log(sum of exp) cancels: d_i = |z_i + S / Z|, S = sum of floor(-z_i exp(z_i) 2^40), Z = sum of w_i.
All values equal to a boundary are kept; greedy takes the lowest of equal ids. Each filter sees what those before it kept. `order`
moves them: "hf" is the order above, "vllm" min_p before top_k, "llama.cpp" top_k, typical_p, top_p, min_p, the temperature last.

temperature 0, top_p 0 and top_k 1 are greedy. top_k <= 0 or >= V, top_p >= 1, min_p <= 0, typical_p >= 1 are off, bit for bit. A
+inf logit forces its id (the lowest of several). Excluded ids are excluded, not given probability 0. status: 0 a token was drawn;
1 the row holds NaN; 2 nothing is allowed; where it is not 0 the token is -1 and logprob 0, and no other row is affected.
Log-probabilities are log-softmax in fp32 of the logits as they came ("raw"), or of the filtered y, of x where greedy ("processed").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gptfast.backend as backend
from gptfast import philox
from gptfast.errors import Error
from gptfast.ops import _common

ORDERS = {
    "gptfast": ("temperature", "top_k", "top_p", "min_p", "typical_p"),
    "hf": ("temperature", "top_k", "top_p", "min_p", "typical_p"),
    "vllm": ("temperature", "min_p", "top_k", "top_p", "typical_p"),
    "llama.cpp": ("top_k", "typical_p", "top_p", "min_p", "temperature"),
}
SMALLEST = torch.finfo(torch.float32).tiny  # temperatures below it are 0
INF = float("inf")


class Sampled(NamedTuple):
    """token [B] int64, status [B] int8, logprob [B] fp32, top_ids [B, top_n] int64, top_logprobs [B, top_n] fp32."""

    token: Tensor
    status: Tensor
    logprob: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


def pack_bits(mask: Tensor) -> Tensor:
    """mask [B, V] bool -> [B, ceil(V / 32)] int32; id i is bit i % 32 of word i // 32."""
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 32)).view(mask.shape[0], -1, 32)
    words = (padded.to(torch.int64) << torch.arange(32, device=mask.device)).sum(2)
    return words.to(torch.int32)  # wraps: bit 31 becomes the sign


def unpack_bits(words: Tensor, count: int) -> Tensor:
    """The inverse of pack_bits: [B, ceil(count / 32)] int32 -> [B, count] bool."""
    bits = (words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=words.device)) & 1
    return bits.flatten(1)[:, :count].bool()


def penalised(
    x: Tensor, repetition: Tensor | None, frequency: Tensor | None, presence: Tensor | None, bias: Tensor | None,
    mask: Tensor | None, prompt: Tensor | None, counts: Tensor | None,
) -> Tensor:
    """x [B, V] fp32 with exclusions, bias and penalties applied; excluded ids are -inf. `x` itself is not written."""
    if mask is not None:
        x = torch.where(unpack_bits(mask, x.shape[1]), x, -INF)
    if bias is not None:
        x = torch.where((bias == -INF) | (x == -INF), -INF, x + bias)
    if repetition is not None:
        seen = torch.zeros_like(x, dtype=torch.bool) if prompt is None else unpack_bits(prompt, x.shape[1])
        seen = seen if counts is None else seen | (counts > 0)
        r = repetition[:, None]
        x = torch.where(seen, torch.where(x > 0, x / r, x * r), x)
    if counts is not None:
        if frequency is not None:
            x = x - frequency[:, None] * counts
        if presence is not None:
            x = x - presence[:, None] * (counts > 0)
    return x


def _reach(key: Tensor, weight: Tensor, share: Tensor) -> Tensor:
    """Per row the largest boundary b with sum of weight{key >= b} >= share * (sum of weight). key, weight [B, M] -> [B, 1]."""
    need = (share.double() * weight.sum(1).double()).ceil().to(torch.int64).clamp(min=1)[:, None]
    width = key.shape[1]
    for count in (min(width, 1024), width):  # nearly always the first 1024 hold enough
        values, index = key.topk(count, dim=1)
        reached = weight.gather(1, index).cumsum(1) >= need
        if count == width or bool(reached[:, -1].all()):
            break
    return values.gather(1, reached.to(torch.int8).argmax(1, keepdim=True))


def _top_k(y: Tensor, k: Tensor) -> Tensor:
    active = (k > 0) & (k < y.shape[1])
    if not bool(active.any()):
        return y
    largest = y.topk(int(k[active].max()), dim=1).values
    boundary = largest.gather(1, (k.clamp(1, largest.shape[1]) - 1)[:, None])
    return torch.where((y >= boundary) | ~active[:, None], y, -INF)


def _top_p(y: Tensor, p: Tensor) -> Tensor:
    active = p < 1
    if not bool(active.any()):
        return y
    boundary = _reach(y, philox.mass(y - y.amax(1, keepdim=True)), p)
    return torch.where((y >= boundary) | ~active[:, None], y, -INF)


def _min_p(y: Tensor, p: Tensor) -> Tensor:
    active = p > 0
    if not bool(active.any()):
        return y
    boundary = y.amax(1) + philox.log(p.clamp(SMALLEST, 1.0))
    return torch.where((y >= boundary[:, None]) | ~active[:, None], y, -INF)


def _typical_p(y: Tensor, p: Tensor) -> Tensor:
    active = p < 1
    if not bool(active.any()):
        return y
    z = y - y.amax(1, keepdim=True)
    e = philox.exp(z)
    weight = (e * 2.0**40).to(torch.int64)
    total = ((e * -z.clamp(min=-64.0)) * 2.0**40).to(torch.int64).sum(1).to(torch.float32)
    key = -(z + (total / weight.sum(1).to(torch.float32))[:, None]).abs()
    return torch.where((key >= _reach(key, weight, p)) | ~active[:, None], y, -INF)


_Filter = Callable[[Tensor, Tensor], Tensor]
_FILTERS: dict[str, _Filter] = {"top_k": _top_k, "top_p": _top_p, "min_p": _min_p, "typical_p": _typical_p}


def filtered(
    x: Tensor, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None, typical_p: Tensor | None,
    order: str,
) -> tuple[Tensor, Tensor | None]:
    """x [B, V] without NaN and +inf -> (y [B, M], ids [B, M] or None where M = V); what was dropped is -inf. None is off."""
    given = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "typical_p": typical_p}
    y, ids = x - x.amax(1, keepdim=True), None
    for step in ORDERS[order]:
        value = given.get(step)
        if step == "temperature":
            y = y / temperature[:, None]
        elif value is not None:
            y = _FILTERS[step](y, value)
            if ids is None:
                y, ids = _compact(y)
    return y, ids


def _compact(y: Tensor) -> tuple[Tensor, Tensor | None]:
    """Only the columns that some row kept, where they are few: later steps cost what is left."""
    most = int((y > -INF).sum(1).max())
    if most * 8 > y.shape[1]:
        return y, None
    values, ids = y.topk(most, dim=1)
    return values, ids


def _draw(y: Tensor, ids: Tensor | None, seed: Tensor, position: Tensor, choice: Tensor) -> Tensor:
    """argmax of y + g; of equal sums the lowest id."""
    key = seed[:, None], position[:, None], choice[:, None]
    if ids is None:
        words = philox.row_words(key[0], y.shape[1], key[1], key[2], philox.PURPOSE_SAMPLING, y.device)
        return (y + philox.gumbel_of(words)).argmax(1)
    score = y + philox.gumbel(key[0], ids, key[1], key[2])
    return torch.where(score == score.amax(1, keepdim=True), ids, torch.iinfo(torch.int64).max).amin(1)


def _log_softmax(x: Tensor) -> Tensor:
    """log-softmax [B, V]; +inf shares all the mass with other +inf, a row of -inf stays -inf."""
    best = x.amax(1, keepdim=True)
    x = torch.where(best == INF, torch.where(x == INF, 0.0, -INF), x)
    return torch.where(best == -INF, -INF, x - torch.logsumexp(x, 1, keepdim=True))


def _largest(logprobs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """ids and values [B, count] of the largest, of equal ones the lowest ids first."""
    bits = (logprobs + 0.0).view(torch.int32)  # + 0.0: one zero, not two
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    id_last = (1 << 32) - 1 - torch.arange(logprobs.shape[1], device=logprobs.device)
    ids = (ordered * (1 << 32) + id_last).topk(count, dim=1).indices
    return ids, logprobs.gather(1, ids)


def eager(
    logits: Tensor, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None, typical_p: Tensor | None,
    repetition: Tensor | None, frequency: Tensor | None, presence: Tensor | None, bias: Tensor | None, mask: Tensor | None,
    prompt: Tensor | None, counts: Tensor | None, seed: Tensor, position: Tensor, choice: Tensor, top_n: int,
    order: str = "gptfast", logprobs_mode: str = "raw",
) -> Sampled:
    """The definition, in PyTorch. Arguments as in `sample`."""
    raw = logits.float()
    x = penalised(raw, repetition, frequency, presence, bias, mask, prompt, counts)
    best = x.amax(1)  # a NaN anywhere in the row makes it NaN
    failed = raw.isnan().any(1) | best.isnan()
    empty = ~failed & (best == -INF)
    token = torch.where(failed[:, None], -INF, x).argmax(1)
    greedy = (temperature < SMALLEST) | (best == INF)
    greedy = greedy if top_p is None else greedy | (top_p <= 0)
    greedy = greedy if top_k is None else greedy | (top_k == 1)
    y = x.clone() if logprobs_mode == "processed" else None
    rows = (~(greedy | failed | empty)).nonzero()[:, 0]
    if rows.numel():
        picked = [None if t is None else t[rows] for t in (top_k, top_p, min_p, typical_p)]
        kept, ids = filtered(x[rows], temperature[rows], picked[0], picked[1], picked[2], picked[3], order)
        token[rows] = _draw(kept, ids, seed[rows], position[rows], choice[rows])
        if y is not None:
            y[rows] = kept if ids is None else torch.full_like(x[rows], -INF).scatter_(1, ids, kept)
    status = failed.to(torch.int8) + 2 * empty.to(torch.int8)
    good = status == 0
    logprobs = _log_softmax(raw if y is None else y)
    logprob = torch.where(good, logprobs.gather(1, token[:, None])[:, 0], 0.0)
    top_ids, top_logprobs = _largest(logprobs, top_n)
    if counts is not None:
        counts.scatter_add_(1, token[:, None], good[:, None].to(counts.dtype))
    return Sampled(torch.where(good, token, -1), status, logprob, top_ids, top_logprobs)


if backend.has_schema("sample"):

    @torch.library.register_fake("gptfast::sample")  # type: ignore[untyped-decorator]
    def _(
        logits: Tensor, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None,
        typical_p: Tensor | None, repetition: Tensor | None, frequency: Tensor | None, presence: Tensor | None, bias: Tensor | None,
        mask: Tensor | None, prompt: Tensor | None, counts: Tensor | None, seed: Tensor, position: Tensor, choice: Tensor,
        top_n: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        rows = logits.shape[0]
        token, top_ids = (logits.new_empty(shape, dtype=torch.int64) for shape in ((rows,), (rows, top_n)))
        logprob, top_logprobs = (logits.new_empty(shape, dtype=torch.float32) for shape in ((rows,), (rows, top_n)))
        return token, logits.new_empty(rows, dtype=torch.int8), logprob, top_ids, top_logprobs


@backend.limits("sample")
def _limits(name: str, inputs: tuple[Any, ...], needs_grad: bool) -> str | None:
    order, logprobs_mode = inputs[1:] or ("gptfast", "raw")
    if ORDERS[order] != ORDERS["gptfast"]:
        return f"order {order} is eager's alone"
    return "processed log-probabilities are eager's alone" if logprobs_mode != "raw" else None


def sample(
    logits: Tensor,
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
) -> Sampled:
    """Draws one token a row; formulas and edge cases in the module's docstring.

    logits [B, Vp] fp32|bf16|fp16; only the first `vocab` columns exist. temperature, top_p, min_p, typical_p, repetition,
    frequency, presence [B] fp32; top_k, seed, position, choice [B] int64; bias [B, V] fp32; mask (allowed ids) and prompt (ids
    seen there) are pack_bits words; counts [B, V] int32 holds how often an id is in the output, and the drawn ids are added to it.
    None is off.
    Raises gptfast.Error for shapes that do not fit, an unknown order, and (on the CPU) a negative or NaN parameter.
    """
    width = logits.shape[-1] if vocab is None else vocab
    if logits.dim() != 2 or not 0 < width <= logits.shape[1]:
        raise Error(f"sample: logits have shape {tuple(logits.shape)} and vocab is {vocab}; [B, V] with vocab of 1 to V is needed")
    sampling: dict[str, Any] = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "typical_p": typical_p,
        "repetition": repetition, "frequency": frequency, "presence": presence, "bias": bias, "mask": mask, "prompt": prompt,
        "counts": counts, "seed": seed, "position": position, "choice": choice, "top_n": top_n,
    }  # fmt: skip
    check_arguments(logits.shape[0], width, sampling, order, logprobs_mode)
    logits = logits[:, :width]
    name = backend.choose("sample", logits, order, logprobs_mode)
    if name == "eager":
        return eager(logits, **sampling, order=order, logprobs_mode=logprobs_mode)
    return run_kernel(partial(backend.impl("sample", name).forward, _rows(logits)), sampling)


def check_arguments(count: int, width: int, sampling: Mapping[str, Any], order: str, logprobs_mode: str) -> None:
    """Raises gptfast.Error for what does not go with `count` rows of `width` logits. `sampling`: the op's arguments by name."""
    _common.one_of("sample", "order", order, tuple(ORDERS))
    _common.one_of("sample", "logprobs_mode", logprobs_mode, ("raw", "processed"))
    if not 0 <= sampling["top_n"] <= width:
        raise Error(f"sample: top_n is {sampling['top_n']}; allowed: 0 to {width}")
    for label in (*_NUMBERS, "top_k", "seed", "position", "choice"):
        _check_shape(label, sampling[label], (count,))
    for label in ("mask", "prompt"):
        _check_shape(label, sampling[label], (count, (width + 31) // 32))
    for label in ("counts", "bias"):
        _check_shape(label, sampling[label], (count, width))
    for label in _NUMBERS:
        _check_finite(label, sampling[label], negative=label in ("frequency", "presence"))


_NUMBERS = ("temperature", "top_p", "min_p", "typical_p", "repetition", "frequency", "presence")


def run_kernel(forward: Callable[..., Any], sampling: Mapping[str, Any]) -> Sampled:
    """Calls a kernel with the arguments as it takes them: contiguous rows, numbers in fp32 and int64, counts in int32."""
    given = dict(sampling)
    for label, value in sampling.items():
        if not isinstance(value, Tensor):
            continue
        if label in _NUMBERS:
            given[label] = value.to(torch.float32).contiguous()
        elif label in ("top_k", "seed", "position", "choice"):
            given[label] = value.to(torch.int64).contiguous()
        elif label in ("mask", "prompt"):
            given[label] = value.contiguous()
        else:
            given[label] = _rows(value.to(torch.float32 if label == "bias" else torch.int32))
    sampled = Sampled(*forward(*given.values()))
    if given["counts"] is not sampling["counts"]:
        sampling["counts"].copy_(given["counts"])
    return sampled


def _rows(x: Tensor) -> Tensor:
    """x [B, V] itself where its rows are contiguous and apart, else a copy."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _check_shape(label: str, value: Tensor | None, shape: tuple[int, ...]) -> None:
    if value is not None and value.shape != shape:
        raise Error(f"sample: {label} has shape {tuple(value.shape)}, {shape} is needed")


def _check_finite(label: str, value: Tensor | None, negative: bool) -> None:
    if value is None or not _common.on_host(value):
        return
    if not bool(value.isfinite().all()) or (not negative and bool((value < 0).any())):
        allowed = "finite numbers" if negative else "finite numbers of at least 0"
        raise Error(f"sample: {label} holds {value.tolist()}; allowed: {allowed}")
