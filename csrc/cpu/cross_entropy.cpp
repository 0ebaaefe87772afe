// cross_entropy on the CPU: checks, memory, threads. The arithmetic is in cross_entropy_kernel.h.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>
#include <utility>

#include "check.h"
#include "cpu/cross_entropy.h"
#include "cpu/tensor.h"

namespace gptfast::cpu {
namespace {

std::tuple<at::Tensor, at::Tensor> cross_entropy_cpu(const at::Tensor& logits, const at::Tensor& targets, int64_t ignore_index,
                                                     int64_t vocab) {
  CrossEntropy args = cross_entropy_arguments(logits, targets, ignore_index, vocab);
  const auto fp32 = logits.options().dtype(at::kFloat);
  const int64_t rows = logits.size(0);
  at::Tensor loss = at::empty({rows}, fp32), lse = at::empty({rows}, fp32);
  args.loss = loss.mutable_data_ptr<float>();
  args.lse = lse.mutable_data_ptr<float>();
  at::parallel_for(0, rows, grain(args.columns), [&](int64_t begin, int64_t end) {
    GPTFAST_CALL(cross_entropy_forward, args, begin, end);
  });
  return {loss, lse};
}

at::Tensor cross_entropy_backward_cpu(const at::Tensor& dloss, const at::Tensor& logits, const at::Tensor& targets, const at::Tensor& lse,
                                      int64_t ignore_index, int64_t vocab) {
  CrossEntropy args = cross_entropy_arguments(logits, targets, ignore_index, vocab);
  const int64_t rows = logits.size(0);
  for (const auto& [tensor, name] : {std::pair{dloss, "dloss"}, std::pair{lse, "lse"}}) {
    check_shape(tensor, {rows}, logits, name);
    check_type(tensor, at::kFloat, name);
  }
  at::Tensor dlogits = empty_large(logits.sizes(), logits.options());
  args.gradient = dlogits.mutable_data_ptr();
  args.stream = static_cast<int64_t>(dlogits.nbytes()) >= kLarge;
  args.factor = dloss.const_data_ptr<float>();
  args.factor_stride = 1;
  args.lse = const_cast<float*>(lse.const_data_ptr<float>());
  for_rows_with_scratch(args, rows, [&](int64_t begin, int64_t end, float* scratch) {
    GPTFAST_CALL(cross_entropy_backward, args, begin, end, scratch);
  });
  return dlogits;
}

}  // namespace
}  // namespace gptfast::cpu

TORCH_LIBRARY_IMPL(gptfast, CPU, m) {
  m.impl("cross_entropy", TORCH_FN(gptfast::cpu::cross_entropy_cpu));
  m.impl("cross_entropy_backward", TORCH_FN(gptfast::cpu::cross_entropy_backward_cpu));
}
