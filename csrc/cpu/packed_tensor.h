// Products with packed weights as the ops call them: checks, memory, threads. The arithmetic is in engine/product.h's kernels.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "check.h"
#include "cpu/engine/product.h"
#include "cpu/tensor.h"

namespace gptfast::cpu {

inline engine::Format format_named(c10::string_view name) {
  if (name == "fp32") return engine::Format::fp32;
  if (name == "bf16") return engine::Format::bf16;
  if (name == "int8") return engine::Format::int8;
  TORCH_CHECK(name == "int4", "format is ", name, ", allowed: fp32, bf16, int8, int4");
  return engine::Format::int4;
}

// A buffer of pack_weight as weight [outputs, inputs of x]
inline engine::PackedWeight packed_weight(const at::Tensor& buffer, c10::string_view format, int64_t outputs, const at::Tensor& x) {
  const engine::Format kind = format_named(format);
  const int64_t inputs = x.size(1);
  check_type(buffer, at::kByte, "packed weight");
  check_shape(buffer, {engine::packed_bytes(kind, outputs, inputs)}, x, "packed weight");
  const auto* data = buffer.const_data_ptr<uint8_t>();
  TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % 64 == 0, "packed weight does not begin at a multiple of 64 bytes");
  return {kind, outputs, inputs, data};
}

// epilogue(x [N, K] weight^T) with panels dealt to threads; x is contiguous and fp32
inline void packed_product(const engine::PackedWeight& weight, const at::Tensor& x, const engine::Epilogue& epilogue) {
  const int64_t rows = x.size(0), inputs = weight.inputs;
  at::Tensor room = at::empty({engine::prepared_bytes(weight.format, rows, inputs)}, x.options().dtype(at::kByte));
  void* prepared = room.mutable_data_ptr();
  at::parallel_for(0, rows, grain(inputs), [&](int64_t begin, int64_t end) {
    GPTFAST_CALL(prepare_product, weight.format, x.const_data_ptr<float>(), inputs, rows, inputs, begin, end, prepared);
  });
  const int64_t work = std::max<int64_t>(1, engine::panel_bytes(weight.format, inputs)) * std::max<int64_t>(1, rows / 8);
  at::parallel_for(0, engine::panels(weight.outputs), std::max<int64_t>(1, (1 << 16) / work), [&](int64_t begin, int64_t end) {
    GPTFAST_CALL(product, weight, prepared, rows, begin, end, epilogue);
  });
}

// An epilogue that writes y [N, M], fp32 and contiguous; bias [M] in fp32 may be undefined
inline engine::Epilogue epilogue_into(at::Tensor& y, const at::Tensor& bias) {
  engine::Epilogue epilogue{};
  epilogue.bias = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  epilogue.y = y.mutable_data_ptr<float>();
  epilogue.y_stride = epilogue.residual_stride = y.size(1);
  return epilogue;
}

// A bias [M] of any float dtype in fp32, or an undefined tensor
inline at::Tensor packed_bias(OptionalTensor bias, int64_t outputs, const at::Tensor& x) {
  if (!has(bias)) return {};
  check_shape(*bias, {outputs}, x, "bias");
  check_float(*bias, "bias");
  return as_type(*bias, at::kFloat);
}

}  // namespace gptfast::cpu
