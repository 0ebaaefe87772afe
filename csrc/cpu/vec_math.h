// Functions of a register of floats, for kernels whose bits need not agree between instruction sets (philox.h has those that must).
#pragma once

#include "cpu/vec.h"

namespace gptfast::cpu::GPTFAST_ISA {
namespace {

typedef int32_t Ints __attribute__((vector_size(kWidth * 4)));

// mask lanes are 0 or -1, as comparisons of Vec give them
GPTFAST_INLINE Vec choose(Ints mask, Vec yes, Vec no) { return mask ? yes : no; }
GPTFAST_INLINE Vec maximum(Vec a, Vec b) {  // b where a is NaN
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// The nearest whole number, halves to even, between `least` and `most`, for |v| < 2^22. 1.5 * 2^23 + v ends with it; an FMA would round
// a product less often, so units that prescribe bits are compiled without contraction.
GPTFAST_INLINE Ints whole(Vec v, int least, int most) {
  const Ints rounded = (Ints)(v + set(12582912.0f)) - 0x4b400000;
  const Ints bounded = rounded > most ? Ints{} + most : rounded;
  return bounded < least ? Ints{} + least : bounded;
}

// exp(x) to 1.2 ulp: 0 below -87.33 (no denormals), inf above 88.72, NaN for NaN. x = n ln 2 + r, |r| <= ln 2 / 2; Taylor-like
// minimax polynomial of degree 6 in r; 2^n in two factors, so that n = 128 is reached.
GPTFAST_INLINE Vec exp(Vec x) {
  const Vec round = set(12582912.0f);  // 1.5 * 2^23: adding and subtracting it rounds to a whole number
  const Vec bounded = x > set(90.0f) ? set(90.0f) : (x < set(-90.0f) ? set(-90.0f) : x);
  const Vec shifted = bounded * set(0x1.715476p+0f) + round;
  const Vec n = shifted - round;
  const Vec r = (bounded - n * set(0.693359375f)) - n * set(-0x1.bd0106p-13f);
  Vec p = r * set(1.9875691500e-4f) + set(1.3981999507e-3f);
  p = p * r + set(8.3334519073e-3f);
  p = p * r + set(4.1665795894e-2f);
  p = p * r + set(1.6666665459e-1f);
  p = p * r + set(5.0000001201e-1f);
  const Vec y = (p * (r * r) + r) + set(1.0f);
  const Ints whole = __builtin_convertvector(n, Ints);
  const Ints half = whole >> 1;
  const Vec scaled = y * (Vec)((half + 127) << 23) * (Vec)((whole - half + 127) << 23);
  const Vec in_range = choose(x < set(-87.33f), set(0.0f), choose(x > set(88.72f), set(__builtin_inff()), scaled));
  return choose(x != x, x, in_range);
}

#if defined(__AVX512F__)
// v * 2^(the whole number below n), to 0 where that is too small for a float
GPTFAST_INLINE Vec scale_by_power(Vec v, Vec n) { return (Vec)_mm512_scalef_ps((__m512)v, (__m512)n); }
#endif

// exp(x) for x <= 88 to 1.2 ulp in half of exp's operations, NaN for NaN: 0 where it would be denormal (AVX-512: only where it would be
// less than that). Elsewhere the whole number that the bits of `shifted` end with goes into y's exponent by an addition.
GPTFAST_INLINE Vec exp_bounded(Vec x) {
#if defined(__AVX512F__)
  const Vec bounded = maximum(set(-110.0f), x);
  const Vec n = (Vec)_mm512_roundscale_ps((__m512)(bounded * set(0x1.715476p+0f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Vec round = set(12582912.0f), bounded = maximum(set(-87.33f), x);
  const Vec shifted = bounded * set(0x1.715476p+0f) + round;
  const Vec n = shifted - round;
#endif
  const Vec r = (bounded - n * set(0.693359375f)) - n * set(-0x1.bd0106p-13f);
  Vec p = r * set(1.9875691500e-4f) + set(1.3981999507e-3f);
  p = p * r + set(8.3334519073e-3f);
  p = p * r + set(4.1665795894e-2f);
  p = p * r + set(1.6666665459e-1f);
  p = p * r + set(5.0000001201e-1f);
  const Vec y = (p * (r * r) + r) + set(1.0f);
#if defined(__AVX512F__)
  return scale_by_power(y, n);
#else
  return choose(x < set(-87.33f), set(0.0f), (Vec)((Bits)y + ((Bits)shifted << 23)));
#endif
}

// 2^x for x <= 0 to 1.1e-4 of its value, for results that are rounded to bf16; NaN or some number where x is NaN
GPTFAST_INLINE Vec exp2_16bit(Vec x) {
#if defined(__AVX512F__)
  const Vec f = (Vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x less its whole part: 0 <= f < 1
  const Vec p = ((f * set(0x1.3f96a40p-4f) + set(0x1.cefc4c0p-3f)) * f + set(0x1.64444c0p-1f)) * f + set(0x1.fff6320p-1f);
  return scale_by_power(p, x);
#else
  // the polynomial is exactly 1 at 0, so that what is subtracted makes the smallest result, that of -125 and below, exactly 0
  const Vec round = set(12582912.0f), bounded = maximum(x, set(-125.0f));
  const Vec shifted = bounded + round;
  const Vec f = bounded - (shifted - round);
  const Vec p = ((f * set(0x1.c2a216p-5f) + set(0x1.f00c4cp-3f)) * f + set(0x1.62f5fap-1f)) * f + set(1.0f);
  return (Vec)((Bits)p + ((Bits)shifted << 23)) - set(0x1p-125f);
#endif
}

// 1 / x for normal x, to 1 ulp
GPTFAST_INLINE Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  const Vec r = (Vec)_mm512_rcp14_ps((__m512)x);
  return r + r * (set(1.0f) - x * r);
#else
  return set(1.0f) / x;
#endif
}

// 1 / x to 4e-4 of its value, for results that are rounded to bf16
GPTFAST_INLINE Vec reciprocal_16bit(Vec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_rcp14_ps((__m512)x);
#elif defined(__AVX2__)
  return (Vec)_mm256_rcp_ps((__m256)x);
#else
  return set(1.0f) / x;
#endif
}

// The upper tail of the normal distribution without its exponential: erfc(a / sqrt(2)) / 2 = exp(-a^2 / 2) * normal_tail(a) for
// a >= 0, to 3.7e-7 of its value up to a = 13.5, where the exponential ends. Polynomial in t = 1 / (1 + 0.3 a) (Lawson's fit).
template <bool kShort>
GPTFAST_INLINE Vec normal_tail(Vec a) {
  const Vec scaled = a * set(0.3f) + set(1.0f);
  const Vec t = kShort ? reciprocal_16bit(scaled) : set(1.0f) / scaled;  // 0 for an infinite a
  Vec p = t * set(0x1.3a08f0p-5f) + set(-0x1.5a03a8p-3f);
  p = p * t + set(0x1.d363eap-3f);
  p = p * t + set(-0x1.374c0cp-4f);
  p = p * t + set(0x1.233226p-3f);
  p = p * t + set(0x1.846f68p-4f);
  p = p * t + set(0x1.f33aa6p-4f);
  p = p * t + set(0x1.e9718ep-4f);
  return p * t + set(0x1.cbe922p-18f);
}

}  // namespace
}  // namespace gptfast::cpu::GPTFAST_ISA
