// Philox4x32-10 for many counters at a time: the integer half of philox.h, whose words these are bit for bit.
#pragma once

#include "cpu/vec.h"
#include "philox.h"

namespace gptfast::cpu::GPTFAST_ISA {
namespace {

constexpr int kNoiseWords = 4 * kWidth;  // words that one call of noise_words makes

#if defined(__AVX512F__)

// the instruction multiplies the even lanes to 64 bits: one product for these, one for the odd lanes, and the halves sorted
GPTFAST_INLINE void multiply(Bits a, uint32_t by, Bits& high, Bits& low) {
  const __m512i lanes = (__m512i)a, factor = _mm512_set1_epi32(static_cast<int>(by));
  const __m512i even = _mm512_mul_epu32(lanes, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(lanes, 32), factor);
  high = (Bits)_mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB);
  low = (Bits)_mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CCAA);
}

#elif defined(__AVX2__)

GPTFAST_INLINE void multiply(Bits a, uint32_t by, Bits& high, Bits& low) {
  const __m256i lanes = (__m256i)a, factor = _mm256_set1_epi32(static_cast<int>(by));
  const __m256i even = _mm256_mul_epu32(lanes, factor), odd = _mm256_mul_epu32(_mm256_srli_epi64(lanes, 32), factor);
  high = (Bits)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  low = (Bits)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}

#else

typedef uint64_t Wide __attribute__((vector_size(kWidth * 8)));

GPTFAST_INLINE void multiply(Bits a, uint32_t by, Bits& high, Bits& low) {
  const Wide product = __builtin_convertvector(a, Wide) * by;
  high = __builtin_convertvector(product >> 32, Bits);
  low = a * by;
}

#endif

// out[i] = the word of id first_id + i, for kNoiseWords ids; first_id is a multiple of 4 (ids beyond 2^32 wrap, as philox.h's do)
GPTFAST_INLINE void noise_words(uint64_t seed, uint32_t first_id, uint32_t position, uint32_t choice, uint32_t purpose,
                                uint32_t* out) {
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  Bits c0, c1 = {}, c2 = {}, c3 = {};
  for (int lane = 0; lane < kWidth; ++lane) c0[lane] = (first_id >> 2) + lane;
  c1 += position;
  c2 += choice;
  c3 += purpose;
  for (int round = 0; round < 10; ++round) {
    Bits high0, low0, high1, low1;
    multiply(c0, 0xD2511F53u, high0, low0);
    multiply(c2, 0xCD9E8D57u, high1, low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int lane = 0; lane < kWidth; ++lane) {
    out[4 * lane] = c0[lane];
    out[4 * lane + 1] = c1[lane];
    out[4 * lane + 2] = c2[lane];
    out[4 * lane + 3] = c3[lane];
  }
}

}  // namespace
}  // namespace gptfast::cpu::GPTFAST_ISA
