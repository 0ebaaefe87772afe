// A whole model that makes tokens: one call for a step of any sequences, or for many tokens of each. No torch here.
#pragma once

#include <atomic>
#include <vector>

#include "cpu/engine/head.h"

namespace gptfast::cpu::engine {

// New tokens of S sequences. Sequence s has lengths[s] of them behind starts[s] in the cache, its pages are row s of `table`. The last
// draws[s] are each followed by a draw; a sequence without new tokens draws from the last new token of the one before it.
struct Request {
  int64_t sequences, total;  // S, and new tokens of all
  const int32_t *tokens, *lengths, *starts, *draws;
  const int32_t* table;      // [S, width]
  int64_t width;
};

class Engine {
 public:
  Engine(Model model, int threads, int64_t pages);

  // One step; whether it was done. It is not where interrupt() came while a sequence has more than one new token: then it ends after
  // the block that it is at, and can be tried again. Throws std::invalid_argument with one line for what does not fit.
  bool step(const Request& request, const Draws& draws);

  // Single-token steps, until `steps` are done, or a sequence drew one of its stop ids or failed, or interrupt(). Every sequence has one
  // new token and one draw; results are [steps, S]. Without sampling, the same token each time. Returns how many were done, at least one.
  int64_t decode(const Request& request, Draws draws, int64_t steps, const std::vector<std::vector<int64_t>>& stops);

  // From any thread and from a signal handler: decode() that runs returns after the token it is at, step() as said there
  void interrupt() { interrupted_.store(true, std::memory_order_relaxed); }

  void copy_page(int64_t from, int64_t to);

  // y [C]: what goes into the first block for this token at this position
  void embed(int64_t token, int64_t position, float* y) const;

  const Model& model() const { return model_; }
  int64_t pages() const { return cache_.pages; }

 private:
  // A pass and the rows of it that draws number first_draw, ... come from
  struct Planned {
    Pass pass;
    int64_t first_draw = 0;
    std::vector<const float*> hidden;
  };

  void check(const Request& request, int64_t steps) const;
  void plan(const Request& request);
  void plan_draws(const Request& request);
  bool advance(const Draws& draws, const std::vector<std::vector<int64_t>>& stops);
  bool run_passes(int thread, const Draws& draws, const std::atomic<bool>* stop);

  const Model model_;
  const Cache cache_;
  Team team_;
  Rows rows_;
  Forward forward_;
  Head head_;
  std::vector<Planned> planned_;
  std::vector<int64_t> positions_;
  std::atomic<bool> interrupted_{false};
};

// While it lives, Ctrl-C also interrupts the engine, before the handler that was there (Python's, which only takes a note); nothing where
// there is no handler
class Interruptible {
 public:
  explicit Interruptible(Engine& engine);
  ~Interruptible();
  Interruptible(const Interruptible&) = delete;
  Interruptible& operator=(const Interruptible&) = delete;

 private:
  bool active_ = false;
};

}  // namespace gptfast::cpu::engine
