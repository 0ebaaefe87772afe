// Products of small matrices that lie in the first-level caches as 32-bit words: c += a b, a tile of 4 rows x up to 4 registers at a
// time, so that every word loaded is used 4 times and what limits it is the rate of multiply-adds. A word is one float, or two
// bf16 neighbours along the summed dimension, which AVX-512 multiplies in one instruction.
#pragma once

#include "cpu/vec.h"

namespace gptfast::cpu::GPTFAST_ISA {
namespace {

constexpr int kRows = 4;  // of a tile
#if defined(__AVX512F__)
constexpr int kColumns = 4;  // registers of a tile at most: 4 x 4 sums and 5 operands in 32 registers
#elif defined(__AVX2__)
constexpr int kColumns = 3;  // 12 + 4 of 16
#else
constexpr int kColumns = 2;  // 8 + 3, and one for the products
#endif

// Words of one float
struct Single {
  static constexpr int kPack = 1;  // numbers in a word
  using Storage = float;
  GPTFAST_INLINE Vec multiply_add(Vec sum, Vec a, Vec b) { return a * b + sum; }
};

#if defined(__AVX512BF16__)
// Words of two bf16; sums are fp32, and a number below 2^-126 counts as 0
struct Pair {
  static constexpr int kPack = 2;
  using Storage = bf16;
  GPTFAST_INLINE Vec multiply_add(Vec sum, Vec a, Vec b) { return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
};
using Bf16Product = Pair;
#else
using Bf16Product = Single;
#endif

// The left operand: the word of row r and step s is data[r * row + s * step]
struct Left {
  const float* data;
  int64_t row, step;
};

// The right operand: step s is the registers from data + s * step on
struct Right {
  const float* data;
  int64_t step;
};

// c[4, kCount registers] = or += the sum over first <= s < end of a[., s] b[s, .]
template <typename Product, int kCount, bool kAdd>
GPTFAST_INLINE void tile(Left a, Right b, int64_t first, int64_t end, float* c, int64_t c_row) {
  Vec sums[kRows][kCount];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int x = 0; x < kCount; ++x) sums[r][x] = set(0);
  }
  for (int64_t s = first; s < end; ++s) {
    const float *left = a.data + s * a.step, *right = b.data + s * b.step;
    Vec columns[kCount];
#pragma GCC unroll 4
    for (int x = 0; x < kCount; ++x) columns[x] = load(right + x * kWidth);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec word = set(left[r * a.row]);
#pragma GCC unroll 4
      for (int x = 0; x < kCount; ++x) sums[r][x] = Product::multiply_add(sums[r][x], word, columns[x]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int x = 0; x < kCount; ++x) {
      float* out = c + r * c_row + x * kWidth;
      store(out, kAdd ? load(out) + sums[r][x] : sums[r][x]);
    }
  }
}

// The part of a product that is not zero, or not needed, on the diagonal of a causal block. Rows are taken in groups of 4.
enum class Part {
  all,
  columns_to_row,   // columns up to the last row of the group
  steps_to_row,     // steps up to it
  steps_from_row,   // steps from the first row of the group on
};

template <typename Product, int kCount, bool kAdd>
void tiles(Part part, Left a, Right b, int64_t rows, int64_t steps, float* c, int64_t c_row) {
  for (int64_t row = 0; row < rows; row += kRows) {
    const int64_t first = part == Part::steps_from_row ? row / Product::kPack : 0;
    const int64_t last = (row + kRows) / Product::kPack;
    const int64_t end = part == Part::steps_to_row && last < steps ? last : steps;
    tile<Product, kCount, kAdd>({a.data + row * a.row, a.row, a.step}, b, first, end, c + row * c_row, c_row);
  }
}

// tiles for 1 <= count <= kColumns registers
template <typename Product, bool kAdd>
GPTFAST_INLINE void tiles_of(int64_t count, Part part, Left a, Right b, int64_t rows, int64_t steps, float* c, int64_t c_row) {
  switch (count) {
    case 1: return tiles<Product, 1, kAdd>(part, a, b, rows, steps, c, c_row);
    case 2: return tiles<Product, 2, kAdd>(part, a, b, rows, steps, c, c_row);
#if defined(__AVX2__)
    case 3: return tiles<Product, 3, kAdd>(part, a, b, rows, steps, c, c_row);
#endif
#if defined(__AVX512F__)
    case 4: return tiles<Product, 4, kAdd>(part, a, b, rows, steps, c, c_row);
#endif
  }
}

// c[rows, width] = or += a[rows, steps] b[steps, width]; rows is a multiple of 4, width of a register's, steps counts words
template <typename Product, bool kAdd>
void multiply(Part part, Left a, Right b, int64_t rows, int64_t steps, int64_t width, float* c, int64_t c_row) {
  if (part == Part::columns_to_row) {
    for (int64_t row = 0; row < rows; row += kRows) {
      const int64_t needed = (row + kRows + kWidth - 1) / kWidth * kWidth;
      const Left group{a.data + row * a.row, a.row, a.step};
      multiply<Product, kAdd>(Part::all, group, b, kRows, steps, needed < width ? needed : width, c + row * c_row, c_row);
    }
    return;
  }
  // as few passes as there can be, of about equal numbers of registers
  int64_t left = width / kWidth;
  for (int64_t passes = (left + kColumns - 1) / kColumns; passes > 0; --passes) {
    const int64_t count = (left + passes - 1) / passes;
    tiles_of<Product, kAdd>(count, part, a, b, rows, steps, c, c_row);
    b.data += count * kWidth;
    c += count * kWidth;
    left -= count;
  }
}

#if defined(__AVX512F__)
#define GPTFAST_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define GPTFAST_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__)
#define GPTFAST_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define GPTFAST_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define GPTFAST_LOW 0, 4, 1, 5
#define GPTFAST_HIGH 2, 6, 3, 7
#endif

// rows[i][j] becomes rows[j][i]: interleaving row i with row i + width / 2 turns the bits of (row, column) by one place
GPTFAST_INLINE void transpose(Vec (&rows)[kWidth]) {
  for (int stage = 1; stage < kWidth; stage *= 2) {
    Vec next[kWidth];
    for (int i = 0; i < kWidth / 2; ++i) {
      next[2 * i] = __builtin_shufflevector(rows[i], rows[i + kWidth / 2], GPTFAST_LOW);
      next[2 * i + 1] = __builtin_shufflevector(rows[i], rows[i + kWidth / 2], GPTFAST_HIGH);
    }
    __builtin_memcpy(rows, next, sizeof(next));
  }
}

#undef GPTFAST_LOW
#undef GPTFAST_HIGH

}  // namespace
}  // namespace gptfast::cpu::GPTFAST_ISA
