// gelu on the CPU: checks, memory, threads. The arithmetic is in gelu_kernel.h.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <tuple>

#include "check.h"
#include "cpu/gelu_kernel.h"
#include "cpu/partials_kernel.h"
#include "cpu/tensor.h"

namespace gptfast::cpu {
namespace {

// What forward and backward fill in alike; `bias` is the parameter in fp32, which must outlive the result
Gelu arguments(const at::Tensor& x, const at::Tensor& bias, c10::string_view approximate) {
  TORCH_CHECK(approximate == "tanh" || approximate == "none", "approximate is ", approximate, ", allowed: tanh, none");
  Gelu args{};
  args.type = type_of(x);
  args.tanh = approximate == "tanh";
  args.columns = x.size(1);
  args.x = x.const_data_ptr();
  args.bias = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  return args;
}

at::Tensor in_fp32(const at::Tensor& x, OptionalTensor bias) {
  check_rows(x, "x");
  check_float(x, "x");
  check_parameter(bias, x, "bias");
  return has(bias) ? as_type(*bias, at::kFloat) : at::Tensor();
}

at::Tensor gelu_cpu(const at::Tensor& x, OptionalTensor bias, c10::string_view approximate) {
  const at::Tensor shift = in_fp32(x, bias);
  Gelu args = arguments(x, shift, approximate);
  at::Tensor y = at::empty_like(x);
  args.y = y.mutable_data_ptr();
  args.stream = past_caches(y);
  at::parallel_for(0, x.size(0), grain(args.columns), [&](int64_t begin, int64_t end) {
    GPTFAST_CALL(gelu_forward, args, begin, end);
  });
  return y;
}

std::tuple<at::Tensor, at::Tensor> gelu_backward_cpu(const at::Tensor& dy, const at::Tensor& x, OptionalTensor bias,
                                                     c10::string_view approximate) {
  const at::Tensor shift = in_fp32(x, bias);
  check_shape(dy, x.sizes(), x, "dy");
  check_type(dy, x.scalar_type(), "dy");
  Gelu args = arguments(x, shift, approximate);
  const auto fp32 = x.options().dtype(at::kFloat);
  const int64_t rows = x.size(0), columns = x.size(1);
  at::Tensor dx = at::empty_like(x);
  args.dy = dy.const_data_ptr();
  args.dx = dx.mutable_data_ptr();
  args.stream = past_caches(dx);
  if (!has(bias)) {
    at::parallel_for(0, rows, grain(columns), [&](int64_t begin, int64_t end) {
      GPTFAST_CALL(gelu_backward, args, begin, end, nullptr);
    });
    return {dx, at::empty({0}, fp32)};
  }
  args.wide_sums = bias->scalar_type() == at::kFloat;
  const RowBlocks blocks(rows);
  at::Tensor partials = at::empty({blocks.count, columns}, fp32), dbias = at::empty({columns}, fp32);
  float *partial = partials.mutable_data_ptr<float>(), *sums = dbias.mutable_data_ptr<float>();
  at::parallel_for(0, blocks.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      GPTFAST_CALL(gelu_backward, args, blocks.first(block), blocks.end(block), partial + block * columns);
    }
  });
  at::parallel_for(0, columns, grain(blocks.count), [&](int64_t begin, int64_t end) {
    GPTFAST_CALL(add_partials, partial, blocks.count, columns, begin, end, sums);
  });
  return {dx, as_type(dbias, bias->scalar_type())};
}

}  // namespace
}  // namespace gptfast::cpu

TORCH_LIBRARY_IMPL(gptfast, CPU, m) {
  m.impl("gelu", TORCH_FN(gptfast::cpu::gelu_cpu));
  m.impl("gelu_backward", TORCH_FN(gptfast::cpu::gelu_backward_cpu));
}
