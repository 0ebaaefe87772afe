#include "cpu/engine/head.h"

#include <algorithm>
#include <cstring>

namespace gptfast::cpu::engine {
namespace {

constexpr int64_t kTilePanels = kSampleTile / kPanel;

template <typename T>
void advance(T*& pointer, int64_t count) {
  if (pointer != nullptr) pointer += count;
}

// The parameters and results of the rows from `first` on
Sample rows_from(Sample sample, int64_t first) {
  advance(sample.temperature, first);
  advance(sample.top_k, first);
  for (const float** numbers : {&sample.top_p, &sample.min_p, &sample.typical_p, &sample.repetition, &sample.frequency, &sample.presence}) {
    advance(*numbers, first);
  }
  advance(sample.bias, first * sample.bias_stride);
  advance(sample.mask, first * ((sample.vocab + 31) / 32));
  advance(sample.prompt, first * ((sample.vocab + 31) / 32));
  advance(sample.counts, first * sample.counts_stride);
  for (const int64_t** numbers : {&sample.seed, &sample.position, &sample.choice}) advance(*numbers, first);
  advance(sample.token, first);
  advance(sample.status, first);
  advance(sample.logprob, first);
  advance(sample.top_ids, first * sample.top_n);
  advance(sample.top_logprobs, first * sample.top_n);
  return sample;
}

}  // namespace

Head::Head(const Model& model, Team& team, Rows& rows)
    : model_(model),
      team_(team),
      rows_(rows),
      stride_(sample_row_room(model.vocab)),
      tiles_(sample_tiles(model.vocab)),
      tile_room_(sample_tile_room(model.vocab)),
      logits_(kDraws * stride_),
      tile_memory_(kDraws * tile_room_),
      winners_(kDraws * team.size()) {
  for (int thread = 0; thread < team.size(); ++thread) work_.emplace_back(sample_work_room(model.vocab));
}

void Head::prepare(const Draws& draws) {
  if (sample_edits(draws.sample) && edited_.get() == nullptr) edited_ = Buffer<float>(kDraws * stride_);
}

SampleMemory Head::memory(int thread, const Sample& sample, int64_t row) const {
  float* x = sample_edits(sample) ? edited_.get() : logits_.get();
  return {x + row * stride_, tile_memory_.get() + row * tile_room_, work_[thread].get()};
}

void Head::run(int thread, const float* const* hidden, const Draws& draws, int64_t first, int64_t count) {
  for (int64_t done = 0; done < count; done += kDraws) some(thread, hidden + done, draws, first + done, std::min(kDraws, count - done));
}

void Head::some(int thread, const float* const* hidden, const Draws& draws, int64_t first, int64_t count) {
  Sample sample = rows_from(draws.sample, first);
  sample.type = Type::fp32;
  sample.vocab = model_.vocab;
  sample.logits = logits_.get();
  sample.logits_stride = stride_;
  const void* x = rows_.normalised(thread, hidden, count, model_.ln_f_weight, model_.ln_f_bias, model_.head_format);
  const Share share(tiles_, thread, team_.size());
  const Epilogue epilogue{nullptr, Activation::none, nullptr, 0, logits_.get(), stride_, 0};
  for (int64_t tile = share.first; tile < share.end; ++tile) {
    const int64_t end = std::min((tile + 1) * kTilePanels, panels(model_.vocab));
    GPTFAST_CALL(product, model_.head, x, count, tile * kTilePanels, end, epilogue);
    for (int64_t row = 0; draws.sampling && row < count; ++row) {
      GPTFAST_CALL(sample_read, sample, row, tile, tile + 1, memory(thread, sample, row));
    }
  }
  team_.barrier();
  for (int64_t row = thread; draws.logits != nullptr && row < count; row += team_.size()) {
    std::memcpy(draws.logits + (first + row) * model_.vocab, logits_.get() + row * stride_, model_.vocab * sizeof(float));
  }
  if (draws.sampling) finish(thread, sample, draws.targets == nullptr ? nullptr : draws.targets + first, count);
  team_.barrier();
}

void Head::finish(int thread, const Sample& sample, const int64_t* targets, int64_t count) {
  const int threads = team_.size();
  if (targets != nullptr) {
    for (int64_t row = thread; row < count; row += threads) {
      GPTFAST_CALL(sample_target, sample, row, memory(thread, sample, row), targets[row]);
    }
    return;
  }
  const Share share(tiles_, thread, threads);
  for (int64_t row = 0; row < count; ++row) {
    winners_[row * threads + thread] =
        GPTFAST_CALL(sample_share, sample, row, share.first, share.end, memory(thread, sample, row));
  }
  team_.barrier();
  for (int64_t row = thread; row < count; row += threads) {
    GPTFAST_CALL(sample_finish, sample, row, memory(thread, sample, row), winners_.data() + row * threads, threads);
  }
}

}  // namespace gptfast::cpu::engine
