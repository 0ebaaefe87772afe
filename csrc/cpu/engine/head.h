// The end of a pass: the last layer normalisation, the head's product and a draw, for the rows that ask for one. Each thread takes tiles
// of 512 ids, and looks at a tile's logits while they are in its caches: what the draw needs to know of them, their largest and the sum
// of their exponentials included, is then there without another pass over the vocabulary.
#pragma once

#include <vector>

#include "cpu/engine/forward.h"
#include "cpu/sample_kernel.h"

namespace gptfast::cpu::engine {

constexpr int64_t kDraws = 64;  // rows whose logits are there at a time

// What is wanted of R rows, in their order
struct Draws {
  bool sampling = true;              // else the logits alone
  Sample sample{};                   // parameters and results [R]; its logits and their stride are the head's business
  const int64_t* targets = nullptr;  // [R]: their log-probabilities instead of a draw
  float* logits = nullptr;           // [R, V]: a copy of the logits, or null
};

class Head {
 public:
  Head(const Model& model, Team& team, Rows& rows);

  // Called before the team runs, where masks, bias or penalties change logits: these need memory
  void prepare(const Draws& draws);

  // Called by every thread: hidden[i] is the row for draw first + i, count of them; results are there when it returns
  void run(int thread, const float* const* hidden, const Draws& draws, int64_t first, int64_t count);

 private:
  void some(int thread, const float* const* hidden, const Draws& draws, int64_t first, int64_t count);
  void finish(int thread, const Sample& sample, const int64_t* targets, int64_t count);
  SampleMemory memory(int thread, const Sample& sample, int64_t row) const;

  const Model& model_;
  Team& team_;
  Rows& rows_;
  const int64_t stride_, tiles_, tile_room_;
  Buffer<float> logits_, edited_, tile_memory_;  // [kDraws, ...]
  std::vector<Buffer<float>> work_;              // of each thread
  std::vector<SampleWinner> winners_;            // [kDraws, threads]
};

}  // namespace gptfast::cpu::engine
