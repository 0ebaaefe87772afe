// The blocks, for some rows of any sequences: the same steps for every thread of a team, which meets four times a block.
#pragma once

#include <atomic>
#include <vector>

#include "cpu/engine/model.h"
#include "cpu/engine/team.h"

namespace gptfast::cpu::engine {

constexpr int64_t kRows = 512;     // most rows of a pass
constexpr int64_t kTogether = 4;   // up to so many rows every thread normalises all for itself, which takes less time than to meet

// `count` tokens of one sequence behind `start` that are in the cache
struct Piece {
  int64_t row, count, start;
  const int32_t* table;  // the sequence's pages
};

struct Pass {
  int64_t rows = 0;
  std::vector<Piece> pieces;
  std::vector<int32_t> tokens, positions;  // one a row
};

// Activations on their way from step to step: [rows, ...] that all threads share, and what each has for itself
class Rows {
 public:
  Rows(const Model& model, Team& team);

  // x [rows, columns] normalised and made ready for a product: by each thread for itself, or by all together with a barrier
  const void* normalised(int thread, const float* const* x, int64_t rows, const float* weight, const float* bias, Format format);
  // x [rows, columns] made ready for a product in the same way
  const void* prepared(int thread, const float* x, int64_t rows, int64_t columns, Format format);

 private:
  struct Mine {
    Buffer<float> normal;      // [kTogether, C]
    Buffer<float> statistics;  // mean and rstd of a row
    Buffer<uint8_t> prepared;  // kTogether rows
  };

  const Model& model_;
  Team& team_;
  std::vector<Mine> mine_;
  Buffer<float> normal_;
  Buffer<uint8_t> prepared_;
};

class Forward {
 public:
  Forward(const Model& model, const Cache& cache, Team& team, Rows& rows);

  // Called by every thread of the team; the last hidden states are in hidden() when it returns true. Where `stop` is given and becomes
  // true it returns false, to all threads, after the block that it is at.
  bool run(int thread, const Pass& pass, const std::atomic<bool>* stop);

  const float* hidden(int64_t row) const { return residual_.get() + row * model_.width; }

 private:
  void project(int thread, const Block& block, const void* x, int64_t rows);
  void attend(int thread, int64_t index, const Pass& pass);
  void append(int64_t index, const Piece& piece, const Share& heads) const;
  void multiply(int thread, const PackedWeight& weight, const void* x, int64_t rows, Epilogue epilogue) const;

  const Model& model_;
  const Cache& cache_;
  Team& team_;
  Rows& rows_;
  const bool own_heads_;  // whether each thread computes the queries, keys and values of the heads that it attends
  Buffer<float> residual_, qkv_, attended_, inner_;
  std::vector<Buffer<float>> scratch_;  // of each thread, for attention
  Buffer<const float*> residual_rows_;
  bool stopped_ = false;  // written by the first thread before a barrier, read by all behind it
};

}  // namespace gptfast::cpu::engine
