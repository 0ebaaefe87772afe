// A stand-in for CUDA's header of this name: with this folder first on the include path, g++ compiles a .cu and its .cuh files as
// they are, and shim.cpp executes what they launch on the CPU. Threads of a block are fibers that switch where CUDA lets threads
// meet: at barriers and warp collectives. What is not here does not exist in the base form that kernels have to keep to.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
// One block runs at a time, on one thread of the operating system. So everything thread-local in this library is shared memory of
// the block that runs, which is how memory.cpp finds and poisons it.
#define __shared__ thread_local

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

extern uint3 threadIdx, blockIdx;  // of the fiber that runs
extern dim3 blockDim, gridDim;

// ------------------------------------------------------------------------------------------------------------------ intrinsics

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

void __syncthreads();

namespace shim {
// The calling lane meets the other lanes of `mask`; returns everyone's `bytes`, in lane order (lanes outside the mask: 0xff).
const void* meet(unsigned mask, const void* mine, unsigned bytes, const char* name);
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

template <class T>
T shuffle(unsigned mask, T value, int source, int first, int width, const char* name) {
  const auto* lanes = static_cast<const T*>(meet(mask, &value, sizeof value, name));
  if (source < first || source >= first + width) return value;
  if ((mask >> source & 1) == 0) fail("%s reads lane %d, which is not in its mask %#x", name, source, mask);
  return lanes[source];
}

inline int first_lane(int width) { return static_cast<int>(threadIdx.x % 32) / width * width; }
}  // namespace shim

// Warps are counted along x: blocks whose x is no multiple of 32 have no collectives here (shim.cpp refuses them)
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int first = shim::first_lane(width);
  return shim::shuffle(mask, value, first + source % width, first, width, "__shfl_sync");
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  return shim::shuffle(mask, value, static_cast<int>(threadIdx.x % 32) ^ bits, shim::first_lane(width), width, "__shfl_xor_sync");
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int source = static_cast<int>(threadIdx.x % 32) - static_cast<int>(delta);
  return shim::shuffle(mask, value, source, shim::first_lane(width), width, "__shfl_up_sync");
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int source = static_cast<int>(threadIdx.x % 32) + static_cast<int>(delta);
  return shim::shuffle(mask, value, source, shim::first_lane(width), width, "__shfl_down_sync");
}

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  const char none = 0;
  shim::meet(mask, &none, 1, "__syncwarp");
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const unsigned char mine = predicate != 0;
  const auto* lanes = static_cast<const unsigned char*>(shim::meet(mask, &mine, 1, "__ballot_sync"));
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane) result |= (mask >> lane & lanes[lane] & 1u) << lane;
  return result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

// --------------------------------------------------------------------------------------------------------------------- launching

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
using cudaStream_t = struct CUstream_st*;
const char* cudaGetErrorString(cudaError_t error);

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);

struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;  // clusters and dependent launch are not base form: shim.cpp refuses them
  unsigned numAttrs;
};

namespace shim {
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const std::tuple<Parameters...> values(static_cast<Parameters>(arguments)...);
  return shim::launch(*config, reinterpret_cast<const void*>(kernel), [&] { std::apply(kernel, values); });
}
