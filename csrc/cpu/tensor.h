// What the CPU front ends share between torch's tensors and the kernels' raw pointers.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <sys/mman.h>

#include <algorithm>
#include <vector>

#include "check.h"
#include "cpu/convert_kernel.h"
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

constexpr int64_t kLarge = int64_t{32} << 20;  // bytes: malloc maps memory of this size anew every time, and caches do not hold it

// at::empty for outputs that may be large. The kernel clears a page when it is first touched, and 4 KiB at a time that takes longer than
// what is then computed: ask for huge pages, which Linux may refuse.
// at_least: bytes, two huge pages or more.
inline at::Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options, int64_t at_least = kLarge) {
  at::Tensor result = at::empty(sizes, options);
  const auto bytes = static_cast<int64_t>(result.nbytes());
  if (bytes < at_least) return result;
  constexpr uintptr_t page = uintptr_t{2} << 20;
  const auto begin = (reinterpret_cast<uintptr_t>(result.mutable_data_ptr()) + page - 1) / page * page;
  const auto end = (reinterpret_cast<uintptr_t>(result.mutable_data_ptr()) + bytes) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  return result;
}

// Whether a result is written past the caches: it is larger than half of a usual last-level cache, so whoever reads it next would not
// find its beginning there, and its rows are whole cache lines
inline bool past_caches(const at::Tensor& result) {
  const bool lines = result.dim() == 2 && result.size(1) * result.itemsize() % 64 == 0;
  return lines && result.nbytes() >= (16u << 20) && reinterpret_cast<uintptr_t>(result.const_data_ptr()) % 64 == 0;
}

// `tensor` (contiguous) in another dtype; itself where it has that dtype
inline at::Tensor as_type(const at::Tensor& tensor, at::ScalarType type) {
  if (tensor.scalar_type() == type) return tensor;
  at::Tensor result = at::empty(tensor.sizes(), tensor.options().dtype(type));
  const void* from = tensor.const_data_ptr();
  void* to = result.mutable_data_ptr();
  const Type from_type = type_of(tensor), to_type = type_of(result);
  at::parallel_for(0, tensor.numel(), 1 << 16, [&](int64_t begin, int64_t end) {
    GPTFAST_CALL(convert, from_type, from, to_type, to, begin, end);
  });
  return result;
}

// A parameter [C] in fp32, `absent` in every place where there is none: kernels have one form for every dtype, and for absence
inline at::Tensor parameter_or(OptionalTensor parameter, int64_t columns, float absent) {
  if (has(parameter)) return as_type(*parameter, at::kFloat);
  at::Tensor result = at::empty({columns}, at::kFloat);
  GPTFAST_CALL(fill, result.mutable_data_ptr<float>(), absent, columns);
  return result;
}

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

// A list of tensors laid end to end, each from a multiple of 64 elements on, and cut into equal blocks: one parallel loop does them all,
// however small most of them are. Blocks depend on the shapes alone.
class ListBlocks {
 public:
  explicit ListBlocks(at::TensorList tensors) {
    int64_t start = 0;
    for (const at::Tensor& tensor : tensors) {
      starts_.push_back(start);
      lengths_.push_back(tensor.numel());
      start += (tensor.numel() + 63) / 64 * 64;
    }
    count = (start + kLength - 1) / kLength;
  }

  // f(block, tensor, first, end): this part of the tensor belongs to that block
  template <typename F>
  void pieces(int64_t first_block, int64_t end_block, F f) const {
    for (int64_t block = first_block; block < end_block; ++block) {
      const int64_t begin = block * kLength, end = begin + kLength, tensors = static_cast<int64_t>(starts_.size());
      int64_t tensor = std::upper_bound(starts_.begin(), starts_.end(), begin) - starts_.begin() - 1;
      for (; tensor < tensors && starts_[tensor] < end; ++tensor) {
        const int64_t first = std::max<int64_t>(0, begin - starts_[tensor]), stop = std::min(lengths_[tensor], end - starts_[tensor]);
        if (first < stop) f(block, tensor, first, stop);
      }
    }
  }

  static constexpr int64_t kLength = 1 << 16;  // elements a block
  int64_t count;

 private:
  std::vector<int64_t> starts_, lengths_;
};

}  // namespace gptfast::cpu
