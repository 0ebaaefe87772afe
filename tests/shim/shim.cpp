// Executes kernels on the CPU. A block's threads are fibers; one runs until it waits at a barrier or a warp collective, then the
// next ready one in the chosen order. Forward and reverse let one end of the block run ahead as far as it can, the seeded random
// order mixes blocks and threads. Before each block its shared memory is NaN. Asynchronous copies land when their thread waits for
// them, and until then the target is NaN. Whatever CUDA leaves undefined and this can see (a collective that some lanes never
// reach, a misaligned vector, an access outside the buffers it was told of) stops the launch with a message.
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <deque>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "cuda/ptx.cuh"
#include "memory.h"

constexpr unsigned kMaxThreads = 1024, kMaxBytes = 64;
constexpr size_t kStack = (64 << 10) + 832;  // not a power of two: the tops of all stacks would share a few cache lines

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace {

enum class Order { forward, reverse, random };
enum class State { ready, barrier, warp, done };

struct Copy {
  void* to;
  const void* from;
  unsigned bytes, valid;
};

struct Fiber {
  void* stack_pointer;
  uint3 index;
  State state;
  unsigned mask, bytes;  // of the collective it waits at
  const char* name;
  alignas(16) unsigned char mine[kMaxBytes], lanes[32 * kMaxBytes];
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

Order order = Order::forward;
std::mt19937_64 random_bits;
Fiber fibers[kMaxThreads];
unsigned threads, warps_ready, ready[32], meeting[32];  // bits: warps with a ready fiber; by warp, fibers ready, or at a collective
Fiber* running;
void* scheduler;
const std::function<void()>* body;
std::string error;
std::map<const void*, int> dynamic_allowed;
uint64_t first_block = 0;

extern "C" void shim_switch(void** save, void* load);
// Saves what the System V ABI asks a function to keep, and returns on another stack
asm(R"(
.text
.type shim_switch, @function
shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

unsigned number(const Fiber& fiber) { return static_cast<unsigned>(&fiber - fibers); }

void set_state(Fiber& fiber, State state) {
  fiber.state = state;
  const unsigned bit = 1u << number(fiber) % 32, word = number(fiber) / 32;
  ready[word] = state == State::ready ? ready[word] | bit : ready[word] & ~bit;
  warps_ready = ready[word] ? warps_ready | 1u << word : warps_ready & ~(1u << word);
  meeting[word] = state == State::warp ? meeting[word] | bit : meeting[word] & ~bit;
}

void leave(State state) {
  set_state(*running, state);
  shim_switch(&running->stack_pointer, scheduler);
}

void run_fiber() {
  (*body)();
  leave(State::done);
  __builtin_unreachable();
}

void prepare(Fiber& fiber) {
  const unsigned i = number(fiber);
  fiber.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
  fiber.groups.clear();
  fiber.open.clear();
  set_state(fiber, State::ready);
  auto** top = reinterpret_cast<void**>(shim::stacks.begin + (i + 1) * kStack);
  top[-2] = reinterpret_cast<void*>(&run_fiber);  // a return address 16 bytes below the top: the alignment that a call leaves
  fiber.stack_pointer = top - 8;                  // and six registers below it
}

// A set bit of a word that has one: the lowest, the highest, or the first from a random place on
unsigned pick(unsigned word) {
  if (order == Order::forward) return __builtin_ctz(word);
  if (order == Order::reverse) return 31 - __builtin_clz(word);
  const unsigned turn = random_bits() % 32, turned = word >> turn | word << (32 - turn) % 32;
  return (__builtin_ctz(turned) + turn) % 32;
}

// The fiber to run next, or null if all wait
Fiber* next() {
  if (warps_ready == 0) return nullptr;
  const unsigned warp = pick(warps_ready);
  return &fibers[warp * 32 + pick(ready[warp])];
}

// Runs the block `blockIdx`; the reason in `error` where it cannot be finished
void run_block(size_t dynamic_bytes) {
  shim::poison_shared(dynamic_bytes);
  warps_ready = 0;
  std::fill(std::begin(ready), std::end(ready), 0u);
  std::fill(std::begin(meeting), std::end(meeting), 0u);
  for (unsigned i = 0; i < threads; ++i) prepare(fibers[i]);
  while (error.empty()) {
    if (Fiber* fiber = next()) {
      running = fiber;
      threadIdx = fiber->index;
      shim::executing = true;
      shim_switch(&scheduler, fiber->stack_pointer);
      shim::executing = false;
      continue;
    }
    Fiber *const begin = fibers, *const end = begin + threads;
    const auto lost = std::find_if(begin, end, [](const Fiber& f) { return f.state == State::warp; });
    if (lost != end) {
      char text[200];
      const char* format = "deadlock: thread %u waits at %s for lanes %#x, which never come";
      std::snprintf(text, sizeof text, format, number(*lost), lost->name, lost->mask);
      error = text;
    }
    bool released = false;
    for (Fiber* fiber = begin; fiber != end; ++fiber) {
      if (fiber->state != State::barrier) continue;
      set_state(*fiber, State::ready);
      released = true;
    }
    if (!released) break;
  }
  if (error.empty() && !shim::guard_untouched(dynamic_bytes)) error = "a write past the end of dynamic shared memory";
}

const char* refusal(const cudaLaunchConfig_t& config, const void* kernel) {
  const dim3 g = config.gridDim, b = config.blockDim;
  const uint64_t size = uint64_t{b.x} * b.y * b.z;
  if (size == 0 || size > kMaxThreads || b.z > 64) return "invalid block: 1 to 1024 threads, z at most 64";
  if (b.x % 32 != 0) return "invalid block for the shim: x must be a multiple of 32";
  if (g.x == 0 || g.y == 0 || g.z == 0 || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535) return "invalid grid";
  if (config.numAttrs != 0) return "launch attributes are not base form";
  const auto allowed = dynamic_allowed.find(kernel);
  if (config.dynamicSmemBytes > shim::kDynamicLimit) return "more than 227 KiB of shared memory";
  if (config.dynamicSmemBytes > (allowed == dynamic_allowed.end() ? shim::kStaticLimit : static_cast<unsigned>(allowed->second))) {
    return "dynamic shared memory beyond 48 KiB needs cudaFuncSetAttribute";
  }
  return nullptr;
}

}  // namespace

void shim::fail(const char* format, ...) {
  char text[300];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  char where[100];
  const uint3 b = blockIdx, t = threadIdx;
  std::snprintf(where, sizeof where, "block (%u, %u, %u), thread (%u, %u, %u): ", b.x, b.y, b.z, t.x, t.y, t.z);
  error = std::string(where) + text;
  leave(State::done);
  __builtin_unreachable();
}

const void* shim::meet(unsigned mask, const void* mine, unsigned bytes, const char* name) {
  Fiber& me = *running;
  const unsigned warp = number(me) / 32 * 32, lane = number(me) % 32;
  if (bytes > kMaxBytes) fail("%s of %u bytes, the shim's limit is %u", name, bytes, kMaxBytes);
  if ((mask >> lane & 1) == 0) fail("%s by lane %u, which is not in its mask %#x", name, lane, mask);
  me.mask = mask;
  me.bytes = bytes;
  me.name = name;
  std::memcpy(me.mine, mine, bytes);
  set_state(me, State::warp);
  bool complete = (meeting[warp / 32] & mask) == mask;
  for (unsigned i = 0; i < 32 && complete; ++i) {
    const Fiber& other = fibers[warp + i];
    complete = (mask >> i & 1) == 0 || (other.mask == mask && other.bytes == bytes && std::strcmp(other.name, name) == 0);
  }
  if (!complete) {
    leave(State::warp);
    return me.lanes;
  }
  unsigned char lanes[32 * kMaxBytes];
  std::memset(lanes, 0xff, 32 * bytes);
  for (unsigned i = 0; i < 32; ++i) {
    if (mask >> i & 1) std::memcpy(lanes + i * bytes, fibers[warp + i].mine, bytes);
  }
  for (unsigned i = 0; i < 32; ++i) {
    if ((mask >> i & 1) == 0) continue;
    std::memcpy(fibers[warp + i].lanes, lanes, 32 * bytes);
    set_state(fibers[warp + i], State::ready);
  }
  leave(State::ready);
  return me.lanes;
}

void __syncthreads() { leave(State::barrier); }

namespace gptfast::ptx::host {

const void* exchange(const void* mine, unsigned bytes, const char* name) { return shim::meet(0xffffffffu, mine, bytes, name); }

void copy_later(void* to, const void* from, unsigned bytes, unsigned valid) {
  if (valid > bytes) shim::fail("cp.async of %u bytes with %u valid", bytes, valid);
  shim::check_access(to, bytes, true);
  shim::check_access(from, valid, false);
  std::memset(to, 0xff, bytes);
  running->open.push_back({to, from, bytes, valid});
}

void commit() {
  running->groups.push_back(std::move(running->open));
  running->open.clear();
}

void wait(unsigned groups_left) {
  while (running->groups.size() > groups_left) {
    for (const Copy& copy : running->groups.front()) {
      std::memset(copy.to, 0, copy.bytes);
      if (copy.valid != 0) std::memcpy(copy.to, copy.from, copy.valid);
    }
    running->groups.pop_front();
  }
}

void check_aligned(const void* address, unsigned bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) shim::fail("access of %u bytes at %p is not aligned", bytes, address);
}

}  // namespace gptfast::ptx::host

cudaError_t shim::launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread) {
  error.clear();
  if (const char* reason = refusal(config, kernel)) {
    error = reason;
    return cudaErrorInvalidConfiguration;
  }
  if (stacks.begin == 0) {
    void* memory = mmap(nullptr, kMaxThreads * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || !find_shared()) {
      error = "no memory for the fibers' stacks, or no shared memory";
      return cudaErrorLaunchFailure;
    }
    const auto begin = reinterpret_cast<uintptr_t>(memory);
    stacks = {begin, begin + kMaxThreads * kStack, true};
  }
  const auto frame = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
  launcher_stack = {frame, frame + 4096, false};  // the arguments that threads read lie in the frames that called this
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  threads = blockDim.x * blockDim.y * blockDim.z;
  body = &thread;
  const uint64_t count = uint64_t{gridDim.x} * gridDim.y * gridDim.z;
  std::vector<uint64_t> blocks(count - std::min(first_block, count - 1));
  for (uint64_t i = 0; i < blocks.size(); ++i) blocks[i] = count - blocks.size() + i;
  if (order == Order::reverse) std::reverse(blocks.begin(), blocks.end());
  if (order == Order::random) std::shuffle(blocks.begin(), blocks.end(), random_bits);
  for (const uint64_t i : blocks) {
    blockIdx = {static_cast<unsigned>(i % gridDim.x), static_cast<unsigned>(i / gridDim.x % gridDim.y),
                static_cast<unsigned>(i / (uint64_t{gridDim.x} * gridDim.y))};
    run_block(config.dynamicSmemBytes);
    if (!error.empty()) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t) { return error.c_str(); }

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  dynamic_allowed[kernel] = value;
  return cudaSuccess;
}

extern "C" {

// 0 forward, 1 reverse, 2 random with this seed: the order of later launches
void shim_set_order(int kind, uint64_t seed) {
  order = static_cast<Order>(kind);
  random_bits.seed(seed);
}

// Later launches run only the blocks from this one on, at least the last: what a huge grid does at its far end
void shim_set_first_block(uint64_t block) { first_block = block; }
}
