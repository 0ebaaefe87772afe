// The checks that every op makes of its arguments, on the CPU and on CUDA alike. They hold an op's contract (design: dtype, shape,
// contiguity, device); mistakes of users are caught earlier, in gptfast/ops/<op>.py. No CUDA header and no libtorch umbrella header.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

namespace gptfast {

using OptionalTensor = const std::optional<at::Tensor>&;

inline bool has(OptionalTensor tensor) { return tensor.has_value() && tensor->defined(); }

// fp32, bf16 or fp16: what kernels take; statistics and losses are fp32
inline void check_float(const at::Tensor& tensor, const char* name) {
  const auto type = tensor.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, name, " is ", type, ", allowed: fp32, bf16, fp16");
}

inline void check_contiguous(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.is_contiguous(), name, " is not contiguous: shape ", tensor.sizes(), ", strides ", tensor.strides());
}

// [N, C], contiguous
inline void check_rows(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.dim() == 2, name, " has ", tensor.dim(), " dimensions, rows need 2: [N, C]");
  check_contiguous(tensor, name);
}

// Contiguous, of this shape, on the device of `like`
inline void check_shape(const at::Tensor& tensor, at::IntArrayRef shape, const at::Tensor& like, const char* name) {
  TORCH_CHECK(tensor.sizes() == shape, name, " has shape ", tensor.sizes(), ", needs ", shape);
  TORCH_CHECK(tensor.device() == like.device(), name, " is on ", tensor.device(), ", the other tensors are on ", like.device());
  check_contiguous(tensor, name);
}

inline void check_type(const at::Tensor& tensor, at::ScalarType type, const char* name) {
  TORCH_CHECK(tensor.scalar_type() == type, name, " is ", tensor.scalar_type(), ", needs ", type);
}

// A parameter vector [C] beside rows x [N, C]: fp32 or x's dtype, or absent
inline void check_parameter(OptionalTensor parameter, const at::Tensor& x, const char* name) {
  if (!has(parameter)) return;
  check_shape(*parameter, {x.size(1)}, x, name);
  const auto type = parameter->scalar_type();
  TORCH_CHECK(type == at::kFloat || type == x.scalar_type(), name, " is ", type, ", allowed: fp32 or x's ", x.scalar_type());
}

// weight and bias of a normalisation: both as check_parameter, and of one dtype where both are given
inline void check_norm_parameters(const at::Tensor& x, OptionalTensor weight, OptionalTensor bias) {
  check_parameter(weight, x, "weight");
  check_parameter(bias, x, "bias");
  if (has(weight) && has(bias)) check_type(*bias, weight->scalar_type(), "bias");
}

// What backward of a normalisation gets: dy and x alike, one mean and one rstd a row
inline void check_norm_backward(const at::Tensor& dy, const at::Tensor& x, OptionalTensor weight, const at::Tensor& mean,
                                const at::Tensor& rstd) {
  check_rows(x, "x");
  check_float(x, "x");
  check_shape(dy, x.sizes(), x, "dy");
  check_type(dy, x.scalar_type(), "dy");
  check_parameter(weight, x, "weight");
  check_shape(mean, {x.size(0)}, x, "mean");
  check_shape(rstd, {x.size(0)}, x, "rstd");
  check_type(mean, at::kFloat, "mean");
  check_type(rstd, at::kFloat, "rstd");
}

// Rows of logits [N, Vp] and a target for each, int64 or int32; the first `vocab` columns are real
inline void check_logits(const at::Tensor& logits, const at::Tensor& targets, int64_t vocab) {
  check_rows(logits, "logits");
  check_float(logits, "logits");
  check_shape(targets, {logits.size(0)}, logits, "targets");
  const auto type = targets.scalar_type();
  TORCH_CHECK(type == at::kLong || type == at::kInt, "targets is ", type, ", allowed: int64, int32");
  TORCH_CHECK(vocab >= 1 && vocab <= logits.size(1), "vocab is ", vocab, ", allowed: 1 to ", logits.size(1), ", the number of columns");
}

// The dtype of a parameter's gradient: the parameter's own, fp32 where there is none
inline at::ScalarType gradient_type(OptionalTensor parameter) { return has(parameter) ? parameter->scalar_type() : at::kFloat; }

}  // namespace gptfast
