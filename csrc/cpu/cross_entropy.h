// What cross_entropy and cross_entropy_ share: the kernel's arguments from checked tensors.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "check.h"
#include "cpu/cross_entropy_kernel.h"
#include "cpu/tensor.h"

namespace gptfast::cpu {

inline CrossEntropy cross_entropy_arguments(const at::Tensor& logits, const at::Tensor& targets, int64_t ignore_index, int64_t vocab) {
  check_logits(logits, targets, vocab);
  CrossEntropy args{};
  args.type = args.gradient_type = type_of(logits);
  args.logits = logits.const_data_ptr();
  args.columns = args.logits_stride = args.gradient_stride = logits.size(1);
  args.targets = targets.const_data_ptr();
  args.targets_are_64_bit = targets.scalar_type() == at::kLong;
  args.ignore_index = ignore_index;
  args.vocab = vocab;
  return args;
}

// f(first_row, end_row, scratch) on the rows in parallel, each thread with a scratch of its own for gradients
template <typename F>
void for_rows_with_scratch(const CrossEntropy& args, int64_t rows, F f) {
  const int64_t length = cross_entropy_scratch(args.vocab);
  at::Tensor scratch = at::empty({at::get_num_threads(), length}, at::kFloat);
  float* all = scratch.mutable_data_ptr<float>();
  at::parallel_for(0, rows, grain(args.columns), [&](int64_t begin, int64_t end) { f(begin, end, all + at::get_thread_num() * length); });
}

}  // namespace gptfast::cpu
