#include "cpu/engine/team.h"

#include <sched.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace gptfast::cpu::engine {
namespace {

constexpr int kSpins = 4096;  // some 60 microseconds: longer than the threads of a token drift apart

void relax() {
#if defined(__SSE2__)
  _mm_pause();
#endif
}

int usable_cores() {
  cpu_set_t cores;
  return sched_getaffinity(0, sizeof(cores), &cores) == 0 ? CPU_COUNT(&cores) : 1;
}

}  // namespace

Team::Team(int threads) : threads_(threads), spins_(usable_cores() < threads ? 0 : kSpins) {
  for (int thread = 1; thread < threads; ++thread) workers_.emplace_back([this, thread] { serve(thread); });
}

Team::~Team() {
  ending_ = true;
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Team::run(const std::function<void(int)>& task) {
  task_ = &task;
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  task(0);
  barrier();
}

void Team::serve(int thread) {
  for (uint32_t seen = 0;; ++seen) {
    for (int spin = 0; spin < spins_ && epoch_.load(std::memory_order_acquire) == seen; ++spin) relax();
    epoch_.wait(seen, std::memory_order_acquire);
    if (ending_) return;
    (*task_)(thread);
    barrier();
  }
}

void Team::barrier() {
  if (threads_ == 1) return;
  const uint32_t generation = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    return;
  }
  for (int spin = 0; generation_.load(std::memory_order_acquire) == generation; ++spin) {
    spin < spins_ ? relax() : static_cast<void>(sched_yield());
  }
}

}  // namespace gptfast::cpu::engine
