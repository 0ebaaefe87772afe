// What the CPU front ends share between torch's tensors and the kernels' raw pointers.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

#include "cpu/vec_types.h"

namespace gptfast::cpu {

inline Type type_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kBFloat16: return Type::bf16;
    case at::kHalf: return Type::fp16;
    default: return Type::fp32;
  }
}

// Rows a thread takes at least, so that it has some 32 K elements of work
inline int64_t grain(int64_t columns) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, columns)); }

// A partition of rows for sums over them: at most 64 blocks of equal length, which depends on the number of rows alone.
// Partial sums of the blocks, added in order, give the same bits whatever the number of threads.
struct RowBlocks {
  int64_t rows, length, count;

  explicit RowBlocks(int64_t rows_) : rows(rows_) {
    length = std::max<int64_t>(32, ((rows + 63) / 64 + 3) / 4 * 4);
    count = (rows + length - 1) / length;
  }
  int64_t first(int64_t block) const { return block * length; }
  int64_t end(int64_t block) const { return std::min(rows, (block + 1) * length); }
};

}  // namespace gptfast::cpu
