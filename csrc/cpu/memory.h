// Memory that lives across training steps. A step allocates the same gigabytes as the one before it; the system's allocator gives large
// pieces back at once, so every step would fault each page in again and have the kernel clear it. While a StepMemory is entered, tensors
// of this thread that are larger than kSmallest come from one region that keeps its pages, in huge pages where the kernel has them.
#pragma once

#include <cstddef>
#include <memory>

namespace gptfast::cpu {

class Arena;

class StepMemory {
 public:
  StepMemory();
  void enter();  // for the calling thread, until leave(); not nested
  void leave();
  size_t bytes_held() const;  // what the region has grown to; it stays resident until this object and its tensors are gone

 private:
  std::shared_ptr<Arena> arena_;
};

}  // namespace gptfast::cpu
