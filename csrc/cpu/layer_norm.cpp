// layer_norm on the CPU: checks, memory, threads. The arithmetic is in layer_norm_kernel.h.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "cpu/layer_norm.h"

#include "check.h"
#include "cpu/layer_norm_kernel.h"
#include "cpu/partials_kernel.h"
#include "cpu/tensor.h"

namespace gptfast::cpu {
namespace {

Three layer_norm_cpu(const at::Tensor& x, OptionalTensor weight, OptionalTensor bias, double eps) {
  check_rows(x, "x");
  check_float(x, "x");
  check_norm_parameters(x, weight, bias);
  const int64_t rows = x.size(0), columns = x.size(1);
  const auto fp32 = x.options().dtype(at::kFloat);
  const at::Tensor scale = parameter_or(weight, columns, 1), shift = parameter_or(bias, columns, 0);
  at::Tensor y = at::empty_like(x), mean = at::empty({rows}, fp32), rstd = at::empty({rows}, fp32);
  LayerNorm args{};
  args.type = type_of(x);
  args.columns = columns;
  args.eps = static_cast<float>(eps);
  args.x = x.const_data_ptr();
  args.weight = scale.const_data_ptr<float>();
  args.bias = shift.const_data_ptr<float>();
  args.y = y.mutable_data_ptr();
  args.stream = past_caches(y);
  args.mean = mean.mutable_data_ptr<float>();
  args.rstd = rstd.mutable_data_ptr<float>();
  at::parallel_for(0, rows, grain(columns), [&](int64_t begin, int64_t end) { GPTFAST_CALL(layer_norm_forward, args, begin, end); });
  return {y, mean, rstd};
}

Three layer_norm_backward_cpu(const at::Tensor& dy, const at::Tensor& x, OptionalTensor weight, const at::Tensor& mean,
                              const at::Tensor& rstd) {
  return layer_norm_gradients(std::nullopt, dy, x, weight, mean, rstd);
}

}  // namespace

Three layer_norm_gradients(OptionalTensor dtotal, const at::Tensor& dy, const at::Tensor& x, OptionalTensor weight,
                           const at::Tensor& mean, const at::Tensor& rstd) {
  check_norm_backward(dy, x, weight, mean, rstd);
  const int64_t columns = x.size(1);
  const auto fp32 = x.options().dtype(at::kFloat);
  const RowBlocks blocks(x.size(0));
  const at::Tensor scale = parameter_or(weight, columns, 1);
  at::Tensor dx = at::empty_like(x), partials = at::empty({blocks.count, 2, columns}, fp32);
  at::Tensor dweight = at::empty({columns}, fp32), dbias = at::empty({columns}, fp32);
  LayerNorm args{};
  args.type = type_of(x);
  args.columns = columns;
  args.x = x.const_data_ptr();
  args.weight = scale.const_data_ptr<float>();
  args.mean = const_cast<float*>(mean.const_data_ptr<float>());
  args.rstd = const_cast<float*>(rstd.const_data_ptr<float>());
  args.dy = dy.const_data_ptr();
  args.dtotal = has(dtotal) ? dtotal->const_data_ptr() : nullptr;
  args.dx = dx.mutable_data_ptr();
  args.stream = past_caches(dx);
  float* partial = partials.mutable_data_ptr<float>();
  at::parallel_for(0, blocks.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      GPTFAST_CALL(layer_norm_backward, args, blocks.first(block), blocks.end(block), partial + block * 2 * columns);
    }
  });
  float *weight_sums = dweight.mutable_data_ptr<float>(), *bias_sums = dbias.mutable_data_ptr<float>();
  at::parallel_for(0, columns, grain(blocks.count), [&](int64_t begin, int64_t end) {
    GPTFAST_CALL(add_partials, partial, blocks.count, 2 * columns, begin, end, weight_sums);
    GPTFAST_CALL(add_partials, partial + columns, blocks.count, 2 * columns, begin, end, bias_sums);
  });
  const auto type = gradient_type(weight);
  return {dx, as_type(dweight, type), as_type(dbias, type)};
}

}  // namespace gptfast::cpu

TORCH_LIBRARY_IMPL(gptfast, CPU, m) {
  m.impl("layer_norm", TORCH_FN(gptfast::cpu::layer_norm_cpu));
  m.impl("layer_norm_backward", TORCH_FN(gptfast::cpu::layer_norm_backward_cpu));
}
