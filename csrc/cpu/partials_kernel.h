// The last step of a sum over rows: partial sums of fixed blocks of rows are added in the order of the blocks, whoever made them,
// so that the bits of a gradient depend on its shape and on nothing else.
#pragma once

#include "cpu/isa.h"
#include "cpu/vec_types.h"

// out[i] = partials[0][i] + partials[1][i] + ... for first <= i < end, where row b begins at partials + b * stride
GPTFAST_PER_ISA(void add_partials(const float* partials, int64_t count, int64_t stride, int64_t first, int64_t end, float* out))
// The first step where the sum is of the rows themselves: sums [C] of rows [first_row, end_row) of x [N, C]
GPTFAST_PER_ISA(void sum_rows(Type type, const void* x, int64_t columns, int64_t first_row, int64_t end_row, float* sums))

#ifdef GPTFAST_ISA

#include "cpu/vec.h"

namespace gptfast::cpu::GPTFAST_ISA {
namespace {

constexpr int kRowsAtOnce = 8;  // rows between a load and a store of the sums

template <typename T>
void sum_rows_of(const void* x, int64_t columns, int64_t first_row, int64_t end_row, float* sums) {
  const T* rows = static_cast<const T*>(x);
  for_columns(columns, [&](int64_t i, int lanes) { store_lanes(sums + i, set(0), lanes); });
  for (int64_t row = first_row; row < end_row; row += kRowsAtOnce) {
    const int64_t end = row + kRowsAtOnce < end_row ? row + kRowsAtOnce : end_row;
    for_columns(columns, [&](int64_t i, int lanes) {
      Vec total = load_lanes(sums + i, lanes);
      for (int64_t r = row; r < end; ++r) total += load_lanes(rows + r * columns + i, lanes);
      store_lanes(sums + i, total, lanes);
    });
  }
}

}  // namespace

void sum_rows(Type type, const void* x, int64_t columns, int64_t first_row, int64_t end_row, float* sums) {
  switch (type) {
    case Type::fp32: return sum_rows_of<float>(x, columns, first_row, end_row, sums);
    case Type::bf16: return sum_rows_of<bf16>(x, columns, first_row, end_row, sums);
    case Type::fp16: return sum_rows_of<fp16>(x, columns, first_row, end_row, sums);
  }
}

void add_partials(const float* partials, int64_t count, int64_t stride, int64_t first, int64_t end, float* out) {
  for_columns(end - first, [&](int64_t i, int lanes) {
    Vec total = set(0);
    for (int64_t block = 0; block < count; ++block) total += load_lanes(partials + block * stride + first + i, lanes);
    store_lanes(out + first + i, total, lanes);
  });
}

}  // namespace gptfast::cpu::GPTFAST_ISA

#endif
