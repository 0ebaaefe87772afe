// cross_entropy_ on the CPU: checks, memory, threads. The arithmetic is in cross_entropy_kernel.h.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "check.h"
#include "cpu/cross_entropy.h"

namespace gptfast::cpu {
namespace {

at::Tensor cross_entropy_in_place_cpu(const at::Tensor& logits, const at::Tensor& targets, int64_t ignore_index, int64_t vocab,
                                      const at::Tensor& scale) {
  CrossEntropy args = cross_entropy_arguments(logits, targets, ignore_index, vocab);
  check_shape(scale, {1}, logits, "scale");
  check_type(scale, at::kFloat, "scale");
  const int64_t rows = logits.size(0);
  at::Tensor loss = at::empty({rows}, logits.options().dtype(at::kFloat));
  args.gradient = logits.mutable_data_ptr();
  args.factor = scale.const_data_ptr<float>();
  args.loss = loss.mutable_data_ptr<float>();
  for_rows_with_scratch(args, rows, [&](int64_t begin, int64_t end, float* scratch) {
    GPTFAST_CALL(cross_entropy_forward_backward, args, begin, end, scratch);
  });
  return loss;
}

}  // namespace
}  // namespace gptfast::cpu

TORCH_LIBRARY_IMPL(gptfast, CPU, m) {
  m.impl("cross_entropy_", TORCH_FN(gptfast::cpu::cross_entropy_in_place_cpu));
}
