// One row on its way through sample_kernel.h: what is known of it, and the pass that reads it.
#pragma once

#include "cpu/select_vec.h"

namespace gptfast::cpu::GPTFAST_ISA {
namespace {

struct Row {
  int64_t vocab, tiles;
  float *x;                            // [V], whole registers: edited logits; the logits themselves where these are not edited
  float *groups;                       // [tiles, kWidth]: the largest x of each lane of a tile
  float *tile_max, *tile_sum;          // [tiles]: of the logits as they came
  float *tile_bad;                     // [tiles]: 1 for a NaN among the logits, 2 for one among the edited, 3 for both
  float *y, *ids, *keys, *values;      // [V] each, whole registers: candidates and their ids (as bits); work space
  float* other;                        // [V], whole registers: an x in place of the first one
  bool raw_nan, failed;
  float raw_max, log_sum;              // of the logits as they came
  float best, temperature;             // the largest x
  int64_t best_id;
  int64_t count;                       // candidates in y and ids, which ascend
  uint64_t seed;
  uint32_t position, choice;
};

Row row_in(const SampleMemory& memory, int64_t vocab) {
  Row row{};
  const int64_t room = sample_row_room(vocab);
  row.vocab = vocab;
  row.tiles = sample_tiles(vocab);
  row.x = memory.x;
  row.groups = memory.tiles;
  row.tile_max = row.groups + row.tiles * kWidth;
  row.tile_sum = row.tile_max + row.tiles;
  row.tile_bad = row.tile_sum + row.tiles;
  row.y = memory.work;
  row.ids = row.y + room;
  row.keys = row.ids + room;
  row.values = row.keys + room;
  row.other = row.values + room;
  return row;
}

GPTFAST_INLINE int64_t tile_end(const Row& row, int64_t tile) {
  const int64_t end = (tile + 1) * kSampleTile;
  return end < row.vocab ? end : row.vocab;
}


template <typename T>
GPTFAST_INLINE Vec load_logits(const T* p, int lanes) {
  if (lanes == kWidth) return load(p);
  return choose(lane_numbers() < lanes, load(p, lanes), set(-kInfinity));
}

GPTFAST_INLINE Ints load_integers(const int32_t* p, int lanes) {
  if (lanes == kWidth) return read<Ints>(p);
  Ints v = {};
  for (int i = 0; i < lanes; ++i) v[i] = p[i];
  return v;
}

GPTFAST_INLINE Ints bit_lanes(const int32_t* words, int64_t i) {
  return ((((Ints{} + words[i >> 5]) >> (lane_numbers() + static_cast<int>(i & 31)))) & 1) != 0;
}

// Exclusions, bias and penalties of the ids from i on, in the order of `penalised`
GPTFAST_INLINE Vec edit(const Sample& args, int64_t row, int64_t i, int lanes, Vec x) {
  const int64_t words = (args.vocab + 31) / 32;
  if (args.mask) x = choose(bit_lanes(args.mask + row * words, i), x, set(-kInfinity));
  if (args.bias) {
    const Vec bias = load_lanes(args.bias + row * args.bias_stride + i, lanes);
    x = choose((bias == set(-kInfinity)) | (x == set(-kInfinity)), set(-kInfinity), x + bias);
  }
  const Ints counts = args.counts ? load_integers(args.counts + row * args.counts_stride + i, lanes) : Ints{};
  if (args.repetition) {
    const Ints in_prompt = args.prompt ? bit_lanes(args.prompt + row * words, i) : Ints{};
    const Vec r = set(args.repetition[row]);
    x = choose(in_prompt | (counts > 0), choose(x > set(0), x / r, x * r), x);
  }
  if (args.counts && args.frequency) x = x - set(args.frequency[row]) * __builtin_convertvector(counts, Vec);
  if (args.counts && args.presence) x = x - choose(counts > 0, set(args.presence[row]), set(0));
  return choose(lane_numbers() < lanes, x, set(-kInfinity));
}

// Sum of exp(logit - shift) over one tile
template <typename T, bool kEdited>
GPTFAST_INLINE float tile_sum(const T* logits, const Row& row, int64_t first, int64_t end, float shift) {
  Vec even = set(0), odd = set(0);
  for (int64_t i = first; i < end; i += 2 * kWidth) {
    const int rest = static_cast<int>(end - i), next = rest - kWidth;
    // row.x has -inf beyond the end
    even += exact_exp((kEdited ? load_logits(logits + i, rest < kWidth ? rest : kWidth) : load(row.x + i)) - set(shift));
    if (next <= 0) break;
    const int64_t j = i + kWidth;
    odd += exact_exp((kEdited ? load_logits(logits + j, next < kWidth ? next : kWidth) : load(row.x + j)) - set(shift));
  }
  return sum(even + odd);
}

// log of the sum of exp over the row, from its tiles; with +inf among the logits, of their number
template <typename T>
float log_sum(const T* logits, const Row& row) {
  if (row.raw_max == -kInfinity) return -kInfinity;
  if (row.raw_max == kInfinity) {
    int64_t count = 0;
    for (int64_t i = 0; i < row.vocab; i += kWidth) {
      const int lanes = row.vocab - i < kWidth ? static_cast<int>(row.vocab - i) : kWidth;
      count += __builtin_popcount(bits_of((Ints)(load_logits(logits + i, lanes) == set(kInfinity))));
    }
    return philox::log(static_cast<float>(count));
  }
  double total = 0;
  for (int64_t tile = 0; tile < row.tiles; ++tile) {
    if (row.tile_max[tile] > -kInfinity) {
      total += static_cast<double>(row.tile_sum[tile]) * static_cast<double>(philox::exp(row.tile_max[tile] - row.raw_max));
    }
  }
  return row.raw_max + philox::log(static_cast<float>(total));
}

// Fills row.x, row.groups and what is kept of a tile. Where x is the logits themselves, they stay as they are.
template <typename T, bool kEdited>
void read_tile(const Sample& args, int64_t index, int64_t tile, const Row& row) {
  const T* logits = static_cast<const T*>(args.logits) + index * args.logits_stride;
  const int64_t first = tile * kSampleTile, end = tile_end(row, tile);
  Ints bad_raw = {}, bad = {};
  Vec most = set(-kInfinity), most_raw = most;
  for (int64_t i = first; i < end; i += kWidth) {
    const int lanes = end - i < kWidth ? static_cast<int>(end - i) : kWidth;
    const Vec raw = load_logits(logits + i, lanes);
    bad_raw |= (Ints)(raw != raw);
    most_raw = maximum(raw, most_raw);
    if (kEdited) {
      const Vec x = edit(args, index, i, lanes, raw);
      bad |= (Ints)(x != x);
      most = maximum(x, most);
      store(row.x + i, x);
    } else {
      store(row.x + i, raw);
    }
  }
  if (!kEdited) most = most_raw;
  store(row.groups + tile * kWidth, most);
  const float raw_here = max(most_raw);
  row.tile_max[tile] = raw_here;
  row.tile_sum[tile] = tile_sum<T, kEdited>(logits, row, first, end, raw_here > -kInfinity ? raw_here : 0.0f);
  row.tile_bad[tile] = static_cast<float>((bits_of(bad_raw) != 0) + 2 * (bits_of(bad) != 0));
}

// What there is to know of a row whose tiles have been read
void combine_tiles(Row& row) {
  row.raw_max = row.best = -kInfinity;
  row.raw_nan = row.failed = false;
  for (int64_t tile = 0; tile < row.tiles; ++tile) {
    const float most = max(load(row.groups + tile * kWidth)), raw = row.tile_max[tile];
    row.best = most > row.best ? most : row.best;
    row.raw_max = raw > row.raw_max ? raw : row.raw_max;
    row.raw_nan |= row.tile_bad[tile] == 1 || row.tile_bad[tile] == 3;
    row.failed |= row.tile_bad[tile] > 0;
  }
}

}  // namespace
}  // namespace gptfast::cpu::GPTFAST_ISA
