// A team of threads that lives as long as its owner and meets at a barrier many times a token: the barrier spins for a while, then lets
// others run, so that a machine with fewer free cores than threads only gets slower.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace gptfast::cpu::engine {

class Team {
 public:
  explicit Team(int threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return threads_; }

  // task(0) on the calling thread, task(1), ... on the others; returns when all are done. The task does not throw.
  void run(const std::function<void(int)>& task);

  // For a running task: returns when all threads have called it; what they wrote before is then visible to all
  void barrier();

 private:
  void serve(int thread);

  const int threads_;
  int spins_;  // looks at a variable before the processor is left to others
  std::vector<std::thread> workers_;
  const std::function<void(int)>* task_ = nullptr;
  bool ending_ = false;
  alignas(64) std::atomic<uint32_t> epoch_{0};       // counts tasks; workers sleep on it
  alignas(64) std::atomic<int> arrived_{0};          // at the barrier
  alignas(64) std::atomic<uint32_t> generation_{0};  // counts barriers
};

// The part of `count` items that a thread takes: [first, end)
struct Share {
  int64_t first, end;

  Share(int64_t count, int thread, int threads) : first(count * thread / threads), end(count * (thread + 1) / threads) {}
};

}  // namespace gptfast::cpu::engine
