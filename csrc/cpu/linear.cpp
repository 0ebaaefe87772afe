// linear on the CPU: products with plain weights by PyTorch's libraries, with packed ones and sums over rows by our own kernels.
// PyTorch's fp32 products go to MKL, which on AMD CPUs is 10 % (Zen 4) to 50 % (Zen 5) slower than the oneDNN in the same library.
// That one is reached through mkldnn::_linear_pointwise, a private op: it is looked up, and where it is missing ATen's own product
// serves. It adds the bias while it stores, in bf16 too. 16-bit products over rows go through at::mm, faster for transposed operands.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <string_view>
#include <tuple>

#include "cpu/isa.h"
#include "cpu/matmul.h"
#include "cpu/packed_tensor.h"
#include "cpu/partials_kernel.h"
#include "cpu/tensor.h"
#include "cpu/transpose_kernel.h"

namespace gptfast::cpu {
namespace {

using Pointwise = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, std::string_view,
                             c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);

struct OneDnn {
  std::optional<c10::TypedOperatorHandle<Pointwise>> product;
  std::string reason;

  OneDnn() {
    const auto found = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
    if (!found) {
      reason = "this PyTorch has no mkldnn::_linear_pointwise";
      return;
    }
    try {
      product = found->typed<Pointwise>();
    } catch (const std::exception&) {
      reason = "this PyTorch's mkldnn::_linear_pointwise has another signature";
    }
  }
};

// Which products go to oneDNN's op: all of fp32; in bf16 those with rows as they lie, on CPUs where oneDNN has bf16 at all
bool takes(const at::Tensor& a) {
  static const bool has_bf16 = usable_isas().back() == "avx512";
  const bool over_rows = a.stride(1) != 1;  // the gradient of a weight
  return a.scalar_type() == at::kFloat || (a.scalar_type() == at::kBFloat16 && has_bf16 && !over_rows);
}

const OneDnn& onednn() {
  static const OneDnn found;
  return found;
}

// a [N, K] with the columns of a contiguous [K, N]: a copy with contiguous rows
at::Tensor with_rows(const at::Tensor& a) {
  at::Tensor result = at::empty(a.sizes(), a.options());
  const float* from = a.const_data_ptr<float>();
  float* to = result.mutable_data_ptr<float>();
  const int64_t rows = a.size(1), columns = a.size(0);  // of what lies in memory
  at::parallel_for(0, columns, std::max<int64_t>(16, grain(rows) / 16 * 16), [&](int64_t begin, int64_t end) {
    GPTFAST_CALL(transpose_columns, from, rows, columns, begin, end, to);
  });
  return result;
}

// Column sums of dy [N, M] in fp32, in an order that the shape alone decides
at::Tensor column_sums(const at::Tensor& dy) {
  const int64_t columns = dy.size(1);
  const RowBlocks blocks(dy.size(0));
  at::Tensor partials = at::empty({blocks.count, columns}, at::kFloat), sums = at::empty({columns}, at::kFloat);
  float *partial = partials.mutable_data_ptr<float>(), *total = sums.mutable_data_ptr<float>();
  const void* rows = dy.const_data_ptr();
  const Type type = type_of(dy);
  at::parallel_for(0, blocks.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      GPTFAST_CALL(sum_rows, type, rows, columns, blocks.first(block), blocks.end(block), partial + block * columns);
    }
  });
  at::parallel_for(0, columns, grain(blocks.count), [&](int64_t begin, int64_t end) {
    GPTFAST_CALL(add_partials, partial, blocks.count, columns, begin, end, total);
  });
  return sums;
}

void check_product(const at::Tensor& x, const at::Tensor& weight) {
  check_rows(x, "x");
  check_float(x, "x");
  check_type(weight, x.scalar_type(), "weight");
  TORCH_CHECK(weight.dim() == 2 && weight.size(1) == x.size(1), "weight has shape ", weight.sizes(), ", needs [M, ", x.size(1), "]");
}

at::Tensor linear_cpu(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, c10::string_view format,
                      int64_t outputs) {
  if (format.empty()) return multiply_with(x, weight, bias);
  check_rows(x, "x");
  check_float(x, "x");
  const engine::PackedWeight packed = packed_weight(weight, format, outputs, x);
  const at::Tensor shift = packed_bias(bias, outputs, x);
  at::Tensor y = at::empty({x.size(0), outputs}, x.options().dtype(at::kFloat));
  packed_product(packed, as_type(x, at::kFloat), epilogue_into(y, shift));
  return as_type(y, x.scalar_type());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_backward_cpu(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight) {
  check_product(x, weight);
  check_shape(dy, {x.size(0), weight.size(0)}, x, "dy");
  check_type(dy, x.scalar_type(), "dy");
  const at::Tensor dx = multiply(dy, weight.t());
  // a gradient with the strides of its parameter is added to others without a strided pass
  const bool transposed = weight.stride(0) == 1 && weight.stride(1) != 1;
  const at::Tensor dweight = transposed ? multiply(x.t(), dy.t()).t() : multiply(dy.t(), x.t());
  return {dx, dweight, as_type(column_sums(dy), x.scalar_type())};
}

}  // namespace

std::string fp32_products() { return onednn().product ? "oneDNN" : "ATen: " + onednn().reason; }

at::Tensor multiply(const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& bias) {
  const at::AutoDispatchBelowAutograd leaf;  // ours are leaves of the dispatcher, these are not
  if (onednn().product && a.numel() != 0 && b.numel() != 0 && takes(a)) {
    const bool transposed = a.stride(0) == 1 && a.stride(1) == a.size(0) && a.scalar_type() == at::kFloat;
    return onednn().product->call(transposed ? with_rows(a) : a, b, bias, "none", c10::List<std::optional<at::Scalar>>(), std::nullopt);
  }
  return has(bias) ? at::addmm(*bias, a, b.t()) : at::mm(a, b.t());
}

at::Tensor multiply_with(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  check_product(x, weight);
  if (!has(bias)) return multiply(x, weight);
  check_shape(*bias, {weight.size(0)}, x, "bias");
  return multiply(x, weight, as_type(*bias, x.scalar_type()));
}

}  // namespace gptfast::cpu

TORCH_LIBRARY_IMPL(gptfast, CPU, m) {
  m.impl("linear", TORCH_FN(gptfast::cpu::linear_cpu));
  m.impl("linear_backward", TORCH_FN(gptfast::cpu::linear_backward_cpu));
}
