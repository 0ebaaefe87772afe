// A register of floats for one instruction set, and loads and stores from fp32, bf16 and fp16 memory, whole or the first n lanes.
// The only file that sees intrinsics. Arithmetic is the compilers' own on vector types (a * b + c becomes one FMA where there is one).
// No torch and no STL: everything here is compiled per ISA, and must not leave a symbol that another ISA could pick up.
#pragma once

#include "cpu/vec_types.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace gptfast::cpu::GPTFAST_ISA {
namespace {

#define GPTFAST_INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef uint32_t Bits __attribute__((vector_size(kWidth * 4)));
typedef uint16_t Half __attribute__((vector_size(kWidth * 2)));

template <typename To, typename From>
GPTFAST_INLINE To read(const From* pointer) {
  To value;
  __builtin_memcpy(&value, pointer, sizeof(To));
  return value;
}

GPTFAST_INLINE Vec load(const float* p) { return read<Vec>(p); }
GPTFAST_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof(v)); }

// bf16 is the upper half of an fp32. g++ 12 makes six instructions of __builtin_convertvector here, hence the intrinsics.
#if defined(__AVX512F__)
GPTFAST_INLINE Vec load(const bf16* p) { return (Vec)((Bits)_mm512_cvtepu16_epi32(read<__m256i>(p)) << 16); }
#elif defined(__AVX2__)
GPTFAST_INLINE Vec load(const bf16* p) { return (Vec)((Bits)_mm256_cvtepu16_epi32(read<__m128i>(p)) << 16); }
#else
GPTFAST_INLINE Vec load(const bf16* p) { return (Vec)(__builtin_convertvector(read<Half>(p), Bits) << 16); }
#endif

#if defined(__AVX512F__)

GPTFAST_INLINE Vec set(float x) { return (Vec)_mm512_set1_ps(x); }
GPTFAST_INLINE float sum(Vec v) { return _mm512_reduce_add_ps((__m512)v); }
GPTFAST_INLINE float max(Vec v) { return _mm512_reduce_max_ps((__m512)v); }
GPTFAST_INLINE Vec sqrt(Vec v) { return (Vec)_mm512_sqrt_ps((__m512)v); }
GPTFAST_INLINE Vec load(const fp16* p) { return (Vec)_mm512_cvtph_ps(read<__m256i>(p)); }
// rounds to nearest even; results below 2^-126 become 0
GPTFAST_INLINE Half to_bf16(Vec v) { return (Half)_mm512_cvtneps_pbh((__m512)v); }
GPTFAST_INLINE Half to_fp16(Vec v) { return (Half)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }

GPTFAST_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
GPTFAST_INLINE Vec load(const float* p, int n) { return (Vec)_mm512_maskz_loadu_ps(first(n), p); }
GPTFAST_INLINE Vec load(const bf16* p, int n) {
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), p)), 16);
}
GPTFAST_INLINE Vec load(const fp16* p, int n) { return (Vec)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }
GPTFAST_INLINE Vec keep_first(Vec v, int n) { return (Vec)_mm512_maskz_mov_ps(first(n), (__m512)v); }
GPTFAST_INLINE void store(float* p, Vec v, int n) { _mm512_mask_storeu_ps(p, first(n), (__m512)v); }
GPTFAST_INLINE void store(bf16* p, Vec v, int n) { _mm256_mask_storeu_epi16(p, first(n), (__m256i)to_bf16(v)); }
GPTFAST_INLINE void store(fp16* p, Vec v, int n) { _mm256_mask_storeu_epi16(p, first(n), (__m256i)to_fp16(v)); }

#else

GPTFAST_INLINE Vec select(Bits mask, Vec yes, Vec no) { return (Vec)(((Bits)yes & mask) | ((Bits)no & ~mask)); }

GPTFAST_INLINE Half to_bf16(Vec v) {
  const Bits bits = (Bits)v;
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest even
  const Bits is_nan = (Bits)(v != v);
  return __builtin_convertvector((rounded & ~is_nan) | (((bits >> 16) | 0x40u) & is_nan), Half);
}

#if defined(__AVX2__)

