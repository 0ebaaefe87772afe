// What every launcher needs: one way to launch, and the choice of a kernel's number type.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "array.h"
#include "vec.cuh"

namespace gptfast::cuda {

// A fixed number (Hopper's), not the device's: results must not depend on the machine they were computed on
constexpr int kMultiprocessors = 132;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline bool aligned_16(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// Queues a kernel that uses no dynamic shared memory; null, or why it could not be launched
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream, Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// f(T{}) for the number type that `type` names
template <class F>
auto with_type(Type type, F f) {
  if (type == Type::bf16) return f(bf16{});
  if (type == Type::fp16) return f(fp16{});
  return f(float{});
}

}  // namespace gptfast::cuda
