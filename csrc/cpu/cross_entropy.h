// What cross_entropy and cross_entropy_ share: the kernel's arguments from checked tensors.
#pragma once

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

}  // namespace gptfast::cpu
