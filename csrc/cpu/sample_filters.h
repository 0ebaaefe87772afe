// The filters of sample_kernel.h: which ids stay, as candidates in row.y and row.ids. A filter keeps all y from a boundary up, and
// y = (x - max) / temperature never falls where x grows, so a boundary of y is first turned into one of x, below which a tile is not
// looked at.
#pragma once

#include "cpu/sample_row.h"

namespace gptfast::cpu::GPTFAST_ISA {
namespace {

GPTFAST_INLINE float scaled(const Row& row, float x) { return (x - row.best) / row.temperature; }

// An x whose y is below `boundary`: all x up to it can be left out
float cutoff(const Row& row, float boundary) {
  float x = row.best + boundary * row.temperature;
  const float size = x < 0 ? -x : x, other = row.best < 0 ? -row.best : row.best;
  float step = (size > other ? size : other) * 0x1p-22f + 0x1p-120f;
  while (!(scaled(row, x) < boundary) && x > -kInfinity) {
    x -= step;
    step *= 2;
  }
  return x;
}

// Keeps the candidates whose y fulfils `wanted`
template <typename F>
GPTFAST_INLINE void keep(Row& row, F wanted) {
  int64_t kept = 0;
  for (int64_t i = 0; i < row.count; i += kWidth) {
    const Vec y = load(row.y + i), ids = load(row.ids + i);
    const uint32_t bits = bits_of((Ints)(y > set(-kInfinity)) & wanted(y));
    pack(row.y + kept, y, bits);
    kept += pack(row.ids + kept, ids, bits);
  }
  row.count = kept;
  store(row.y + kept, set(-kInfinity));
}

// The ids with x > bound become candidates, those apart whose y is -inf
void collect(Row& row, float bound) {
  int64_t count = 0;
  for (int64_t tile = 0; tile < row.tiles; ++tile) {
    if (!bits_of((Ints)(load(row.groups + tile * kWidth) > set(bound)))) continue;
    for (int64_t i = tile * kSampleTile; i < tile_end(row, tile); i += kWidth) {
      const Vec x = load(row.x + i);
      const uint32_t bits = bits_of((Ints)(x > set(bound)));
      if (!bits) continue;
      pack(row.y + count, x, bits);
      count += pack(row.ids + count, (Vec)(lane_numbers() + static_cast<int>(i)), bits);
    }
  }
  store(row.y + count, set(-kInfinity));
  for (int64_t i = 0; i < count; i += kWidth) store(row.y + i, (load(row.y + i) - set(row.best)) / set(row.temperature));
  row.count = count;
  keep(row, [](Vec) { return Ints{} - 1; });
}

// A lower bound of the k-th largest of `most` values a group: the k-th largest of the groups' maxima; -inf where that says nothing
float bound_of_groups(Row& row, int64_t k) {
  int64_t count = 0;
  for (int64_t i = 0; i < row.tiles * kWidth; i += kWidth) {
    const Vec most = load(row.groups + i);
    count += pack(row.keys + count, most, bits_of((Ints)(most > set(-kInfinity))));
  }
  return k <= count ? boundary<false>(row.keys, row.keys, count, k) : -kInfinity;
}

void copy(float* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) store(to + i, load(from + i));
}

void keep_top_k(Row& row, int64_t k) {
  if (k >= row.count) return;
  copy(row.keys, row.y, row.count);
  const float b = boundary<false>(row.keys, row.keys, row.count, k);
  keep(row, [&](Vec y) { return (Ints)(y >= set(b)); });
}

// share of the mass, rounded up
int64_t needed(float share, int64_t total) {
  const double wanted = static_cast<double>(share) * static_cast<double>(total);
  const int64_t whole = static_cast<int64_t>(wanted), up = whole + (static_cast<double>(whole) < wanted);
  return up < 1 ? 1 : up;
}

void keep_top_p(Row& row, float p) {
  Mass mass;
  for (int64_t i = 0; i < row.count; i += kWidth) {
    const Vec y = load(row.y + i), e = exact_exp(y);  // beyond the last candidate y is -inf, which has no mass
    store(row.keys + i, y);
    store(row.values + i, e);
    mass.add(e);
  }
  mass.flush();
  const float b = boundary<true>(row.keys, row.values, row.count, needed(p, mass.total));
  keep(row, [&](Vec y) { return (Ints)(y >= set(b)); });
}

void keep_typical(Row& row, float p) {
  Mass mass, weighted;
  for (int64_t i = 0; i < row.count; i += kWidth) {
    const Vec y = load(row.y + i), e = exact_exp(y);
    store(row.values + i, e);
    mass.add(e);
    weighted.add(e * -choose(y > set(-64.0f), y, set(-64.0f)));
  }
  mass.flush();
  weighted.flush();
  const Vec entropy = set(static_cast<float>(weighted.total) / static_cast<float>(mass.total));
  const auto key = [&](Vec y) { return (Vec)((Bits)(y + entropy) | 0x80000000u); };
  for (int64_t i = 0; i < row.count; i += kWidth) store(row.keys + i, key(load(row.y + i)));
  const float b = boundary<true>(row.keys, row.values, row.count, needed(p, mass.total));
  keep(row, [&](Vec y) { return (Ints)(key(y) >= set(b)); });
}

// Leaves the candidates that pass; at least one filter is on
void apply_filters(const Sample& args, int64_t index, Row& row) {
  const int64_t k = args.top_k ? args.top_k[index] : 0;
  const float top_p = args.top_p ? args.top_p[index] : 1, typical_p = args.typical_p ? args.typical_p[index] : 1;
  const float min_p = args.min_p ? args.min_p[index] : 0;
  const bool use_k = k > 0 && k < row.vocab;
  const float clamped = min_p < 0x1p-126f ? 0x1p-126f : min_p > 1 ? 1.0f : min_p;
  const float least = min_p > 0 ? philox::log(clamped) : -kInfinity;
  if (use_k) {
    const float x = bound_of_groups(row, k);
    collect(row, x > -kInfinity ? cutoff(row, scaled(row, x)) : x);
    keep_top_k(row, k);
  } else {
    const float bound = top_p < 1 ? -28.0f : least;  // exp(-28) 2^40 < 1 has no mass
    collect(row, bound > -kInfinity ? cutoff(row, bound) : bound);
  }
  if (top_p < 1) keep_top_p(row, top_p);
  if (min_p > 0) keep(row, [&](Vec y) { return (Ints)(y >= set(least)); });
  if (typical_p < 1) keep_typical(row, typical_p);
}

}  // namespace
}  // namespace gptfast::cpu::GPTFAST_ISA
