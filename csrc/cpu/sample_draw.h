// The draw of sample_kernel.h, argmax of y + g with the lowest id of equal sums, and the log-probabilities.
#pragma once

#include "cpu/sample_filters.h"

namespace gptfast::cpu::GPTFAST_ISA {
namespace {

struct Winner {
  float score = -kInfinity;
  int64_t id = 0;

  inline __attribute__((always_inline)) void offer(float other, int64_t other_id) {
    const bool better = other > score || (other == score && other_id < id);
    score = better ? other : score;
    id = better ? other_id : id;
  }
};

// Words from this one on have g <= margin - 0.001, so that no rounding can make them win: g > s means E < exp(-s), and r < 2^32 E
uint64_t word_limit(float margin) {
  const float s = margin - 1e-3f;
  return s <= 0 ? uint64_t{1} << 32 : static_cast<uint64_t>(philox::exp(-s) * 0x1p32f) + 2;
}

constexpr int kChains = 4;

// The ids whose words are below `limit`, among the 4 kChains kPairs from `first` on: their scores are offered
GPTFAST_INLINE void offer_small_words(const Row& row, int64_t first, int64_t end, uint64_t limit, Winner& winner) {
  Pairs index[kChains], words[kChains][4];
  for (int j = 0; j < kChains; ++j) index[j] = pair_numbers() + static_cast<uint64_t>((first >> 2) + j * kPairs);
  philox_words<kChains>(row.seed, row.position, row.choice, index, words);
  Pairs small = {};
  for (int j = 0; j < kChains; ++j) {
    for (int w = 0; w < 4; ++w) small |= (Pairs)((words[j][w] & 0xFFFFFFFFu) < limit);
  }
  if (!bits_of((Ints)small)) return;
  for (int64_t id = first; id < end && id < first + 4 * kChains * kPairs; ++id) {
    const int64_t block = (id - first) >> 2;
    const uint32_t r = static_cast<uint32_t>(words[block / kPairs][id & 3][block % kPairs]);
    if (r < limit) winner.offer(scaled(row, row.x[id]) + philox::gumbel(r), id);
  }
}

// Among all ids of these tiles with x > -inf, and the largest x: words for all, the logarithms only of words that can win against the
// best of before
Winner draw_tiles(const Row& row, int64_t first_tile, int64_t end_tile) {
  Winner winner;
  winner.offer(philox::gumbel(row.seed, static_cast<uint32_t>(row.best_id), row.position, row.choice), row.best_id);
  for (int64_t tile = first_tile; tile < end_tile; ++tile) {
    const float most = scaled(row, max(load(row.groups + tile * kWidth)));
    float before = -kInfinity;
    uint64_t limit = 0;
    for (int64_t first = tile * kSampleTile; first < tile_end(row, tile); first += 4 * kChains * kPairs) {
      if (winner.score - most > 22.95f) break;  // no g is above 22.88
      if (winner.score > before) limit = word_limit(winner.score - most);
      before = winner.score;
      offer_small_words(row, first, tile_end(row, tile), limit, winner);
    }
  }
  return winner;
}

// Among the candidates
int64_t draw_candidate(Row& row) {
  if (row.count * 3 > row.vocab) {  // words of all ids cost less than a block of four for each
    float* x = row.other;           // only the candidates have one
    int64_t next = 0;
    for (int64_t j = 0; j < row.count; ++j) {
      int32_t id;
      __builtin_memcpy(&id, row.ids + j, sizeof(id));
      for (; next < id; ++next) x[next] = -kInfinity;
      x[next++] = row.x[id];
    }
    for (; next < row.vocab; ++next) x[next] = -kInfinity;
    Row few = row;
    few.x = x;
    return draw_tiles(few, 0, row.tiles).id;
  }
  Vec best = set(-kInfinity);
  Ints best_ids = {};
  for (int64_t i = 0; i < row.count; i += kWidth) {
    const Ints ids = (Ints)load(row.ids + i);
    const Vec score = load(row.y + i) + exact_gumbel(row.seed, (Bits)ids, row.position, row.choice);
    const Ints better = score > best;  // ids ascend: of equal scores the first stays
    best = choose(better, score, best);
    best_ids = better ? ids : best_ids;
  }
  Winner winner;
  for (int lane = 0; lane < kWidth; ++lane) winner.offer(best[lane], best_ids[lane]);
  return winner.id;
}

// -------------------------------------------------------------------------------------------------------------- log-probabilities

// One log-probability from a logit: among logits of +inf these share all
GPTFAST_INLINE Vec log_probability(const Row& row, Vec x) {
  if (row.raw_max == kInfinity) x = choose(x == set(kInfinity), set(0), set(-kInfinity));
  return row.raw_max == -kInfinity ? set(-kInfinity) : x - set(row.log_sum);
}

void sift(uint64_t* heap, int64_t root, int64_t count) {
  for (int64_t child; (child = 2 * root + 1) < count; root = child) {
    if (child + 1 < count && heap[child + 1] < heap[child]) ++child;
    if (heap[root] <= heap[child]) return;
    const uint64_t other = heap[root];
    heap[root] = heap[child];
    heap[child] = other;
  }
}

// Largest first
void sort(uint64_t* values, int64_t count) {
  for (int64_t root = count / 2 - 1; root >= 0; --root) sift(values, root, count);
  for (int64_t end = count - 1; end > 0; --end) {
    const uint64_t least = values[0];
    values[0] = values[end];
    values[end] = least;
    sift(values, 0, end);
  }
}

// Orders by log-probability, of equal ones the lower id first
GPTFAST_INLINE uint64_t order_of(float logprob, uint32_t id) {
  const uint32_t bits = static_cast<uint32_t>(philox::bits(logprob + 0.0f));  // + 0: one zero, not two
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(ordered) << 32 | (0xFFFFFFFFu - id);
}

// The ids of the top_n largest; row.x holds the log-probabilities, row.groups their largest a lane
void write_top(const Sample& args, int64_t* ids, Row& row) {
  row.best = 0;
  row.temperature = 1;
  const int64_t wanted = args.top_n;
  const float bound = bound_of_groups(row, wanted);
  collect(row, bound > -kInfinity ? cutoff(row, bound) : bound);
  int64_t written = 0;
  if (row.count > 0) {
    copy(row.keys, row.y, row.count);
    const float b = boundary<false>(row.keys, row.keys, row.count, wanted < row.count ? wanted : row.count);
    uint64_t* above = reinterpret_cast<uint64_t*>(row.keys);
    int64_t count = 0;
    for (int64_t i = 0; i < row.count; ++i) {
      if (row.y[i] > b) above[count++] = order_of(row.y[i], static_cast<uint32_t>(philox::bits(row.ids[i])));
    }
    sort(above, count);
    for (; written < count; ++written) ids[written] = 0xFFFFFFFFu - static_cast<uint32_t>(above[written]);
    for (int64_t i = 0; i < row.count && written < wanted; ++i) {
      if (row.y[i] == b) ids[written++] = philox::bits(row.ids[i]);
    }
  }
  for (int64_t id = 0; written < wanted; ++id) {
    if (!(row.x[id] > -kInfinity)) ids[written++] = id;
  }
}

template <typename T>
void write_logprobs(const Sample& args, int64_t index, int64_t token, Row& row) {
  const T* logits = static_cast<const T*>(args.logits) + index * args.logits_stride;
  row.log_sum = log_sum(logits, row);
  args.logprob[index] = token < 0 ? 0.0f : log_probability(row, load_logits(logits + token, 1))[0];
  if (args.top_n == 0) return;
  row.x = row.other;
  for (int64_t tile = 0; tile < row.tiles; ++tile) {
    Vec most = set(-kInfinity);
    for (int64_t i = tile * kSampleTile; i < tile_end(row, tile); i += kWidth) {
      const int lanes = tile_end(row, tile) - i < kWidth ? static_cast<int>(tile_end(row, tile) - i) : kWidth;
      const Vec logprob = row.raw_nan ? set(-kInfinity) : log_probability(row, load_logits(logits + i, lanes));
      most = maximum(logprob, most);
      store(row.x + i, logprob);
    }
    store(row.groups + tile * kWidth, most);
  }
  int64_t* ids = args.top_ids + index * args.top_n;
  write_top(args, ids, row);
  for (int64_t i = 0; i < args.top_n; ++i) {
    args.top_logprobs[index * args.top_n + i] = row.raw_nan ? __builtin_nanf("") : row.x[ids[i]];
  }
}

}  // namespace
}  // namespace gptfast::cpu::GPTFAST_ISA
