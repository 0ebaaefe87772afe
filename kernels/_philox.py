"""Triton twin of gptfast/philox.py and csrc/philox.h: the same fp32 and integer steps, hence the same bits.

Kernels that call these are launched with `enable_fp_fusion=False`: a contracted multiplication and addition would round once.
"""

from __future__ import annotations

import triton
import triton.language as tl

SAMPLING: tl.constexpr = tl.constexpr(0)
DROPOUT: tl.constexpr = tl.constexpr(1)

LN2_HIGH: tl.constexpr = tl.constexpr(0.693359375)
LN2_LOW: tl.constexpr = tl.constexpr(float.fromhex("-0x1.bd0106p-13"))
LOG2_E: tl.constexpr = tl.constexpr(float.fromhex("0x1.715476p0"))
ROUND: tl.constexpr = tl.constexpr(12582912.0)
SQRT_HALF: tl.constexpr = tl.constexpr(0x3F3504F3)
ONE_MINUS_SQRT_HALF: tl.constexpr = tl.constexpr(float.fromhex("0x1.2bec34p-2"))

L0: tl.constexpr = tl.constexpr(float.fromhex("0x1.555554p-2"))
L1: tl.constexpr = tl.constexpr(float.fromhex("-0x1.000226p-2"))
L2: tl.constexpr = tl.constexpr(float.fromhex("0x1.99a008p-3"))
L3: tl.constexpr = tl.constexpr(float.fromhex("-0x1.547244p-3"))
L4: tl.constexpr = tl.constexpr(float.fromhex("0x1.22da1cp-3"))
L5: tl.constexpr = tl.constexpr(float.fromhex("-0x1.0d8542p-3"))
L6: tl.constexpr = tl.constexpr(float.fromhex("0x1.055b6ap-3"))
L7: tl.constexpr = tl.constexpr(float.fromhex("-0x1.38b580p-4"))

X0: tl.constexpr = tl.constexpr(float.fromhex("0x1.fffffcp-2"))
X1: tl.constexpr = tl.constexpr(float.fromhex("0x1.55548ap-3"))
X2: tl.constexpr = tl.constexpr(float.fromhex("0x1.555916p-5"))
X3: tl.constexpr = tl.constexpr(float.fromhex("0x1.123fb4p-7"))
X4: tl.constexpr = tl.constexpr(float.fromhex("0x1.6a1a8ep-10"))


@triton.jit
def block(
    seed: tl.tensor, index: tl.tensor, position: tl.tensor, choice: tl.tensor, purpose: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The four uint32 words of counter (index, position, choice, purpose); seed int64, the others integers, broadcast together."""
    k0 = tl.cast(seed, tl.uint32)
    k1 = tl.cast(seed >> 32, tl.uint32)
    c0 = tl.cast(index, tl.uint32)
    c1 = tl.cast(position, tl.uint32)
    c2 = tl.cast(choice, tl.uint32)
    c3 = tl.cast(purpose, tl.uint32)
    m0 = tl.full([], 0xD2511F53, tl.uint32)
    m1 = tl.full([], 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):
        h0 = tl.umulhi(c0, m0)
        h1 = tl.umulhi(c2, m1)
        l0 = c0 * m0
        l1 = c2 * m1
        c0 = h1 ^ c1 ^ k0
        c1 = l1
        c2 = h0 ^ c3 ^ k1
        c3 = l0
        k0 = k0 + tl.full([], 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full([], 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def word(seed: tl.tensor, ids: tl.tensor, position: tl.tensor, choice: tl.tensor, purpose: tl.tensor) -> tl.tensor:
    """Word `ids mod 4` of counter (ids div 4, position, choice, purpose): uint32."""
    w0, w1, w2, w3 = block(seed, ids >> 2, position, choice, purpose)
    lane = ids & 3
    return tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))


@triton.jit
def log_reduced(f: tl.tensor, k: tl.tensor) -> tl.tensor:
    """log((1 + f) 2^k) for f in [sqrt(1/2) - 1, sqrt(2) - 1] and whole k, both fp32."""
    p = f * L7 + L6
    p = p * f + L5
    p = p * f + L4
    p = p * f + L3
    p = p * f + L2
    p = p * f + L1
    p = p * f + L0
    z = f * f
    y = (f * z) * p
    y = y + k * LN2_LOW
    y = y - z * 0.5
    return (f + y) + k * LN2_HIGH


@triton.jit
def log(x: tl.tensor) -> tl.tensor:
    """The published logarithm of normal fp32 x > 0."""
    b = x.to(tl.int32, bitcast=True)
    k = (b - SQRT_HALF) >> 23
    f = (b - (k << 23)).to(tl.float32, bitcast=True) - 1.0
    return log_reduced(f, k.to(tl.float32))


@triton.jit
def exp(x: tl.tensor) -> tl.tensor:
    """exp(max(x, -64)) for fp32 x <= 0."""
    x = tl.where(x > -64.0, x, -64.0)
    n = (x * LOG2_E + ROUND) - ROUND
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    q = r * X4 + X3
    q = q * r + X2
    q = q * r + X1
    q = q * r + X0
    y = ((r * r) * q + r) + 1.0
    return (y.to(tl.int32, bitcast=True) + (n.to(tl.int32) << 23)).to(tl.float32, bitcast=True)


@triton.jit
def mass(x: tl.tensor) -> tl.tensor:
    """floor(exp(x) 2^40) as int64 for fp32 x <= 0."""
    return (exp(x) * 1099511627776.0).to(tl.int64)


@triton.jit
def exponential(r: tl.tensor) -> tl.tensor:
    """Standard exponential fp32 variable of the uint32 word r."""
    low = r < tl.full([], 0x80000000, tl.uint32)
    m = tl.where(low, r, r ^ tl.full([], 0xFFFFFFFF, tl.uint32))
    t = ((m >> 16).to(tl.float32) * 65536.0 + ((m & 0xFFFF).to(tl.float32) + 0.5)) * 2.3283064365386963e-10
    near = t < ONE_MINUS_SQRT_HALF
    b = t.to(tl.int32, bitcast=True)
    k = tl.where(low, near.to(tl.int32) - 1, (b - SQRT_HALF) >> 23)
    f = tl.where(low, tl.where(near, -t, 1.0 - t * 2.0), (b - (k << 23)).to(tl.float32, bitcast=True) - 1.0)
    return -log_reduced(f, k.to(tl.float32))


@triton.jit
def gumbel_of(r: tl.tensor) -> tl.tensor:
    """Standard Gumbel fp32 variable of the uint32 word r."""
    return -log(exponential(r))


@triton.jit
def gumbel(seed: tl.tensor, ids: tl.tensor, position: tl.tensor, choice: tl.tensor) -> tl.tensor:
    """The Gumbel noise of token `ids` at `position`, fp32."""
    return gumbel_of(word(seed, ids, position, choice, SAMPLING))
