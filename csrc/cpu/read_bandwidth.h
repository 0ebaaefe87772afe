// The highest rate at which this machine's memory can be read: several ways of reading one large buffer, for gptfast/benchmark.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace gptfast::cpu {

class MemoryReader {
 public:
  // Takes and fills the memory; huge pages are a wish. Throws std::bad_alloc where there is none.
  MemoryReader(int64_t bytes, int threads, bool huge_pages);
  ~MemoryReader();
  MemoryReader(const MemoryReader&) = delete;
  MemoryReader& operator=(const MemoryReader&) = delete;

  static std::vector<std::string> patterns();
  double read(int pattern, int times);  // seconds of `times` passes over bytes(); throws std::out_of_range
  int64_t bytes() const { return static_cast<int64_t>(size_); }

 private:
  template <typename Work>
  double together(Work work);  // seconds from when all threads were there until the last was done

  uint8_t* data_;
  size_t size_;
  int threads_;
};

}  // namespace gptfast::cpu
