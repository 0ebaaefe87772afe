// What attention's two directions share: the arguments, blocks of 64 tokens of one head copied into words for vec_product.h, which
// query sees which key, the noise of dropout, and tokens that are not finite.
// The copies cost T D of the T^2 D operations. In them an invisible key may meet a weight of 0, so they hold finite numbers only: a token
// with NaN or inf is copied as zeros and remembered, and the rows that see it are written as NaN at the end.
#pragma once

#include "cpu/isa.h"
#include "cpu/vec_types.h"

namespace gptfast::cpu {

// One of q, k, v: element (b, t, h, d) is data[b * batch + t * token + h * head + d]
struct Heads {
  const void* data;
  int64_t batch, token, head;
};

struct Attention {
  Type type;                            // of q, k, v, o, gradients
  int64_t batches, length, heads, size;  // B, T, H, D
  float scale;
  float keep;            // 1 / (1 - dropout_p); 0 where everything is dropped
  uint32_t drop_below;   // words below it drop; 0 without dropout
  uint64_t seed;
  const int32_t* labels;  // [B, T] or null: equal for the tokens of a document, -1 for padding
  Heads q, k, v;
  void* o;               // [B, T, H, D]
  float* lse;            // [B, H, T]
  const void* upstream;  // [B, T, H, D], the gradient of o
  void* dqkv;            // [B, T, 3, H, D]
};

}  // namespace gptfast::cpu

#ifdef GPTFAST_ISA

#include "cpu/philox_vec.h"
#include "cpu/vec_math.h"
#include "cpu/vec_product.h"

namespace gptfast::cpu::GPTFAST_ISA {
namespace {

constexpr int64_t kBlock = 64;  // queries or keys
constexpr float kLn2 = 0x1.62e43p-1f, kLog2E = 0x1.715476p+0f;

GPTFAST_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
GPTFAST_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Hands out parts of a thread's scratch memory; with no memory it only counts
struct Scratch {
  float* memory;
  int64_t used = 0;

  float* take(int64_t floats) {
    float* part = memory == nullptr ? nullptr : memory + used;
    used += round_up(floats, 16);
    return part;
  }
};

// Sizes of the copies of a head
template <typename Product>
struct Shape {
  int64_t blocks;     // of kBlock tokens
  int64_t steps;      // words of a token's D numbers
  int64_t row;        // words from token to token
  int64_t row_numbers;
  int64_t width;      // D in whole registers

  explicit Shape(const Attention& args)
      : blocks((args.length + kBlock - 1) / kBlock),
        steps(args.size / Product::kPack),
        row(round_up(steps, kWidth)),
        row_numbers(row * Product::kPack),
        width(round_up(args.size, kWidth)) {}
};

// 2^x for x < 127 to 1 ulp: 0 below -126 (no denormals), NaN for NaN
GPTFAST_INLINE Vec exp2(Vec x) {
  const Vec round = set(12582912.0f);
  const Vec shifted = x + round;
  const Vec r = x - (shifted - round);
  Vec p = r * set(0x1.41fbbcp-13f) + set(0x1.5f3e54p-10f);
  p = p * r + set(0x1.3b2d4cp-7f);
  p = p * r + set(0x1.c6aee8p-5f);
  p = p * r + set(0x1.ebfbdcp-3f);
  p = p * r + set(0x1.62e430p-1f);
  p = p * r + set(1.0f);
  const Vec y = (Vec)((Bits)p + ((Bits)shifted << 23));  // the low bits of `shifted` are the whole part
  return choose(x < set(-126.0f), set(0.0f), y);
}

GPTFAST_INLINE Ints lanes() {
  Ints result;
  for (int i = 0; i < kWidth; ++i) result[i] = i;
  return result;
}

// Whether x - x is 0 for all of them; what fills the last register counts
template <typename Number>
GPTFAST_INLINE bool is_finite(const Number* row, int64_t count) {
  Vec check = set(0);
  for (int64_t i = 0; i < count; i += kWidth) check += load(row + i) - load(row + i);
  return sum(check) == 0;
}

template <typename Number>
GPTFAST_INLINE void clear(Number* row, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) store(row + i, set(0));
}

// A token of a head is a few lines in a row of thousands of bytes: the caches do not foresee the next one
GPTFAST_INLINE void prefetch(const void* data, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(data) + i);
}

constexpr int64_t kAhead = 12;  // tokens

// Copies `count` tokens, `stride` apart, into a block of rows, D numbers and zeros up to whole registers; all zeros for padding, for
// what follows `count`, and for tokens that are not finite, which are marked in bad[t]. Returns whether there are any.
template <typename Product, typename T>
bool pack_rows(const Shape<Product>& shape, const T* source, int64_t stride, int64_t count, int64_t size, const int32_t* labels,
               typename Product::Storage* rows, uint8_t* bad) {
  const int64_t width = shape.row_numbers;
  Bits check = {};  // x - x is 0, or NaN for NaN and inf
  for (int64_t t = 0; t < kBlock; ++t) {
    auto* row = rows + t * width;
    if (t + kAhead < count) prefetch(source + (t + kAhead) * stride, size * sizeof(T));
    if (t >= count || (labels != nullptr && labels[t] < 0)) {
      clear(row, width);
      continue;
    }
    const T* token = source + t * stride;
    for_columns(size, [&](int64_t i, int n) {
      const Vec x = load_lanes(token + i, n);
      check |= (Bits)(x - x);
      store(row + i, x);
    });
  }
  if (sum((Vec)check) == 0) return false;
  for (int64_t t = 0; t < count; ++t) {
    if (is_finite(rows + t * width, size)) continue;
    bad[t] = 1;
    clear(rows + t * width, width);
  }
  return true;
}

