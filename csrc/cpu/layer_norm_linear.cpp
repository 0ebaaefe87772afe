// layer_norm_linear on the CPU: the kernels of layer_norm, then a packed product that ends with bias and activation, or, for a plain
// weight, PyTorch's product and the kernel of gelu.
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "cpu/gelu_kernel.h"
#include "cpu/layer_norm_kernel.h"
#include "cpu/matmul.h"
#include "cpu/packed_tensor.h"

namespace gptfast::cpu {
namespace {

at::Tensor normalise(const at::Tensor& x, OptionalTensor weight, OptionalTensor bias, double eps) {
  check_rows(x, "x");
  check_float(x, "x");
  check_norm_parameters(x, weight, bias);
  const int64_t rows = x.size(0), columns = x.size(1);
  const at::Tensor scale = parameter_or(weight, columns, 1), shift = parameter_or(bias, columns, 0);
  at::Tensor y = at::empty_like(x), statistics = at::empty({2, rows}, x.options().dtype(at::kFloat));
  LayerNorm args{};
  args.type = type_of(x);
  args.columns = columns;
  args.eps = static_cast<float>(eps);
  args.x = x.const_data_ptr();
  args.weight = scale.const_data_ptr<float>();
  args.bias = shift.const_data_ptr<float>();
  args.y = y.mutable_data_ptr();
  args.mean = statistics.mutable_data_ptr<float>();
  args.rstd = args.mean + rows;
  at::parallel_for(0, rows, grain(columns), [&](int64_t begin, int64_t end) { GPTFAST_CALL(layer_norm_forward, args, begin, end); });
  return y;
}

void apply_gelu(at::Tensor& y, bool tanh) {
  Gelu args{};
  args.type = type_of(y);
  args.tanh = tanh;
  args.columns = y.size(1);
  args.x = args.y = y.mutable_data_ptr();
  at::parallel_for(0, y.size(0), grain(args.columns), [&](int64_t begin, int64_t end) { GPTFAST_CALL(gelu_forward, args, begin, end); });
}

at::Tensor layer_norm_linear_cpu(const at::Tensor& x, OptionalTensor ln_weight, OptionalTensor ln_bias, const at::Tensor& weight,
                                 OptionalTensor bias, c10::string_view activation, double eps, c10::string_view format, int64_t outputs) {
  using engine::Activation;
  TORCH_CHECK(activation == "none" || activation == "gelu" || activation == "gelu_tanh", "activation is ", activation,
              ", allowed: none, gelu, gelu_tanh");
  const Activation kind = activation == "none" ? Activation::none : activation == "gelu" ? Activation::gelu : Activation::gelu_tanh;
  const at::Tensor normal = normalise(x, ln_weight, ln_bias, eps);
  if (!format.empty()) {
    const engine::PackedWeight packed = packed_weight(weight, format, outputs, x);
    const at::Tensor shift = packed_bias(bias, outputs, x);
    at::Tensor y = at::empty({x.size(0), outputs}, x.options().dtype(at::kFloat));
    engine::Epilogue epilogue = epilogue_into(y, shift);
    epilogue.activation = kind;
    packed_product(packed, as_type(normal, at::kFloat), epilogue);
    return as_type(y, x.scalar_type());
  }
  at::Tensor y = multiply_with(normal, weight, bias);
  if (kind != Activation::none) apply_gelu(y, kind == Activation::gelu_tanh);
  return y;
}

}  // namespace
}  // namespace gptfast::cpu

TORCH_LIBRARY_IMPL(gptfast, CPU, m) { m.impl("layer_norm_linear", TORCH_FN(gptfast::cpu::layer_norm_linear_cpu)); }
