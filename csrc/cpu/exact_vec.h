// philox.h for many lanes at a time, bit for bit: words, the published log and exp, E, g, and probability mass in integers.
// Only for units compiled with -ffp-contract=off (exact_<isa>.cpp): each operation below is rounded by itself, as philox.h's are.
#pragma once

#include <immintrin.h>

#include "cpu/vec_math.h"
#include "philox.h"

namespace gptfast::cpu::GPTFAST_ISA {
namespace {

typedef uint64_t Pairs __attribute__((vector_size(kWidth * 4)));  // counters and words, one in each 64 bits

constexpr int kPairs = kWidth / 2;

GPTFAST_INLINE Ints lane_numbers() {
  Ints numbers = {};
  for (int i = 0; i < kWidth; ++i) numbers[i] = i;
  return numbers;
}

GPTFAST_INLINE Pairs pair_numbers() {
  Pairs numbers = {};
  for (int i = 0; i < kPairs; ++i) numbers[i] = i;
  return numbers;
}

// the 64-bit products of the lower halves
GPTFAST_INLINE Pairs multiply_halves(Pairs a, uint32_t by) {
#if defined(__AVX512F__)
  return (Pairs)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(by));
#elif defined(__AVX2__)
  return (Pairs)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(by));
#elif defined(__SSE2__)
  return (Pairs)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(by));
#else
  return (a & 0xFFFFFFFFu) * by;
#endif
}

// Ten rounds on kChains counters of which c0 is given; the words are the lower halves of words[chain][0..3]
template <int kChains>
GPTFAST_INLINE void philox_words(uint64_t seed, uint32_t position, uint32_t choice, const Pairs* index, Pairs (*words)[4]) {
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int j = 0; j < kChains; ++j) {
    words[j][0] = index[j];
    words[j][1] = Pairs{} + position;
    words[j][2] = Pairs{} + choice;
    words[j][3] = Pairs{} + philox::kSampling;
  }
  for (int round = 0; round < 10; ++round) {
    for (int j = 0; j < kChains; ++j) {
      Pairs* c = words[j];
      const Pairs p0 = multiply_halves(c[0], 0xD2511F53u), p1 = multiply_halves(c[2], 0xCD9E8D57u);
      c[0] = (p1 >> 32) ^ c[1] ^ k0;
      c[1] = p1;
      c[2] = (p0 >> 32) ^ c[3] ^ k1;
      c[3] = p0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

GPTFAST_INLINE Vec exact_log_reduced(Vec f, Vec k) {
  Vec p = f * set(-0x1.38b580p-4f) + set(0x1.055b6ap-3f);
  p = p * f + set(-0x1.0d8542p-3f);
  p = p * f + set(0x1.22da1cp-3f);
  p = p * f + set(-0x1.547244p-3f);
  p = p * f + set(0x1.99a008p-3f);
  p = p * f + set(-0x1.000226p-2f);
  p = p * f + set(0x1.555554p-2f);
  const Vec z = f * f;
  Vec y = (f * z) * p;
  y = y + k * set(philox::kLn2Low);
  y = y - z * set(0.5f);
  return (f + y) + k * set(philox::kLn2High);
}

GPTFAST_INLINE Vec exact_log(Vec x) {
  const Ints bits = (Ints)x, k = (bits - philox::kSqrtHalf) >> 23;
  return exact_log_reduced((Vec)(bits - (k << 23)) - set(1.0f), __builtin_convertvector(k, Vec));
}

GPTFAST_INLINE Vec exact_exp(Vec x) {
  x = x > set(-64.0f) ? x : set(-64.0f);
  const Vec n = (x * set(philox::kLog2E) + set(philox::kRound)) - set(philox::kRound);
  const Vec r = (x - n * set(philox::kLn2High)) - n * set(philox::kLn2Low);
  Vec q = r * set(0x1.6a1a8ep-10f) + set(0x1.123fb4p-7f);
  q = q * r + set(0x1.555916p-5f);
  q = q * r + set(0x1.55548ap-3f);
  q = q * r + set(0x1.fffffcp-2f);
  const Vec y = ((r * r) * q + r) + set(1.0f);
  return (Vec)((Ints)y + (__builtin_convertvector(n, Ints) << 23));
}

GPTFAST_INLINE Vec exact_gumbel(Bits r) {
  const Ints low = (Ints)r >= 0;
  const Ints m = low ? (Ints)r : ~(Ints)r;
  const Vec upper = __builtin_convertvector(m >> 16, Vec), lower = __builtin_convertvector(m & 0xFFFF, Vec);
  const Vec t = (upper * set(65536.0f) + (lower + set(0.5f))) * set(0x1p-32f);
  const Ints near = t < set(philox::kOneMinusSqrtHalf);
  const Ints bits = (Ints)t, exponent = (bits - philox::kSqrtHalf) >> 23;
  const Ints k = low ? (near ? Ints{} : Ints{} - 1) : exponent;
  const Vec reduced = (Vec)(bits - (exponent << 23)) - set(1.0f);
  const Vec f = choose(low, choose(near, -t, set(1.0f) - t * set(2.0f)), reduced);
  return -exact_log(-exact_log_reduced(f, __builtin_convertvector(k, Vec)));
}

// g of any ids (their lower 32 bits count)
GPTFAST_INLINE Vec exact_gumbel(uint64_t seed, Bits ids, uint32_t position, uint32_t choice) {
  const Pairs pairs = (Pairs)ids;
  const Pairs index[2] = {(pairs & 0xFFFFFFFFu) >> 2, pairs >> 34};
  Pairs words[2][4];
  philox_words<2>(seed, position, choice, index, words);
  Bits of_word[4];
  for (int w = 0; w < 4; ++w) of_word[w] = (Bits)((words[0][w] & 0xFFFFFFFFu) | (words[1][w] << 32));
  const Bits lane = ids & 3u;
  const Bits r = lane < 2u ? (lane == 0u ? of_word[0] : of_word[1]) : (lane == 2u ? of_word[2] : of_word[3]);
  return exact_gumbel(r);
}

// Sums floor(v 2^40) for v in [0, 1]: the upper and the lower 20 bits of each apart, which are exact in fp32 and in 32-bit sums
struct Mass {
  Ints high = {}, low = {};
  int64_t total = 0;
  int pending = 0;

  inline __attribute__((always_inline)) void add(Vec v) {
    const Vec scaled = v * set(0x1p20f);
    const Ints whole = __builtin_convertvector(scaled, Ints);
    high += whole;
    low += __builtin_convertvector((scaled - __builtin_convertvector(whole, Vec)) * set(0x1p20f), Ints);
    if (++pending == 1024) flush();
  }
  inline __attribute__((always_inline)) void flush() {
    for (int i = 0; i < kWidth; ++i) total += ((int64_t)high[i] << 20) + low[i];
    high = low = Ints{};
    pending = 0;
  }
};

}  // namespace
}  // namespace gptfast::cpu::GPTFAST_ISA