GPTFAST_INLINE Vec set(float x) { return (Vec)_mm256_set1_ps(x); }
GPTFAST_INLINE Vec load(const fp16* p) { return (Vec)_mm256_cvtph_ps(read<__m128i>(p)); }
GPTFAST_INLINE Half to_fp16(Vec v) { return (Half)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
GPTFAST_INLINE float sum(Vec v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }
GPTFAST_INLINE Vec sqrt(Vec v) { return (Vec)_mm256_sqrt_ps((__m256)v); }

#else

GPTFAST_INLINE Vec set(float x) { return Vec{x, x, x, x}; }
GPTFAST_INLINE float sum(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
GPTFAST_INLINE Vec sqrt(Vec v) {
  for (int i = 0; i < kWidth; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
}

// fp16 has 5 exponent bits biased by 15: shift the 15 bits to fp32's place and multiply by 2^(127-15); exact, subnormals included
GPTFAST_INLINE Vec load(const fp16* p) {
  const Bits half = __builtin_convertvector(read<Half>(p), Bits);
  const Bits magnitude = (half & 0x7fffu) << 13;
  const Bits special = (Bits)((half & 0x7c00u) == 0x7c00u);  // inf and NaN
  const Vec finite = (Vec)magnitude * set(0x1p112f);
  return (Vec)((Bits)select(special, (Vec)(magnitude | 0x7f800000u), finite) | (half & 0x8000u) << 16);
}

GPTFAST_INLINE Half to_fp16(Vec v) {
  const Bits sign = ((Bits)v >> 16) & 0x8000u, magnitude = (Bits)v & 0x7fffffffu;
  const Bits normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;  // rebias by -112, round to nearest even
  const Bits subnormal = (Bits)((Vec)magnitude + set(0.5f)) - 0x3f000000u;         // 0.5's last bit is fp16's smallest number
  const Bits large = (Bits)(magnitude >= 0x47800000u), small = (Bits)(magnitude < 0x38800000u), is_nan = (Bits)(v != v);
  const Bits finite = (subnormal & small) | (normal & ~small);
  const Bits special = (is_nan & 0x7e00u) | (~is_nan & 0x7c00u);
  return __builtin_convertvector(sign | (special & large) | (finite & ~large), Half);
}

#endif

GPTFAST_INLINE float max(Vec v) {
  float result = v[0];
  for (int i = 1; i < kWidth; ++i) result = v[i] > result ? v[i] : result;
  return result;
}

GPTFAST_INLINE Vec keep_first(Vec v, int n) {
  for (int i = n; i < kWidth; ++i) v[i] = 0;
  return v;
}

template <typename T>
GPTFAST_INLINE Vec load(const T* p, int n) {
  T buffer[kWidth] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}

#endif

GPTFAST_INLINE void store(bf16* p, Vec v) { const Half half = to_bf16(v); __builtin_memcpy(p, &half, sizeof(half)); }
GPTFAST_INLINE void store(fp16* p, Vec v) { const Half half = to_fp16(v); __builtin_memcpy(p, &half, sizeof(half)); }

#if !defined(__AVX512F__)
template <typename T>
GPTFAST_INLINE void store(T* p, Vec v, int n) {
  T buffer[kWidth];
  store(buffer, v);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
}
#endif

// Stores past the caches, for memory that nobody reads soon: a line is not read before it is written. p is aligned to its own size.
// finish_streams() comes before other threads may look.
#if defined(__AVX512F__)
GPTFAST_INLINE void stream(float* p, Vec v) { _mm512_stream_ps(p, (__m512)v); }
GPTFAST_INLINE void stream_half(void* p, Half half) { _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)half); }
GPTFAST_INLINE void finish_streams() { _mm_sfence(); }
#elif defined(__AVX2__)
GPTFAST_INLINE void stream(float* p, Vec v) { _mm256_stream_ps(p, (__m256)v); }
GPTFAST_INLINE void stream_half(void* p, Half half) { _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)half); }
GPTFAST_INLINE void finish_streams() { _mm_sfence(); }
#else
GPTFAST_INLINE void stream(float* p, Vec v) { store(p, v); }
GPTFAST_INLINE void stream_half(void* p, Half half) { __builtin_memcpy(p, &half, sizeof(half)); }
GPTFAST_INLINE void finish_streams() {}
#endif
GPTFAST_INLINE void stream(bf16* p, Vec v) { stream_half(p, to_bf16(v)); }
GPTFAST_INLINE void stream(fp16* p, Vec v) { stream_half(p, to_fp16(v)); }

