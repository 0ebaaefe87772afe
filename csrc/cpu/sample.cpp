// sample on the CPU: checks, memory, threads (rows in parallel). The arithmetic is in sample_kernel.h.
#include "cpu/sample.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/tensor.h"

namespace gptfast::cpu {
namespace {

// Checks what is given for some rows of logits
struct Checks {
  const at::Tensor& like;
  int64_t rows, vocab;

  // One number a row, or null where it is absent
  template <typename T>
  const T* numbers(OptionalTensor tensor, at::ScalarType type, const char* name) const {
    if (!has(tensor)) return nullptr;
    check_type(*tensor, type, name);
    check_shape(*tensor, {rows}, like, name);
    return tensor->const_data_ptr<T>();
  }

  const float* floats(OptionalTensor tensor, const char* name) const { return numbers<float>(tensor, at::kFloat, name); }

  const int32_t* bit_words(OptionalTensor tensor, const char* name) const {
    if (!has(tensor)) return nullptr;
    check_type(*tensor, at::kInt, name);
    check_shape(*tensor, {rows, (vocab + 31) / 32}, like, name);
    return tensor->const_data_ptr<int32_t>();
  }

  // [B, V], each row contiguous; returns the elements from row to row
  int64_t row_stride(const at::Tensor& tensor, const char* name) const {
    TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == vocab, name, " has shape ", tensor.sizes(), ", needs [",
                rows, ", ", vocab, "]");
    TORCH_CHECK(vocab == 1 || tensor.stride(1) == 1, name, " has rows that are not contiguous: strides ", tensor.strides());
    return tensor.stride(0);
  }
};

Five sample_cpu(const at::Tensor& logits, const at::Tensor& temperature, OptionalTensor top_k, OptionalTensor top_p,
                OptionalTensor min_p, OptionalTensor typical_p, OptionalTensor repetition, OptionalTensor frequency,
                OptionalTensor presence, OptionalTensor bias, OptionalTensor mask, OptionalTensor prompt,
                const std::optional<at::Tensor>& counts, const at::Tensor& seed, const at::Tensor& position, const at::Tensor& choice,
                int64_t top_n) {
  TORCH_CHECK(logits.dim() == 2, "logits has ", logits.dim(), " dimensions, needs 2: [B, V]");
  check_float(logits, "logits");
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  Sample args{};
  const SampleParameters parameters{temperature, top_k, top_p, min_p, typical_p, repetition, frequency, presence, bias, mask, prompt,
                                    counts, seed, position, choice, top_n};
  const Five results = sample_arguments(parameters, logits, rows, vocab, args);
  sample_logits(args, logits);
  return results;
}

}  // namespace

Five sample_arguments(const SampleParameters& parameters, const at::Tensor& like, int64_t rows, int64_t vocab, Sample& args) {
  const Checks checks{like, rows, vocab};
  const int64_t top_n = parameters.top_n;
  TORCH_CHECK(vocab > 0 && vocab < (int64_t{1} << 31), "logits has ", vocab, " columns, allowed: 1 to 2^31 - 1");
  TORCH_CHECK(top_n >= 0 && top_n <= vocab, "top_n is ", top_n, ", allowed: 0 to ", vocab);
  args.vocab = vocab;
  args.temperature = checks.floats(parameters.temperature, "temperature");
  args.top_k = checks.numbers<int64_t>(parameters.top_k, at::kLong, "top_k");
  args.top_p = checks.floats(parameters.top_p, "top_p");
  args.min_p = checks.floats(parameters.min_p, "min_p");
  args.typical_p = checks.floats(parameters.typical_p, "typical_p");
  args.repetition = checks.floats(parameters.repetition, "repetition");
  args.frequency = checks.floats(parameters.frequency, "frequency");
  args.presence = checks.floats(parameters.presence, "presence");
  if (has(parameters.bias)) {
    check_type(*parameters.bias, at::kFloat, "bias");
    args.bias = parameters.bias->const_data_ptr<float>();
    args.bias_stride = checks.row_stride(*parameters.bias, "bias");
  }
  args.mask = checks.bit_words(parameters.mask, "mask");
  args.prompt = checks.bit_words(parameters.prompt, "prompt");
  if (has(parameters.counts)) {
    check_type(*parameters.counts, at::kInt, "counts");
    args.counts = parameters.counts->mutable_data_ptr<int32_t>();
    args.counts_stride = checks.row_stride(*parameters.counts, "counts");
  }
  args.seed = checks.numbers<int64_t>(parameters.seed, at::kLong, "seed");
  args.position = checks.numbers<int64_t>(parameters.position, at::kLong, "position");
  args.choice = checks.numbers<int64_t>(parameters.choice, at::kLong, "choice");
  args.top_n = top_n;
  const auto option = [&](at::ScalarType type) { return like.options().dtype(type); };
  at::Tensor token = at::empty({rows}, option(at::kLong)), status = at::empty({rows}, option(at::kChar));
  at::Tensor logprob = at::empty({rows}, option(at::kFloat));
  at::Tensor top_ids = at::empty({rows, top_n}, option(at::kLong)), top_logprobs = at::empty({rows, top_n}, option(at::kFloat));
  args.token = token.mutable_data_ptr<int64_t>();
  args.status = status.mutable_data_ptr<int8_t>();
  args.logprob = logprob.mutable_data_ptr<float>();
  args.top_ids = top_ids.mutable_data_ptr<int64_t>();
  args.top_logprobs = top_logprobs.mutable_data_ptr<float>();
  return {token, status, logprob, top_ids, top_logprobs};
}

void sample_logits(Sample& args, const at::Tensor& logits) {
  const int64_t rows = logits.size(0);
  args.type = type_of(logits);
  args.logits = logits.const_data_ptr();
  args.logits_stride = Checks{logits, rows, args.vocab}.row_stride(logits, "logits");
  const int64_t room = sample_room(args.vocab), threads = std::min<int64_t>(std::max<int64_t>(rows, 1), at::get_num_threads());
  at::Tensor scratch = at::empty({threads, room}, logits.options().dtype(at::kFloat));
  float* memory = scratch.mutable_data_ptr<float>();
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    GPTFAST_CALL(sample_rows, args, begin, end, memory + at::get_thread_num() * room);
  });
}

}  // namespace gptfast::cpu

TORCH_LIBRARY_IMPL(gptfast, CPU, m) { m.impl("sample", TORCH_FN(gptfast::cpu::sample_cpu)); }
