// add_layer_norm on the CPU: checks, memory, threads. The arithmetic is in add_layer_norm_kernel.h and layer_norm_kernel.h.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <tuple>

#include "check.h"
#include "cpu/add_layer_norm_kernel.h"
#include "cpu/layer_norm.h"
#include "cpu/tensor.h"

namespace gptfast::cpu {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> add_layer_norm_cpu(const at::Tensor& residual, const at::Tensor& x,
                                                                              OptionalTensor weight, OptionalTensor bias, double eps) {
  check_rows(x, "x");
  check_float(x, "x");
  check_shape(residual, x.sizes(), x, "residual");
  check_type(residual, x.scalar_type(), "residual");
  check_norm_parameters(x, weight, bias);
  const int64_t rows = x.size(0), columns = x.size(1);
  const auto fp32 = x.options().dtype(at::kFloat);
  const at::Tensor scale = parameter_or(weight, columns, 1), shift = parameter_or(bias, columns, 0);
  at::Tensor total = at::empty_like(x), y = at::empty_like(x), mean = at::empty({rows}, fp32), rstd = at::empty({rows}, fp32);
  AddLayerNorm args{};
  args.norm.type = type_of(x);
  args.norm.columns = columns;
  args.norm.eps = static_cast<float>(eps);
  args.norm.x = x.const_data_ptr();
  args.norm.weight = scale.const_data_ptr<float>();
  args.norm.bias = shift.const_data_ptr<float>();
  args.norm.y = y.mutable_data_ptr();
  args.norm.stream = past_caches(y);
  args.norm.mean = mean.mutable_data_ptr<float>();
  args.norm.rstd = rstd.mutable_data_ptr<float>();
  args.residual = residual.const_data_ptr();
  args.total = total.mutable_data_ptr();
  at::parallel_for(0, rows, grain(columns), [&](int64_t begin, int64_t end) {
    GPTFAST_CALL(add_layer_norm_forward, args, begin, end);
  });
  return {total, y, mean, rstd};
}

Three add_layer_norm_backward_cpu(OptionalTensor dtotal, const at::Tensor& dy, const at::Tensor& total, OptionalTensor weight,
                                  const at::Tensor& mean, const at::Tensor& rstd) {
  if (has(dtotal)) {
    check_shape(*dtotal, total.sizes(), total, "dtotal");
    check_type(*dtotal, total.scalar_type(), "dtotal");
  }
  return layer_norm_gradients(dtotal, dy, total, weight, mean, rstd);
}

}  // namespace
}  // namespace gptfast::cpu

TORCH_LIBRARY_IMPL(gptfast, CPU, m) {
  m.impl("add_layer_norm", TORCH_FN(gptfast::cpu::add_layer_norm_cpu));
  m.impl("add_layer_norm_backward", TORCH_FN(gptfast::cpu::add_layer_norm_backward_cpu));
}
