// What `sample` and `lm_head_sample` take beside logits, checked, and the tensors of their results.
#pragma once

#include <tuple>

#include "check.h"
#include "cpu/sample_kernel.h"

namespace gptfast::cpu {

using Five = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

struct SampleParameters {
  const at::Tensor& temperature;
  OptionalTensor top_k, top_p, min_p, typical_p, repetition, frequency, presence, bias, mask, prompt;
  const std::optional<at::Tensor>& counts;
  const at::Tensor &seed, &position, &choice;
  int64_t top_n;
};

// Fills all of args but the logits for rows of `vocab` ids on the device of `like`; returns token, status, logprob, top_ids, top_logprobs
Five sample_arguments(const SampleParameters& parameters, const at::Tensor& like, int64_t rows, int64_t vocab, Sample& args);

// Draws from logits [B, V] that fit args
void sample_logits(Sample& args, const at::Tensor& logits);

}  // namespace gptfast::cpu
