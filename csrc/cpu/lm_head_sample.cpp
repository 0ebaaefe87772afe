// lm_head_sample on the CPU: checks, memory, threads. With a packed head tiles of the vocabulary are dealt to threads, which look at the
// logits of a tile while it is in their caches; a plain head is PyTorch's product and the kernel of sample.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "cpu/layer_norm_kernel.h"
#include "cpu/matmul.h"
#include "cpu/packed_tensor.h"
#include "cpu/sample.h"

namespace gptfast::cpu {
namespace {

using engine::PackedWeight;

constexpr int64_t kTilePanels = kSampleTile / engine::kPanel;

at::Tensor floats(int64_t count) { return at::empty({count}, at::kFloat); }

at::Tensor normalised(const at::Tensor& x, OptionalTensor ln_weight, OptionalTensor ln_bias, double eps) {
  check_rows(x, "x");
  check_float(x, "x");
  check_norm_parameters(x, ln_weight, ln_bias);
  const int64_t rows = x.size(0), columns = x.size(1);
  const at::Tensor weight = parameter_or(ln_weight, columns, 1), bias = parameter_or(ln_bias, columns, 0);
  at::Tensor y = at::empty_like(x), statistics = floats(2 * rows);
  LayerNorm args{};
  args.type = type_of(x);
  args.columns = columns;
  args.eps = static_cast<float>(eps);
  args.x = x.const_data_ptr();
  args.weight = weight.const_data_ptr<float>();
  args.bias = bias.const_data_ptr<float>();
  args.y = y.mutable_data_ptr();
  args.mean = statistics.mutable_data_ptr<float>();
  args.rstd = args.mean + rows;
  GPTFAST_CALL(layer_norm_forward, args, 0, rows);
  return y;
}

// x [B, C] in fp32, ready for a product with `head`
at::Tensor prepared_rows(const at::Tensor& x, const PackedWeight& head) {
  const int64_t rows = x.size(0), columns = x.size(1);
  at::Tensor prepared = at::empty({engine::prepared_bytes(head.format, rows, columns)}, x.options().dtype(at::kByte));
  GPTFAST_CALL(prepare_product, head.format, x.const_data_ptr<float>(), columns, rows, columns, 0, rows, prepared.mutable_data_ptr());
  return prepared;
}

void head_and_draws(const PackedWeight& head, const void* x, Sample& args, int64_t rows) {
  const int64_t vocab = args.vocab, stride = sample_row_room(vocab), tile_room = sample_tile_room(vocab), tiles = sample_tiles(vocab);
  const int64_t threads = at::get_num_threads(), work_room = sample_work_room(vocab);
  at::Tensor logits = floats(rows * stride), edited = floats(sample_edits(args) ? rows * stride : 0), kept = floats(rows * tile_room);
  at::Tensor work = floats(std::min(threads, rows) * work_room);
  float* y = logits.mutable_data_ptr<float>();
  args.type = Type::fp32;
  args.logits = y;
  args.logits_stride = stride;
  float *values = sample_edits(args) ? edited.mutable_data_ptr<float>() : y, *stays = kept.mutable_data_ptr<float>();
  const auto memory = [&](int64_t row, float* room) { return SampleMemory{values + row * stride, stays + row * tile_room, room}; };
  const engine::Epilogue epilogue{nullptr, engine::Activation::none, nullptr, 0, y, stride, 0};
  at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t last = std::min((tile + 1) * kTilePanels, engine::panels(vocab));
      GPTFAST_CALL(product, head, x, rows, tile * kTilePanels, last, epilogue);
      for (int64_t row = 0; row < rows; ++row) GPTFAST_CALL(sample_read, args, row, tile, tile + 1, memory(row, nullptr));
    }
  });
  std::vector<SampleWinner> winners(rows * threads);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      for (int64_t row = 0; row < rows; ++row) {
        winners[row * threads + part] =
            GPTFAST_CALL(sample_share, args, row, tiles * part / threads, tiles * (part + 1) / threads, memory(row, nullptr));
      }
    }
  });
  float* rooms = work.mutable_data_ptr<float>();
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float* room = rooms + at::get_thread_num() * work_room;
      GPTFAST_CALL(sample_finish, args, row, memory(row, room), winners.data() + row * threads, threads);
    }
  });
}

Five lm_head_sample_cpu(const at::Tensor& x, OptionalTensor ln_weight, OptionalTensor ln_bias, const at::Tensor& weight, double eps,
                        const at::Tensor& temperature, OptionalTensor top_k, OptionalTensor top_p, OptionalTensor min_p,
                        OptionalTensor typical_p, OptionalTensor repetition, OptionalTensor frequency, OptionalTensor presence,
                        OptionalTensor bias, OptionalTensor mask, OptionalTensor prompt, const std::optional<at::Tensor>& counts,
                        const at::Tensor& seed, const at::Tensor& position, const at::Tensor& choice, int64_t top_n,
                        c10::string_view format, int64_t outputs, int64_t vocab) {
  const at::Tensor normal = normalised(x, ln_weight, ln_bias, eps);
  const bool packed = !format.empty();
  Sample args{};
  const SampleParameters parameters{temperature, top_k, top_p, min_p, typical_p, repetition, frequency, presence, bias, mask, prompt,
                                    counts, seed, position, choice, top_n};
  const Five results = sample_arguments(parameters, x, x.size(0), packed ? vocab : weight.size(0), args);
  if (!packed) {
    sample_logits(args, multiply_with(normal, weight, std::nullopt));
    return results;
  }
  const PackedWeight head = packed_weight(weight, format, outputs, x);
  TORCH_CHECK(vocab <= outputs, "vocab is ", vocab, ", allowed: 1 to ", outputs, ", the rows of weight");
  if (x.size(0) > 0) head_and_draws(head, prepared_rows(as_type(normal, at::kFloat), head).const_data_ptr(), args, x.size(0));
  return results;
}

}  // namespace
}  // namespace gptfast::cpu

TORCH_LIBRARY_IMPL(gptfast, CPU, m) { m.impl("lm_head_sample", TORCH_FN(gptfast::cpu::lm_head_sample_cpu)); }
