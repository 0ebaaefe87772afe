// pack_weight on the CPU: checks, memory, threads. The layout is in engine/product.h, the arithmetic in engine/pack_kernel.h.
#include <torch/library.h>

#include "cpu/packed_tensor.h"

namespace gptfast::cpu {
namespace {

at::Tensor pack_weight_cpu(const at::Tensor& weight, c10::string_view format) {
  const engine::Format kind = format_named(format);
  check_type(weight, at::kFloat, "weight");
  TORCH_CHECK(weight.dim() == 2, "weight has ", weight.dim(), " dimensions, needs 2: [M, K]");
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  // read once a token, from memory: with pages of 4 KiB that is much slower
  const auto bytes = weight.options().dtype(at::kByte);
  at::Tensor packed = empty_large({engine::packed_bytes(kind, outputs, inputs)}, bytes, 4 << 20);
  const float* from = weight.const_data_ptr<float>();
  uint8_t* to = packed.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, engine::panels(outputs), 1, [&](int64_t begin, int64_t end) {
    GPTFAST_CALL(pack_panels, kind, from, weight.stride(0), weight.stride(1), outputs, inputs, begin, end, to);
  });
  return packed;
}

}  // namespace
}  // namespace gptfast::cpu

TORCH_LIBRARY_IMPL(gptfast, CPU, m) { m.impl("pack_weight", TORCH_FN(gptfast::cpu::pack_weight_cpu)); }
