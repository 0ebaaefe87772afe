"""The noise: Philox4x32-10 words, and from them the exponential E and the Gumbel variable g = -log E; equal bits in every backend.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3") makes randomness a function of
(seed, id, position, choice, purpose), not a state: key = (seed mod 2^32, seed div 2^32) of the seed as uint64, counter =
(id div 4, position, choice, purpose); word `id mod 4` of the output is r. With v = (r + 1/2) 2^-32

    E = -log1p(-v) if r < 2^31, else -log((2^32 - 1 - r + 1/2) 2^-32);   g = -log E

The floats below are one fixed sequence of fp32 additions and multiplications, each rounded to nearest even by itself (no FMA, which
PyTorch lacks), of integer steps on the bits, and of constants that fp32 holds exactly. csrc/philox.h and kernels/_philox.py repeat
the sequence step by step, compiled without contraction; a change here is a change there. No step that matters meets a denormal
number, so flushing them changes nothing. Measured against float64 over all 2^32 words: |error of E| <= 1.4e-7 E and
|error of g| <= 2.0e-7 max(1, |g|); g is in [-3.13, 22.88].
"""

from __future__ import annotations

import torch
from torch import Tensor

PURPOSE_SAMPLING = 0
PURPOSE_DROPOUT = 1

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85

_LN2_HIGH, _LN2_LOW = 0.693359375, float.fromhex("-0x1.bd0106p-13")  # 355/512: its product with an exponent is exact
_SQRT_HALF = 0x3F3504F3  # the bits of sqrt(1/2)
_ONE_MINUS_SQRT_HALF = float.fromhex("0x1.2bec34p-2")
_LOG2_E = float.fromhex("0x1.715476p0")
_ROUND = 12582912.0  # 1.5 * 2^23: adding and subtracting it rounds to a whole number
# minimax on [sqrt(1/2) - 1, sqrt(2) - 1]: log(1 + f) = f - f^2/2 + f^3 P(f), lowest power first
_LOG = tuple(float.fromhex(c) for c in (
    "0x1.555554p-2", "-0x1.000226p-2", "0x1.99a008p-3", "-0x1.547244p-3",
    "0x1.22da1cp-3", "-0x1.0d8542p-3", "0x1.055b6ap-3", "-0x1.38b580p-4",
))
# minimax on [-0.35, 0.35]: exp(r) = 1 + r + r^2 Q(r)
_EXP = tuple(float.fromhex(c) for c in ("0x1.fffffcp-2", "0x1.55548ap-3", "0x1.555916p-5", "0x1.123fb4p-7", "0x1.6a1a8ep-10"))

Integer = Tensor | int


def block(seed: Integer, index: Tensor, position: Integer, choice: Integer, purpose: Integer) -> list[Tensor]:
    """The four words of counter (index, position, choice, purpose), each int64 in [0, 2^32) and of the broadcast shape.

    int64 products wrap modulo 2^64, so their bits 32..63 are the high word whatever the sign.
    """
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    c0: Integer = index & _MASK
    c1, c2, c3 = position & _MASK, choice & _MASK, purpose & _MASK
    for _ in range(10):  # after the third round every word is a tensor of the full shape
        p0, p1 = c0 * _M0, c2 * _M1
        h0, h1 = (p0 >> 32) & _MASK, (p1 >> 32) & _MASK
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, p1 & _MASK, h0 ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return [c for c in (c0, c1, c2, c3) if isinstance(c, Tensor)]


def words(seed: Integer, ids: Integer, position: Integer, choice: Integer, purpose: Integer) -> Tensor:
    """Word `ids mod 4` of counter (ids div 4, position, choice, purpose): int64 in [0, 2^32), of the arguments' broadcast shape."""
    ids = ids if isinstance(ids, Tensor) else torch.tensor(ids)
    w0, w1, w2, w3 = block(seed, ids >> 2, position, choice, purpose)
    lane = ids & 3
    return torch.where(lane < 2, torch.where(lane == 0, w0, w1), torch.where(lane == 2, w2, w3))


def row_words(
    seed: Integer, count: int, position: Integer, choice: Integer, purpose: Integer, device: torch.device | None = None
) -> Tensor:
    """`words` for the ids 0..count-1 at a quarter of the work: int64 [..., count]; the other arguments are integers or [..., 1]."""
    index = torch.arange((count + 3) // 4, device=device)
    return torch.stack(block(seed, index, position, choice, purpose), dim=-1).flatten(-2)[..., :count]


def _log_reduced(f: Tensor, k: Tensor) -> Tensor:
    """log((1 + f) 2^k) for f in [sqrt(1/2) - 1, sqrt(2) - 1] and whole k, both fp32."""
    p = f * _LOG[7] + _LOG[6]
    for c in reversed(_LOG[:6]):
        p = p * f + c
    z = f * f
    y = (f * z) * p
    y = y + k * _LN2_LOW
    y = y - z * 0.5
    return (f + y) + k * _LN2_HIGH


def log(x: Tensor) -> Tensor:
    """The published logarithm of fp32 x > 0 (normal numbers); |error| <= 1.2e-7 max(1, |log x|)."""
    bits = x.view(torch.int32)
    k = (bits - _SQRT_HALF) >> 23
    f = (bits - (k << 23)).view(torch.float32) - 1.0
    return _log_reduced(f, k.to(torch.float32))


def exp(x: Tensor) -> Tensor:
    """The published exponential of fp32 x <= 0 (no NaN), exp(max(x, -64)) with a relative error of at most 1.2e-7."""
    x = x.clamp(min=-64.0)
    n = (x * _LOG2_E + _ROUND) - _ROUND  # to the nearest whole number
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    q = r * _EXP[4] + _EXP[3]
    for c in reversed(_EXP[:3]):
        q = q * r + c
    y = ((r * r) * q + r) + 1.0
    return (y.view(torch.int32) + (n.to(torch.int32) << 23)).view(torch.float32)


def mass(x: Tensor) -> Tensor:
    """floor(exp(x) 2^40) as int64 for fp32 x <= 0: probability mass that adds up to the same sum in any order. -inf has none."""
    return (exp(x) * 2.0**40).to(torch.int64)


def exponential(r: Tensor) -> Tensor:
    """E of generation.md's noise for words r (int64 in [0, 2^32)): fp32 in [2^-33, 22.9], standard exponential."""
    low = r < 2**31
    m = torch.where(low, r, _MASK - r)
    # (m + 1/2) 2^-32, rounded once: both summands are exact
    t = ((m >> 16).to(torch.float32) * 65536.0 + ((m & 0xFFFF).to(torch.float32) + 0.5)) * 2.0**-32
    # log1p(-t): 1 - t is used as it is near 1, and as (1 + (1 - 2t)) / 2 below sqrt(1/2); 1 - 2t is exact there
    near = t < _ONE_MINUS_SQRT_HALF
    bits = t.view(torch.int32)
    k = torch.where(low, near.to(torch.int32) - 1, (bits - _SQRT_HALF) >> 23)
    f = torch.where(low, torch.where(near, -t, 1.0 - t * 2.0), (bits - (k << 23)).view(torch.float32) - 1.0)
    return -_log_reduced(f, k.to(torch.float32))


def gumbel_of(r: Tensor) -> Tensor:
    """g = -log E for words r: fp32, standard Gumbel."""
    return -log(exponential(r))


def gumbel(seed: Integer, ids: Integer, position: Integer, choice: Integer) -> Tensor:
    """The Gumbel noise of token `ids` at `position`: fp32 of the arguments' broadcast shape."""
    return gumbel_of(words(seed, ids, position, choice, PURPOSE_SAMPLING))
