// linear_add on the CPU: a packed product that ends with bias and residual, or, for a plain weight, PyTorch's product and an addition.
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "cpu/linear_add_kernel.h"
#include "cpu/matmul.h"
#include "cpu/packed_tensor.h"

namespace gptfast::cpu {
namespace {

at::Tensor linear_add_cpu(const at::Tensor& x, const at::Tensor& weight, OptionalTensor bias, const at::Tensor& residual,
                          c10::string_view format, int64_t outputs) {
  check_rows(x, "x");
  check_float(x, "x");
  check_float(residual, "residual");
  check_shape(residual, {x.size(0), format.empty() ? weight.size(0) : outputs}, x, "residual");
  if (!format.empty()) {
    const engine::PackedWeight packed = packed_weight(weight, format, outputs, x);
    const at::Tensor shift = packed_bias(bias, outputs, x), before = as_type(residual, at::kFloat);
    at::Tensor y = at::empty(residual.sizes(), residual.options().dtype(at::kFloat));
    engine::Epilogue epilogue = epilogue_into(y, shift);
    epilogue.residual = before.const_data_ptr<float>();
    packed_product(packed, as_type(x, at::kFloat), epilogue);
    return as_type(y, residual.scalar_type());
  }
  const at::Tensor y = multiply_with(x, weight, bias);
  at::Tensor out = at::empty_like(residual);
  const Type type = type_of(residual), product_type = type_of(y);
  at::parallel_for(0, out.numel(), 1 << 15, [&](int64_t begin, int64_t end) {
    GPTFAST_CALL(add_to_residual, type, residual.const_data_ptr(), product_type, y.const_data_ptr(), out.mutable_data_ptr(), begin, end);
  });
  return out;
}

}  // namespace
}  // namespace gptfast::cpu

TORCH_LIBRARY_IMPL(gptfast, CPU, m) { m.impl("linear_add", TORCH_FN(gptfast::cpu::linear_add_cpu)); }
