// The noise, for C++ and CUDA alike: Philox4x32-10 (Salmon et al. 2011) and the fp32 sequence that makes E, g and probability mass
// from it. gptfast/philox.py has the formulas, the derivation and the error bounds, kernels/_philox.py the Triton twin: all three give
// the same bits, so every addition and multiplication below is rounded by itself, and each line stands in the same place in each twin.
// Host code that includes this is compiled with -ffp-contract=off; device code uses intrinsics that are never contracted.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define PHILOX_FN __host__ __device__ __forceinline__
#else
#define PHILOX_FN static inline __attribute__((always_inline))
#endif

namespace philox {

constexpr uint32_t kSampling = 0, kDropout = 1;

struct Words {
  uint32_t w[4];
};

PHILOX_FN Words block(uint64_t seed, uint32_t index, uint32_t position, uint32_t choice, uint32_t purpose) {
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  uint32_t c0 = index, c1 = position, c2 = choice, c3 = purpose;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = (uint64_t)c0 * 0xD2511F53u, p1 = (uint64_t)c2 * 0xCD9E8D57u;
    c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
    c1 = (uint32_t)p1;
    c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
    c3 = (uint32_t)p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

PHILOX_FN uint32_t word(uint64_t seed, uint32_t id, uint32_t position, uint32_t choice, uint32_t purpose) {
  return block(seed, id >> 2, position, choice, purpose).w[id & 3];
}

PHILOX_FN float mul(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

PHILOX_FN float add(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

PHILOX_FN int32_t bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_int(x);
#else
  return __builtin_bit_cast(int32_t, x);
#endif
}

PHILOX_FN float from_bits(int32_t x) {
#if defined(__CUDA_ARCH__)
  return __int_as_float(x);
#else
  return __builtin_bit_cast(float, x);
#endif
}

constexpr float kLn2High = 0.693359375f, kLn2Low = -0x1.bd0106p-13f, kLog2E = 0x1.715476p+0f, kRound = 12582912.0f;
constexpr float kOneMinusSqrtHalf = 0x1.2bec34p-2f;
constexpr int32_t kSqrtHalf = 0x3F3504F3;

// log((1 + f) 2^k) for f in [sqrt(1/2) - 1, sqrt(2) - 1] and whole k
PHILOX_FN float log_reduced(float f, float k) {
  float p = add(mul(f, -0x1.38b580p-4f), 0x1.055b6ap-3f);
  p = add(mul(p, f), -0x1.0d8542p-3f);
  p = add(mul(p, f), 0x1.22da1cp-3f);
  p = add(mul(p, f), -0x1.547244p-3f);
  p = add(mul(p, f), 0x1.99a008p-3f);
  p = add(mul(p, f), -0x1.000226p-2f);
  p = add(mul(p, f), 0x1.555554p-2f);
  const float z = mul(f, f);
  float y = mul(mul(f, z), p);
  y = add(y, mul(k, kLn2Low));
  y = add(y, -mul(z, 0.5f));
  return add(add(f, y), mul(k, kLn2High));
}

// logarithm of a normal x > 0
PHILOX_FN float log(float x) {
  const int32_t b = bits(x), k = (b - kSqrtHalf) >> 23;
  return log_reduced(add(from_bits(b - (int32_t)((uint32_t)k << 23)), -1.0f), (float)k);
}

// exp(max(x, -64)) for x <= 0
PHILOX_FN float exp(float x) {
  x = x > -64.0f ? x : -64.0f;
  const float n = add(add(mul(x, kLog2E), kRound), -kRound);
  const float r = add(add(x, -mul(n, kLn2High)), -mul(n, kLn2Low));
  float q = add(mul(r, 0x1.6a1a8ep-10f), 0x1.123fb4p-7f);
  q = add(mul(q, r), 0x1.555916p-5f);
  q = add(mul(q, r), 0x1.55548ap-3f);
  q = add(mul(q, r), 0x1.fffffcp-2f);
  const float y = add(add(mul(mul(r, r), q), r), 1.0f);
  return from_bits(bits(y) + (int32_t)((uint32_t)(int32_t)n << 23));
}

// floor(exp(x) 2^40) for x <= 0: sums of it do not depend on their order
PHILOX_FN int64_t mass(float x) { return (int64_t)mul(exp(x), 1099511627776.0f); }

// standard exponential variable of a word
PHILOX_FN float exponential(uint32_t r) {
  const bool low = r < 0x80000000u;
  const uint32_t m = low ? r : ~r;
  const float t = mul(add(mul((float)(int32_t)(m >> 16), 65536.0f), add((float)(int32_t)(m & 0xFFFFu), 0.5f)), 0x1p-32f);
  const bool near = t < kOneMinusSqrtHalf;
  const int32_t b = bits(t);
  const int32_t k = low ? (near ? 0 : -1) : (b - kSqrtHalf) >> 23;
  const float f = low ? (near ? -t : add(1.0f, -mul(t, 2.0f))) : add(from_bits(b - (int32_t)((uint32_t)k << 23)), -1.0f);
  return -log_reduced(f, (float)k);
}

// standard Gumbel variable of a word, and of a token at a position
PHILOX_FN float gumbel(uint32_t r) { return -log(exponential(r)); }

PHILOX_FN float gumbel(uint64_t seed, uint32_t id, uint32_t position, uint32_t choice) {
  return gumbel(word(seed, id, position, choice, kSampling));
}

}  // namespace philox

#undef PHILOX_FN
