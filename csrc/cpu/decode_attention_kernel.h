// Attention over a paged cache, a page of 64 keys at a time: scores, their softmax against the largest so far, their share of the
// output, merged in order of the pages. A query's steps are the same alone and among many, so its bits depend on nothing else.
// One query a row is limited by reading the cache once; more queries share each page while it is in the first-level caches, the values
// in registers by four queries, and are limited by FMAs and by adding up the lanes of the scores.
#pragma once

#include "cpu/isa.h"
#include "cpu/paged.h"
#include "cpu/vec_types.h"

namespace gptfast::cpu {

struct DecodeAttention {
  Type type;           // of q and o
  Type cache_type;     // fp32 or bf16
  int64_t queries;     // Q, new tokens a row, whose keys are in the cache
  const void* q;       // [B, Q, H, D], heads contiguous
  void* o;             // [B, Q, H, D]
  int64_t q_stride, o_stride;  // elements from token to token, all B Q of them in order
  PagedCache cache;    // read
  Integers lengths;    // [B], keys of a row, the new ones among them
  float scale;
};

constexpr int64_t kQueryBlock = 16;  // queries of one row and head that a thread takes at a time

// Floats of scratch memory that decode_attention needs for heads of size D: outputs and probabilities of a block, a page of each kind
inline __attribute__((always_inline)) int64_t decode_attention_room(int64_t size) {
  const int64_t padded = (size + 15) / 16 * 16;
  return kQueryBlock * (2 * padded + kPage) + 2 * kPage * padded + 64;
}

}  // namespace gptfast::cpu

// Item (b H + h) ceil(Q / kQueryBlock) + i is block i of the queries of row b and head h
GPTFAST_PER_ISA(void decode_attention(const DecodeAttention& args, int64_t first_item, int64_t end_item, float* scratch))

#ifdef GPTFAST_ISA

#include "cpu/vec_math.h"

