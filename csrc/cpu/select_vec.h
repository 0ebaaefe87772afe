// Choosing without sorting: copies of the lanes that a mask names, and the boundary above which the keys of an array weigh enough.
#pragma once

#include "cpu/exact_vec.h"

namespace gptfast::cpu::GPTFAST_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();

// one bit a lane
GPTFAST_INLINE uint32_t bits_of(Ints mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kWidth; ++i) bits |= (uint32_t)(mask[i] & 1) << i;
  return bits;
#endif
}

// Stores the lanes named by `bits` side by side; writes a whole register, so that out needs kWidth places. Returns their number.
GPTFAST_INLINE int pack(void* out, Vec v, uint32_t bits) {
#if defined(__AVX512F__)
  const Vec packed = (Vec)_mm512_maskz_compress_ps(static_cast<__mmask16>(bits), (__m512)v);
  __builtin_memcpy(out, &packed, sizeof(packed));
#else
  float kept[kWidth] = {};
  int count = 0;
  for (uint32_t rest = bits; rest; rest &= rest - 1) kept[count++] = v[__builtin_ctz(rest)];
  __builtin_memcpy(out, kept, sizeof(kept));
#endif
  return __builtin_popcount(bits);
}

GPTFAST_INLINE float minimum(Vec v) { return -max(-v); }

// What `count` keys (and one register beyond, which is written) weigh from `pivot` up, and the keys beside it
struct Tally {
  int64_t weight = 0;
  float least_above = kInfinity, most_below = -kInfinity;
};

template <bool kWeighted>
GPTFAST_INLINE Tally tally(const float* keys, const float* values, int64_t count, float pivot) {
  Vec above = set(kInfinity), below = set(-kInfinity);
  Mass mass;
  Tally result;
  for (int64_t i = 0; i < count; i += kWidth) {
    const Vec key = load(keys + i);
    const Ints reached = key >= set(pivot);
    above = choose(reached & (Ints)(key < above), key, above);
    below = choose(~reached & (Ints)(key > below), key, below);
    if (kWeighted) {
      mass.add((Vec)((Ints)load(values + i) & reached));
    } else {
      result.weight += __builtin_popcount(bits_of(reached));
    }
  }
  if (kWeighted) {
    mass.flush();
    result.weight = mass.total;
  }
  result.least_above = minimum(above);
  result.most_below = max(below);
  return result;
}

// The largest b among `count` >= 1 finite keys with weight{key >= b} >= need, where need is at most the weight of all of them. Each
// weighs floor(value 2^40), or 1 without values. Halves the interval of keys and keeps the half that holds b; both arrays are used up
// and have kWidth places beyond count.
template <bool kWeighted>
__attribute__((noinline)) float boundary(float* keys, float* values, int64_t count, int64_t need) {
  store(keys + count, set(-kInfinity));
  float low = tally<false>(keys, values, count, -0x1.fffffep127f).least_above;
  float high = tally<false>(keys, values, count, kInfinity).most_below;
  while (low < high) {
    store(keys + count, set(-kInfinity));  // what the last register has too much is below every pivot
    float pivot = 0.5f * low + 0.5f * high;
    if (!(pivot > low)) pivot = high;
    const Tally found = tally<kWeighted>(keys, values, count, pivot);
    const bool up = found.weight >= need;
    if (!up) need -= found.weight;
    (up ? low : high) = up ? found.least_above : found.most_below;
    int64_t kept = 0;
    for (int64_t i = 0; i < count; i += kWidth) {
      const Vec key = load(keys + i), value = kWeighted ? load(values + i) : set(0);
      const Ints reached = key >= set(pivot);
      const uint32_t bits = bits_of(up ? reached : (Ints)(key > set(-kInfinity)) & ~reached);
      if (kWeighted) pack(values + kept, value, bits);
      kept += pack(keys + kept, key, bits);
    }
    count = kept;
  }
  return low;
}

}  // namespace
}  // namespace gptfast::cpu::GPTFAST_ISA