// rows of a block [64 tokens, row words] -> columns [row words, 64 tokens]: the right operand of a sum over D
template <typename Product>
void pack_columns(const Shape<Product>& shape, const void* rows, float* columns) {
  const float* words = static_cast<const float*>(rows);
  for (int64_t t = 0; t < kBlock; t += kWidth) {
    for (int64_t s = 0; s < shape.row; s += kWidth) {
      Vec square[kWidth];
      for (int i = 0; i < kWidth; ++i) square[i] = load(words + (t + i) * shape.row + s);
      transpose(square);
      for (int i = 0; i < kWidth; ++i) store(columns + (s + i) * kBlock + t, square[i]);
    }
  }
}

// Two rows of numbers as words of a product that sums over rows
GPTFAST_INLINE Vec join(Half low, Half high) {
  return (Vec)(__builtin_convertvector(low, Bits) | (__builtin_convertvector(high, Bits) << 16));
}

// rows of a block -> the right operand of a sum over tokens, [64 / kPack steps, width]. Words of one float are the rows themselves.
template <typename Product>
void pack_panel(const Shape<Product>& shape, const typename Product::Storage* rows, float* panel) {
  static_assert(Product::kPack == 2);
  for (int64_t t = 0; t < kBlock; t += 2) {
    const auto *low = rows + t * shape.row_numbers, *high = low + shape.row_numbers;
    for (int64_t i = 0; i < shape.width; i += kWidth) {
      store(panel + t / 2 * shape.width + i, join(read<Half>(low + i), read<Half>(high + i)));
    }
  }
}

// Words of the panel of one block
template <typename Product>
GPTFAST_INLINE int64_t panel_words(const Shape<Product>& shape) { return kBlock / Product::kPack * shape.width; }

template <typename T>
GPTFAST_INLINE const T* head_of(const Heads& tensor, int64_t b, int64_t h, int64_t t) {
  return static_cast<const T*>(tensor.data) + b * tensor.batch + h * tensor.head + t * tensor.token;
}

// ---------------------------------------------------------------------------------------------------------------- who sees whom

// How a block of queries sees a block of keys that does not lie after it, documents aside from the diagonal
enum class Sight { none, all, some };

// Smallest and largest label of each block
void label_ranges(const int32_t* labels, int64_t length, int32_t* ranges) {
  for (int64_t t = 0; t < length; t += kBlock) {
    int32_t low = labels[t], high = labels[t];
    for (int64_t i = t; i < least(t + kBlock, length); ++i) {
      low = labels[i] < low ? labels[i] : low;
      high = labels[i] > high ? labels[i] : high;
    }
    ranges[t / kBlock * 2] = low;
    ranges[t / kBlock * 2 + 1] = high;
  }
}

// The labels of batch row b, and their ranges; -1 beyond the end
void copy_labels(const Attention& args, int64_t b, int32_t* labels, int32_t* ranges) {
  if (args.labels == nullptr) return;
  const int32_t* source = args.labels + b * args.length;
  for (int64_t t = 0; t < round_up(args.length, kBlock); ++t) labels[t] = t < args.length ? source[t] : -1;
  label_ranges(labels, args.length, ranges);
}

GPTFAST_INLINE Sight sight(const int32_t* ranges, int64_t queries, int64_t keys) {
  if (ranges == nullptr) return Sight::all;
  const int32_t *a = ranges + 2 * queries, *b = ranges + 2 * keys;
  if (a[1] < 0 || b[1] < a[0] || a[1] < b[0]) return Sight::none;
  return a[0] == a[1] && b[0] == b[1] ? Sight::all : Sight::some;
}

// The block of keys as a row of queries sees it
struct Mask {
  bool diagonal;              // keys after the query are in this block
  const int32_t* key_labels;  // of the block's keys [64], or null: all are of the queries' document
  const int32_t* labels;      // of the block's queries

  // Keys that are computed for query i: up to the last query of its tile, in whole registers
  int64_t width(int64_t i) const { return diagonal ? round_up(round_up(i + 1, kRows), kWidth) : kBlock; }
};

// -1 in the lanes of keys first, first + 1, ... that query i of the block sees
template <bool kDocuments>
GPTFAST_INLINE Ints visible(const Mask& mask, int64_t i, int64_t first) {
  const Ints before = lanes() <= static_cast<int32_t>((mask.diagonal ? i : kBlock) - first);
  return kDocuments ? before & (read<Ints>(mask.key_labels + first) == mask.labels[i]) : before;
}

// Words of noise for the 64 keys of a block
GPTFAST_INLINE void noise_row(const Attention& args, int64_t choice, int64_t query, int64_t first_key, uint32_t* words) {
  for (int64_t i = 0; i < kBlock; i += kNoiseWords) {
    noise_words(args.seed, static_cast<uint32_t>(first_key + i), static_cast<uint32_t>(query), static_cast<uint32_t>(choice),
                philox::kDropout, words + i);
  }
}

GPTFAST_INLINE Ints kept(const Attention& args, const uint32_t* words) { return (Ints)(read<Bits>(words) >= args.drop_below); }

// rows[i] = 1 for the queries that see a bad token (forward), or rows[j] = 1 for the keys that a bad query sees
void spread(const int32_t* labels, int64_t length, const uint8_t* bad, bool forward, uint8_t* rows) {
  for (int64_t t = 0; t < length; ++t) {
    if (!bad[t]) continue;
    const int64_t first = forward ? t : 0, end = forward ? length : t + 1;
    for (int64_t i = first; i < end; ++i) rows[i] |= labels == nullptr || labels[i] == labels[t];
  }
}

}  // namespace
}  // namespace gptfast::cpu::GPTFAST_ISA

#endif
