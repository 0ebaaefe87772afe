// grad_norm on the CPU: checks and the partial sums of equal blocks, added in their order. The arithmetic is in grad_norm_kernel.h.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "check.h"
#include "cpu/grad_norm_kernel.h"
#include "cpu/tensor.h"

namespace gptfast::cpu {
namespace {

std::tuple<at::Tensor, at::Tensor> grad_norm_cpu(at::TensorList grads) {
  for (const at::Tensor& grad : grads) {
    check_float(grad, "a gradient");
    check_contiguous(grad, "a gradient");
  }
  const ListBlocks blocks(grads);
  std::vector<double> partials(blocks.count);
  at::parallel_for(0, blocks.count, 1, [&](int64_t begin, int64_t end) {
    blocks.pieces(begin, end, [&](int64_t block, int64_t tensor, int64_t first, int64_t stop) {
      const at::Tensor& grad = grads[tensor];
      partials[block] += GPTFAST_CALL(sum_of_squares, type_of(grad), grad.const_data_ptr(), first, stop);
    });
  });
  double total = 0;
  for (const double partial : partials) total += partial;
  at::Tensor norm = at::empty({1}, at::kFloat), finite = at::empty({1}, at::kFloat);
  // squares that exceed fp32 give inf, as PyTorch's norm of an fp32 tensor does
  const float result = std::sqrt(static_cast<float>(total));
  *norm.mutable_data_ptr<float>() = result;
  *finite.mutable_data_ptr<float>() = std::isfinite(result) ? 1 : 0;
  return {norm, finite};
}

}  // namespace
}  // namespace gptfast::cpu

TORCH_LIBRARY_IMPL(gptfast, CPU, m) { m.impl("grad_norm", TORCH_FN(gptfast::cpu::grad_norm_cpu)); }
