#include "cpu/read_bandwidth.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <new>
#include <stdexcept>
#include <thread>

#include "cpu/read_bandwidth_kernel.h"

namespace gptfast::cpu {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr int64_t kChunk = int64_t{1} << 20;

struct Way {
  ReadPattern pattern;
  bool dealt;  // threads take chunks as they get done with others, so that a disturbed thread does not hold up the rest
};

const std::vector<Way>& ways() {
  static const std::vector<Way> all = [] {
    std::vector<ReadPattern> patterns;
    for (const auto [streams, lines] : {std::pair{1, 4}, {1, 8}, {1, 16}, {2, 8}, {4, 4}, {4, 8}, {8, 2}}) {
      patterns.push_back({streams, lines, Prefetch::none, 0});
    }
    for (const int ahead : {512, 1024, 2048, 4096}) patterns.push_back({1, 8, Prefetch::near, ahead});
    for (const int ahead : {1024, 4096}) patterns.push_back({1, 8, Prefetch::once, ahead});
    for (const int ahead : {1024, 2048}) patterns.push_back({4, 4, Prefetch::near, ahead});
    std::vector<Way> found;
    for (const bool dealt : {false, true}) {
      for (const auto& pattern : patterns) found.push_back({pattern, dealt});
    }
    return found;
  }();
  return all;
}

std::string name(const Way& way) {
  static const char* prefetch[] = {"", " prefetch ", " prefetch once "};
  const ReadPattern& p = way.pattern;
  std::string text = std::to_string(p.streams) + " x " + std::to_string(p.lines) + prefetch[static_cast<int>(p.prefetch)];
  if (p.ahead > 0) text += std::to_string(p.ahead);
  return text + (way.dealt ? ", dealt" : "");
}

std::atomic<uint64_t> seen{0};  // what was read has to go somewhere, or a compiler need not read it

}  // namespace

MemoryReader::MemoryReader(int64_t bytes, int threads, bool huge_pages) : threads_(std::max(threads, 1)) {
  size_ = (static_cast<size_t>(std::max<int64_t>(bytes, 1)) + kHugePage - 1) / kHugePage * kHugePage;
  void* place = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (place == MAP_FAILED) throw std::bad_alloc();
  madvise(place, size_, huge_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  data_ = static_cast<uint8_t*>(place);
  const size_t part = size_ / threads_;
  together([&](int thread) {  // each page by a thread that will read it, and none the system's page of zeros
    const size_t end = thread + 1 == threads_ ? size_ : part * (thread + 1);
    for (size_t i = part * thread; i < end; ++i) data_[i] = static_cast<uint8_t>(i * 131 >> 7);
  });
}

MemoryReader::~MemoryReader() { munmap(data_, size_); }

std::vector<std::string> MemoryReader::patterns() {
  std::vector<std::string> names;
  for (const Way& way : ways()) names.push_back(name(way));
  return names;
}

template <typename Work>
double MemoryReader::together(Work work) {
  std::atomic<int> waiting{0};
  std::atomic<bool> go{false};
  std::vector<std::thread> helpers;
  for (int thread = 1; thread < threads_; ++thread) {
    helpers.emplace_back([&, thread] {
      waiting.fetch_add(1);
      while (!go.load(std::memory_order_acquire)) std::this_thread::yield();
      work(thread);
    });
  }
  while (waiting.load() < threads_ - 1) std::this_thread::yield();
  const auto start = std::chrono::steady_clock::now();
  go.store(true, std::memory_order_release);
  work(0);
  for (auto& helper : helpers) helper.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double MemoryReader::read(int pattern, int times) {
  const Way& way = ways().at(static_cast<size_t>(pattern));
  const int64_t size = bytes();
  const int64_t part = size / threads_ / kChunk * kChunk;
  const int64_t chunks = size / kChunk;
  std::atomic<int64_t> next{0};
  return together([&](int thread) {
    uint64_t value = 0;
    if (way.dealt) {
      for (int64_t chunk = next.fetch_add(1); chunk < chunks * times; chunk = next.fetch_add(1)) {
        value += GPTFAST_CALL(read_memory, way.pattern, data_ + chunk % chunks * kChunk, kChunk);
      }
    } else {
      const int64_t end = thread + 1 == threads_ ? size : part * (thread + 1);
      for (int i = 0; i < times; ++i) value += GPTFAST_CALL(read_memory, way.pattern, data_ + part * thread, end - part * thread);
    }
    seen.fetch_xor(value);
  });
}

}  // namespace gptfast::cpu