// v, rounded: compilers may make one FMA of a product and a sum, and this keeps them from it where the two roundings have to cancel
GPTFAST_INLINE Vec rounded(Vec v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#else
  asm("" : "+x"(v));
#endif
  return v;
}

// All lanes or the first n: with n == kWidth known at compile time this is the plain form
template <typename T>
GPTFAST_INLINE Vec load_lanes(const T* p, int n) { return n == kWidth ? load(p) : load(p, n); }
template <typename T>
GPTFAST_INLINE void store_lanes(T* p, Vec v, int n) { n == kWidth ? store(p, v) : store(p, v, n); }
template <typename T>
GPTFAST_INLINE void stream_lanes(T* p, Vec v, int n) { n == kWidth ? stream(p, v) : store(p, v, n); }

// past_caches: streams, all lanes
template <typename T>
GPTFAST_INLINE void store_or_stream(T* p, Vec v, int lanes, bool past_caches) {
  past_caches ? stream(p, v) : store_lanes(p, v, lanes);
}

// f(column, lanes) over 0..columns in whole registers, then the tail
template <typename F>
GPTFAST_INLINE void for_columns(int64_t columns, F f) {
  int64_t i = 0;
  for (; i + kWidth <= columns; i += kWidth) f(i, kWidth);
  if (i < columns) f(i, static_cast<int>(columns - i));
}

// The same with registers that begin where target + column is aligned to them, as stream() needs it
template <typename T, typename F>
GPTFAST_INLINE void for_aligned_columns(const T* target, int64_t columns, F f) {
  const int64_t past = (reinterpret_cast<uintptr_t>(target) / sizeof(T)) % kWidth;
  const int64_t lead = past == 0 ? 0 : (kWidth - past < columns ? kWidth - past : columns);
  if (lead > 0) f(0, static_cast<int>(lead));
  for_columns(columns - lead, [&](int64_t i, int lanes) { f(lead + i, lanes); });
}

// Sum of f(column, lanes) over 0..columns: four independent chains; in the tail only the first lanes of f count
template <typename F>
GPTFAST_INLINE float sum_columns(int64_t columns, F f) {
  Vec a = set(0), b = set(0), c = set(0), d = set(0);
  int64_t i = 0;
  for (; i + 4 * kWidth <= columns; i += 4 * kWidth) {
    a += f(i, kWidth);
    b += f(i + kWidth, kWidth);
    c += f(i + 2 * kWidth, kWidth);
    d += f(i + 3 * kWidth, kWidth);
  }
  for (; i + kWidth <= columns; i += kWidth) a += f(i, kWidth);
  if (i < columns) b += keep_first(f(i, static_cast<int>(columns - i)), static_cast<int>(columns - i));
  return sum((a + b) + (c + d));
}

// 2 kWidth values in two registers, in any order: bf16 come as the even ones and the odd ones, an operation each
template <typename T>
GPTFAST_INLINE void load_pair(const T* p, Vec& a, Vec& b) {
  a = load(p);
  b = load(p + kWidth);
}
GPTFAST_INLINE void load_pair(const bf16* p, Vec& a, Vec& b) {
  const Bits both = read<Bits>(p);
  a = (Vec)(both << 16);
  b = (Vec)(both & 0xffff0000u);
}

// Sum of f(value) over p[0..columns), where the order of the values does not matter
template <typename T, typename F>
GPTFAST_INLINE float sum_values(const T* p, int64_t columns, F f) {
  Vec a = set(0), b = set(0), c = set(0), d = set(0);
  int64_t i = 0;
  for (; i + 4 * kWidth <= columns; i += 4 * kWidth) {
    Vec first[2], second[2];
    load_pair(p + i, first[0], first[1]);
    load_pair(p + i + 2 * kWidth, second[0], second[1]);
    a += f(first[0]);
    b += f(first[1]);
    c += f(second[0]);
    d += f(second[1]);
  }
  for (; i < columns; i += kWidth) {
    const int lanes = columns - i < kWidth ? static_cast<int>(columns - i) : kWidth;
    a += keep_first(f(load_lanes(p + i, lanes)), lanes);
  }
  return sum((a + b) + (c + d));
}

}  // namespace
}  // namespace gptfast::cpu::GPTFAST_ISA
