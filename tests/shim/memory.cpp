// Shared memory, which is this library's thread-local segment, and the checks of every access that a kernel makes.
#include "memory.h"

#include <link.h>

#include <algorithm>
#include <vector>

#include "cuda_runtime.h"

constexpr unsigned kGuard = 1024;
// `extern __shared__ __align__(1024) unsigned char dynamic_shared[];` in a kernel; the guard behind it must stay untouched
alignas(1024) thread_local unsigned char dynamic_shared[shim::kDynamicLimit + kGuard];

namespace shim {

bool executing = false;
Range stacks, launcher_stack;

namespace {

std::vector<Range> buffers;  // global memory that the kernels were given; unless there is some, nothing is checked
Range shared, library;

int find_segments(dl_phdr_info* info, size_t, void*) {
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    if (info->dlpi_phdr[i].p_type != PT_TLS || info->dlpi_tls_data == nullptr) continue;
    const auto start = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
    shared = {start, start + info->dlpi_phdr[i].p_memsz, true};
    if (!shared.holds(reinterpret_cast<uintptr_t>(dynamic_shared), sizeof dynamic_shared)) continue;
    library = {UINTPTR_MAX, 0, true};
    for (int j = 0; j < info->dlpi_phnum; ++j) {
      const auto& segment = info->dlpi_phdr[j];
      if (segment.p_type != PT_LOAD) continue;
      library.begin = std::min(library.begin, static_cast<uintptr_t>(info->dlpi_addr + segment.p_vaddr));
      library.end = std::max(library.end, static_cast<uintptr_t>(info->dlpi_addr + segment.p_vaddr + segment.p_memsz));
    }
    return 1;
  }
  return 0;
}

void poison(unsigned char* from, unsigned char* to) { std::memset(from, 0xff, to - from); }

}  // namespace

bool find_shared() {
  *static_cast<volatile unsigned char*>(dynamic_shared) = 0xff;  // the segment exists from its first use on
  return dl_iterate_phdr(find_segments, nullptr) == 1;
}

void poison_shared(size_t dynamic_bytes) {
  poison(reinterpret_cast<unsigned char*>(shared.begin), dynamic_shared);
  poison(dynamic_shared, dynamic_shared + dynamic_bytes + kGuard);
  poison(dynamic_shared + sizeof dynamic_shared, reinterpret_cast<unsigned char*>(shared.end));
}

bool guard_untouched(size_t dynamic_bytes) {
  const unsigned char* guard = dynamic_shared + dynamic_bytes;
  return std::all_of(guard, guard + kGuard, [](unsigned char byte) { return byte == 0xff; });
}

void check_access(const void* where, size_t bytes, bool write) {
  const auto address = reinterpret_cast<uintptr_t>(where);
  if (!executing || buffers.empty() || stacks.holds(address, bytes) || shared.holds(address, bytes)) return;
  if (library.holds(address, bytes) || launcher_stack.holds(address, bytes)) return;
  for (const Range& buffer : buffers) {
    if (buffer.holds(address, bytes) && (buffer.writable || !write)) return;
  }
  fail("%s of %zu bytes at %p is outside every buffer", write ? "a write" : "a read", bytes, where);
}

}  // namespace shim

extern "C" {

// From now on kernels may touch these bytes, and no global memory but what was allowed; null: forget all of it
void shim_allow(void* start, uint64_t bytes, int writable) {
  const auto begin = reinterpret_cast<uintptr_t>(start);
  if (start == nullptr) {
    shim::buffers.clear();
  } else {
    shim::buffers.push_back({begin, begin + bytes, writable != 0});
  }
}

// What kernels call because of -fsanitize=kernel-address,alignment,bounds. The checks are here: no sanitizer library is linked.
#define SHIM_ACCESS(bytes)                                                                            \
  void __asan_load##bytes##_noabort(void* address) { shim::check_access(address, bytes, false); } \
  void __asan_store##bytes##_noabort(void* address) { shim::check_access(address, bytes, true); }
SHIM_ACCESS(1)
SHIM_ACCESS(2)
SHIM_ACCESS(4)
SHIM_ACCESS(8)
SHIM_ACCESS(16)
void __asan_loadN_noabort(void* address, size_t bytes) { shim::check_access(address, bytes, false); }
void __asan_storeN_noabort(void* address, size_t bytes) { shim::check_access(address, bytes, true); }
void __asan_handle_no_return() {}

struct Place {
  const char* file;
  uint32_t line, column;
};

void __ubsan_handle_type_mismatch_v1(Place* place, void* address) {
  shim::fail("misaligned access to %p at %s:%u", address, place->file, place->line);
}

void __ubsan_handle_out_of_bounds(Place* place, void* index) {
  const auto value = static_cast<long long>(reinterpret_cast<intptr_t>(index));
  shim::fail("index %lld outside its array at %s:%u", value, place->file, place->line);
}
}
