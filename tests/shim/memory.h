// What kernels may touch, and what their shared memory holds. Part of shim.cpp's machinery; nothing here is seen by a kernel.
#pragma once

#include <cstddef>
#include <cstdint>

namespace shim {

constexpr unsigned kStaticLimit = 48 << 10, kDynamicLimit = 227 << 10;

struct Range {
  uintptr_t begin, end;
  bool writable;

  bool holds(uintptr_t address, size_t bytes) const { return address >= begin && address + bytes <= end; }
};

extern bool executing;                // a kernel's thread runs; what launchers and the shim do is not checked
extern Range stacks, launcher_stack;  // of the fibers; the frames that hold the kernel's arguments

// Finds this library's shared memory; false if there is none
bool find_shared();
// Fills shared memory with NaN, `dynamic_bytes` of the dynamic part and a guard behind them
void poison_shared(size_t dynamic_bytes);
bool guard_untouched(size_t dynamic_bytes);
// Stops the launch unless the bytes belong to a buffer, to shared memory, to a stack or to the library's own constants
void check_access(const void* address, size_t bytes, bool write);

}  // namespace shim