namespace gptfast::cpu::GPTFAST_ISA {
namespace {

constexpr int kVectors = kWidth == 16 ? 4 : 2;  // registers of D that a query's output takes at a time
constexpr int kTogether = 4;                    // queries that share loaded values

template <int kHalf>
GPTFAST_INLINE Vec add_halves(Vec x, Vec y) {
  // lanes in groups of 2 kHalf: the sums of x's halves, then those of y's
#if defined(__AVX512F__)
  if constexpr (kHalf == 8) {
    return __builtin_shufflevector(x, y, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(x, y, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  } else if constexpr (kHalf == 4) {
    return __builtin_shufflevector(x, y, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           __builtin_shufflevector(x, y, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  } else if constexpr (kHalf == 2) {
    return __builtin_shufflevector(x, y, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           __builtin_shufflevector(x, y, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  } else {
    return __builtin_shufflevector(x, y, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           __builtin_shufflevector(x, y, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  }
#elif defined(__AVX2__)
  if constexpr (kHalf == 4) {
    return __builtin_shufflevector(x, y, 0, 1, 2, 3, 8, 9, 10, 11) + __builtin_shufflevector(x, y, 4, 5, 6, 7, 12, 13, 14, 15);
  } else if constexpr (kHalf == 2) {
    return __builtin_shufflevector(x, y, 0, 1, 8, 9, 4, 5, 12, 13) + __builtin_shufflevector(x, y, 2, 3, 10, 11, 6, 7, 14, 15);
  } else {
    return __builtin_shufflevector(x, y, 0, 8, 2, 10, 4, 12, 6, 14) + __builtin_shufflevector(x, y, 1, 9, 3, 11, 5, 13, 7, 15);
  }
#else
  if constexpr (kHalf == 2) {
    return __builtin_shufflevector(x, y, 0, 1, 4, 5) + __builtin_shufflevector(x, y, 2, 3, 6, 7);
  } else {
    return __builtin_shufflevector(x, y, 0, 4, 2, 6) + __builtin_shufflevector(x, y, 1, 5, 3, 7);
  }
#endif
}

// Lane i of the result is the sum of v[i]'s lanes, of its own alone
template <int kHalf = kWidth / 2>
GPTFAST_INLINE Vec sums_of(Vec* v) {
  for (int i = 0; i < kHalf; ++i) v[i] = add_halves<kHalf>(v[i], v[i + kHalf]);
  if constexpr (kHalf == 1) return v[0];
  else return sums_of<kHalf / 2>(v);
}

// Products of one query with kWidth keys, a multiple of kWidth elements each lane's own sum
template <typename K>
GPTFAST_INLINE Vec dot(const float* q, const K* keys, int64_t size) {
  Vec sums[kWidth];
  for (int i = 0; i < kWidth; ++i) sums[i] = set(0);
  for_columns(size, [&](int64_t d, int lanes) {
    const Vec query = load(q + d);  // zeros beyond D
    for (int i = 0; i < kWidth; ++i) sums[i] += query * load_lanes(keys + i * size + d, lanes);
  });
  return sums_of(sums);
}

struct Running {
  float most, sum;  // of a query: its largest score so far, and the sum of exp(score - most)
};

// Scores of one query with the first `count` keys of a page -> their exponentials in p[0..63], 0 beyond count. Returns the factor of
// what was summed before.
template <typename K>
__attribute__((noinline)) float score_page(const float* q, const K* keys, int64_t size, int64_t count, float scale, Running& running,
                                           float* p) {
  Vec scores[kPage / kWidth];
  Vec most = set(running.most), wrong = set(0);
  for (int j = 0; j < kPage / kWidth; ++j) {
    scores[j] = set(-__builtin_inff());
    const int64_t valid = count - j * kWidth;
    if (valid <= 0) continue;
    Ints lane = {};
    for (int i = 0; i < kWidth; ++i) lane[i] = i;
    const Ints seen = lane < static_cast<int>(valid);
    const Vec score = dot(q, keys + j * kWidth * size, size) * set(scale);
    wrong += choose(seen, score - score, set(0));  // NaN for a score that is not finite: it makes the query's sum NaN
    scores[j] = choose(seen, score, scores[j]);
    most = maximum(scores[j], most);
  }
  const float largest = max(most);
  const float factor = exp(set(running.most - largest))[0];
  Vec sums = wrong;
  for (int j = 0; j < kPage / kWidth; ++j) {
    const Vec e = exp(scores[j] - set(largest));
    store(p + j * kWidth, e);
    sums += e;
  }
  running.sum = running.sum * factor + sum(sums);
  running.most = largest;
  return factor;
}

// out[r] = out[r] * factor[r] + sum over the first `count` keys of p[r][n] values[n], for kRows queries
template <typename K, int kRows, int kRegisters>
GPTFAST_INLINE void add_columns(const float* p, const K* values, int64_t size, int64_t count, int64_t d, int lanes,
                                const float* factors, float* out, int64_t out_stride) {
  Vec sums[kRows][kRegisters];
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kRegisters; ++i) sums[r][i] = set(0);
  }
  for (int64_t n = 0; n < count; ++n) {
    Vec value[kRegisters];
    for (int i = 0; i < kRegisters; ++i) value[i] = load_lanes(values + n * size + d + i * kWidth, lanes);
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < kRegisters; ++i) sums[r][i] += set(p[r * kPage + n]) * value[i];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kRegisters; ++i) {
      float* place = out + r * out_stride + d + i * kWidth;
      store(place, load(place) * set(factors[r]) + sums[r][i]);
    }
  }
}

template <typename K, int kRows>
__attribute__((noinline)) void add_page(const float* p, const K* values, int64_t size, int64_t count, const float* factors, float* out,
                                        int64_t out_stride) {
  int64_t d = 0;
  for (; d + kVectors * kWidth <= size; d += kVectors * kWidth) {
    add_columns<K, kRows, kVectors>(p, values, size, count, d, kWidth, factors, out, out_stride);
  }
  for (; d + kWidth <= size; d += kWidth) add_columns<K, kRows, 1>(p, values, size, count, d, kWidth, factors, out, out_stride);
  if (d < size) {
    add_columns<K, kRows, 1>(p, values, size, count, d, static_cast<int>(size - d), factors, out, out_stride);
  }
}

// A block of queries of one row and head: where they stand in scratch memory and what they see
struct Block {
  int64_t count;        // queries
  int64_t first_end;    // keys that the first query sees, each next one sees one more
  int64_t stride;       // D rounded up
  float *q, *o, *p;     // [count, stride], [count, stride], [count, 64]
  Running running[kQueryBlock];
  float factors[kQueryBlock];
};

template <typename K>
void page_step(const DecodeAttention& args, Block& block, const K* keys, const K* values, int64_t first_key) {
  const int64_t size = args.cache.size;
  int64_t partial = 0;  // queries before this one do not see the whole page: they stop at their own last key
  for (int64_t j = 0; j < block.count; ++j) {
    const int64_t seen = block.first_end + j - first_key, count = seen < kPage ? seen : kPage;
    if (count < kPage) partial = j + 1;
    if (count <= 0) continue;
    block.factors[j] = score_page(block.q + j * block.stride, keys, size, count, args.scale, block.running[j], block.p + j * kPage);
    if (count < kPage) {
      add_page<K, 1>(block.p + j * kPage, values, size, count, block.factors + j, block.o + j * block.stride, block.stride);
    }
  }
  int64_t j = partial;
  for (; j + kTogether <= block.count; j += kTogether) {
    add_page<K, kTogether>(block.p + j * kPage, values, size, kPage, block.factors + j, block.o + j * block.stride, block.stride);
  }
  for (; j < block.count; ++j) {
    add_page<K, 1>(block.p + j * kPage, values, size, kPage, block.factors + j, block.o + j * block.stride, block.stride);
  }
}

template <typename K>
GPTFAST_INLINE void prefetch(const K* page, int64_t size) {
  const char* bytes = reinterpret_cast<const char*>(page);
  for (int64_t i = 0; i < kPage * size * static_cast<int64_t>(sizeof(K)); i += 64) __builtin_prefetch(bytes + i, 0, 2);
}

template <typename K>
void attend(const DecodeAttention& args, int64_t row, int64_t head, Block& block, float* pages) {
  const int64_t size = args.cache.size, place = head * kPage * size, last = block.first_end + block.count - 1;
  for (int64_t first_key = 0; first_key < last; first_key += kPage) {
    const int64_t page = args.cache.page(row, first_key);
    const K* keys = static_cast<const K*>(args.cache.keys) + page * args.cache.key_stride + place;
    const K* values = static_cast<const K*>(args.cache.values) + page * args.cache.value_stride + place;
    if (block.count < kTogether && first_key + kPage < last) {  // reading limits few queries: ask for the next page while this one is used
      const int64_t next = args.cache.page(row, first_key + kPage);
      prefetch(static_cast<const K*>(args.cache.keys) + next * args.cache.key_stride + place, size);
      prefetch(static_cast<const K*>(args.cache.values) + next * args.cache.value_stride + place, size);
    }
    if (sizeof(K) == sizeof(float) || block.count < kTogether) {
      page_step(args, block, keys, values, first_key);
      continue;
    }
    float *wide_keys = pages, *wide_values = pages + kPage * size;  // widened once for all queries
    for_columns(kPage * size, [&](int64_t i, int lanes) {
      store_lanes(wide_keys + i, load_lanes(keys + i, lanes), lanes);
      store_lanes(wide_values + i, load_lanes(values + i, lanes), lanes);
    });
    page_step(args, block, wide_keys, wide_values, first_key);
  }
}

template <typename Q>
void run_item(const DecodeAttention& args, int64_t item, float* scratch) {
  const int64_t blocks = (args.queries + kQueryBlock - 1) / kQueryBlock, size = args.cache.size;
  const int64_t pair = item / blocks, row = pair / args.cache.heads, head = pair % args.cache.heads;
  const int64_t first = item % blocks * kQueryBlock, rest = args.queries - first;
  Block block;
  block.count = rest < kQueryBlock ? rest : kQueryBlock;
  block.first_end = args.lengths[row] - args.queries + first + 1;
  block.stride = (size + 15) / 16 * 16;
  block.q = scratch;
  block.o = block.q + kQueryBlock * block.stride;
  block.p = block.o + kQueryBlock * block.stride;
  const int64_t token = row * args.queries + first;
  for (int64_t j = 0; j < block.count; ++j) {
    const Q* q = static_cast<const Q*>(args.q) + (token + j) * args.q_stride + head * size;
    float *wide = block.q + j * block.stride, *out = block.o + j * block.stride;
    for (int64_t i = 0; i < block.stride; i += kWidth) {
      const int64_t lanes = size - i;
      store(wide + i, lanes >= kWidth ? load(q + i) : lanes > 0 ? load(q + i, static_cast<int>(lanes)) : set(0));
      store(out + i, set(0));
    }
    block.running[j] = {-__builtin_inff(), 0};
  }
  float* pages = block.p + kQueryBlock * kPage;
  args.cache_type == Type::bf16 ? attend<bf16>(args, row, head, block, pages) : attend<float>(args, row, head, block, pages);
  for (int64_t j = 0; j < block.count; ++j) {
    Q* o = static_cast<Q*>(args.o) + (token + j) * args.o_stride + head * size;
    const Vec share = set(block.first_end + j > 0 ? 1.0f / block.running[j].sum : 0.0f);
    const float* out = block.o + j * block.stride;
    for_columns(size, [&](int64_t i, int lanes) { store_lanes(o + i, load(out + i) * share, lanes); });
  }
}

}  // namespace

void decode_attention(const DecodeAttention& args, int64_t first_item, int64_t end_item, float* scratch) {
  for (int64_t item = first_item; item < end_item; ++item) {
    switch (args.type) {
      case Type::fp32: run_item<float>(args, item, scratch); break;
      case Type::bf16: run_item<bf16>(args, item, scratch); break;
      case Type::fp16: run_item<fp16>(args, item, scratch); break;
    }
  }
}

}  // namespace gptfast::cpu::GPTFAST_ISA

#endif
