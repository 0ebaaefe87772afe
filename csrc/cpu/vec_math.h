// Functions of a register of floats, for kernels whose bits need not agree between instruction sets (philox.h has those that must).
#pragma once

#include "cpu/vec.h"

namespace gptfast::cpu::GPTFAST_ISA {
namespace {

typedef int32_t Ints __attribute__((vector_size(kWidth * 4)));

// mask lanes are 0 or -1, as comparisons of Vec give them
GPTFAST_INLINE Vec choose(Ints mask, Vec yes, Vec no) { return mask ? yes : no; }
GPTFAST_INLINE Vec maximum(Vec a, Vec b) { return a > b ? a : b; }  // b where a is NaN

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

// exp(x) for x <= 88 in half the operations, to 1.2 ulp: 0 below -87.33, NaN for NaN. The whole number that the bits of `shifted` end
// with goes into y's exponent by an addition.
GPTFAST_INLINE Vec exp_bounded(Vec x) {
  const Vec round = set(12582912.0f);
  const Vec bounded = maximum(set(-87.33f), x);
  const Vec shifted = bounded * set(0x1.715476p+0f) + round;
  const Vec n = shifted - round;
  const Vec r = (bounded - n * set(0.693359375f)) - n * set(-0x1.bd0106p-13f);
  Vec p = r * set(1.9875691500e-4f) + set(1.3981999507e-3f);
  p = p * r + set(8.3334519073e-3f);
  p = p * r + set(4.1665795894e-2f);
  p = p * r + set(1.6666665459e-1f);
  p = p * r + set(5.0000001201e-1f);
  const Vec y = (p * (r * r) + r) + set(1.0f);
  return choose(x < set(-87.33f), set(0.0f), (Vec)((Bits)y + ((Bits)shifted << 23)));
}

}  // namespace
}  // namespace gptfast::cpu::GPTFAST_ISA
