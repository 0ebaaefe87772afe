// A transposed copy of fp32 rows, a square of registers at a time. oneDNN copies a transposed left operand itself, one element after the
// other: for the small products of a weight's gradient that took longer than the product.
#pragma once

#include "cpu/isa.h"
#include "cpu/vec_types.h"

// to[c][r] = from[r][c] for all rows and first <= c < end, where to's rows are `rows` long
GPTFAST_PER_ISA(void transpose_columns(const float* from, int64_t rows, int64_t columns, int64_t first, int64_t end, float* to))

#ifdef GPTFAST_ISA

#include "cpu/vec_product.h"

namespace gptfast::cpu::GPTFAST_ISA {

void transpose_columns(const float* from, int64_t rows, int64_t columns, int64_t first, int64_t end, float* to) {
  const int64_t whole_rows = rows / kWidth * kWidth;
  int64_t column = first;
  for (; column + kWidth <= end; column += kWidth) {
    for (int64_t row = 0; row < whole_rows; row += kWidth) {
      Vec square[kWidth];
      for (int i = 0; i < kWidth; ++i) square[i] = load(from + (row + i) * columns + column);
      transpose(square);
      for (int i = 0; i < kWidth; ++i) store(to + (column + i) * rows + row, square[i]);
    }
    for (int64_t row = whole_rows; row < rows; ++row) {
      for (int i = 0; i < kWidth; ++i) to[(column + i) * rows + row] = from[row * columns + column + i];
    }
  }
  for (; column < end; ++column) {
    for (int64_t row = 0; row < rows; ++row) to[column * rows + row] = from[row * columns + column];
  }
}

}  // namespace gptfast::cpu::GPTFAST_ISA

#endif
