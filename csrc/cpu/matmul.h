// Matrix products on the CPU, the one place where a kernel of PyTorch's library computes. Defined in linear.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

namespace gptfast::cpu {

// a [N, K] b[M, K]^T (+ bias [M]) -> contiguous [N, M], all of one dtype; a and b have any strides
at::Tensor multiply(const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& bias = std::nullopt);

// The same for rows x, weight and bias of an op, which are checked; bias may be fp32
at::Tensor multiply_with(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias);

// "oneDNN", or "ATen: " and the reason why oneDNN cannot be reached: what fp32 products run on
std::string fp32_products();

}  // namespace gptfast::cpu
