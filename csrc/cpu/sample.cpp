// sample on the CPU: checks, memory, threads (rows in parallel). The arithmetic is in sample_kernel.h.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "check.h"
#include "cpu/sample_kernel.h"
#include "cpu/tensor.h"

namespace gptfast::cpu {
namespace {

using Five = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// One number a row, or null where it is absent
template <typename T>
const T* numbers(OptionalTensor tensor, const at::Tensor& logits, at::ScalarType type, const char* name) {
  if (!has(tensor)) return nullptr;
  check_type(*tensor, type, name);
  check_shape(*tensor, {logits.size(0)}, logits, name);
  return tensor->const_data_ptr<T>();
}

const float* floats(OptionalTensor tensor, const at::Tensor& logits, const char* name) {
  return numbers<float>(tensor, logits, at::kFloat, name);
}

const int32_t* bit_words(OptionalTensor tensor, const at::Tensor& logits, const char* name) {
  if (!has(tensor)) return nullptr;
  check_type(*tensor, at::kInt, name);
  check_shape(*tensor, {logits.size(0), (logits.size(1) + 31) / 32}, logits, name);
  return tensor->const_data_ptr<int32_t>();
}

// [B, V], each row contiguous; returns the elements from row to row
int64_t row_stride(const at::Tensor& tensor, const at::Tensor& logits, const char* name) {
  TORCH_CHECK(tensor.dim() == 2 && tensor.sizes() == logits.sizes(), name, " has shape ", tensor.sizes(), ", needs ", logits.sizes());
  TORCH_CHECK(tensor.size(1) == 1 || tensor.stride(1) == 1, name, " has rows that are not contiguous: strides ", tensor.strides());
  return tensor.stride(0);
}

Five sample_cpu(const at::Tensor& logits, const at::Tensor& temperature, OptionalTensor top_k, OptionalTensor top_p,
                OptionalTensor min_p, OptionalTensor typical_p, OptionalTensor repetition, OptionalTensor frequency,
                OptionalTensor presence, OptionalTensor bias, OptionalTensor mask, OptionalTensor prompt,
                const std::optional<at::Tensor>& counts, const at::Tensor& seed, const at::Tensor& position, const at::Tensor& choice,
                int64_t top_n) {
  TORCH_CHECK(logits.dim() == 2, "logits has ", logits.dim(), " dimensions, needs 2: [B, V]");
  check_float(logits, "logits");
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  TORCH_CHECK(vocab > 0 && vocab < (int64_t{1} << 31), "logits has ", vocab, " columns, allowed: 1 to 2^31 - 1");
  TORCH_CHECK(top_n >= 0 && top_n <= vocab, "top_n is ", top_n, ", allowed: 0 to ", vocab);
  Sample args{};
  args.type = type_of(logits);
  args.vocab = vocab;
  args.logits = logits.const_data_ptr();
  args.logits_stride = row_stride(logits, logits, "logits");
  args.temperature = floats(temperature, logits, "temperature");
  args.top_k = numbers<int64_t>(top_k, logits, at::kLong, "top_k");
  args.top_p = floats(top_p, logits, "top_p");
  args.min_p = floats(min_p, logits, "min_p");
  args.typical_p = floats(typical_p, logits, "typical_p");
  args.repetition = floats(repetition, logits, "repetition");
  args.frequency = floats(frequency, logits, "frequency");
  args.presence = floats(presence, logits, "presence");
  if (has(bias)) {
    check_type(*bias, at::kFloat, "bias");
    args.bias = bias->const_data_ptr<float>();
    args.bias_stride = row_stride(*bias, logits, "bias");
  }
  args.mask = bit_words(mask, logits, "mask");
  args.prompt = bit_words(prompt, logits, "prompt");
  if (has(counts)) {
    check_type(*counts, at::kInt, "counts");
    args.counts = counts->mutable_data_ptr<int32_t>();
    args.counts_stride = row_stride(*counts, logits, "counts");
  }
  args.seed = numbers<int64_t>(seed, logits, at::kLong, "seed");
  args.position = numbers<int64_t>(position, logits, at::kLong, "position");
  args.choice = numbers<int64_t>(choice, logits, at::kLong, "choice");
  args.top_n = top_n;
  const auto option = [&](at::ScalarType type) { return logits.options().dtype(type); };
  at::Tensor token = at::empty({rows}, option(at::kLong)), status = at::empty({rows}, option(at::kChar));
  at::Tensor logprob = at::empty({rows}, option(at::kFloat));
  at::Tensor top_ids = at::empty({rows, top_n}, option(at::kLong)), top_logprobs = at::empty({rows, top_n}, option(at::kFloat));
  args.token = token.mutable_data_ptr<int64_t>();
  args.status = status.mutable_data_ptr<int8_t>();
  args.logprob = logprob.mutable_data_ptr<float>();
  args.top_ids = top_ids.mutable_data_ptr<int64_t>();
  args.top_logprobs = top_logprobs.mutable_data_ptr<float>();
  const int64_t room = sample_room(vocab), threads = std::min<int64_t>(std::max<int64_t>(rows, 1), at::get_num_threads());
  at::Tensor scratch = at::empty({threads, room}, option(at::kFloat));
  float* memory = scratch.mutable_data_ptr<float>();
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    GPTFAST_CALL(sample_rows, args, begin, end, memory + at::get_thread_num() * room);
  });
  return {token, status, logprob, top_ids, top_logprobs};
}

}  // namespace
}  // namespace gptfast::cpu

TORCH_LIBRARY_IMPL(gptfast, CPU, m) { m.impl("sample", TORCH_FN(gptfast::cpu::sample_cpu)); }
