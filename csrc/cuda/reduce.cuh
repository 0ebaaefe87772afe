// Sums over a warp and over a block, in an order that is fixed by the lane and warp numbers alone.
#pragma once

#include <cuda_runtime.h>

namespace gptfast::cuda {

// The sum over the warp, in every lane
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2) value += __shfl_xor_sync(0xffffffffu, value, bit);
  return value;
}

// N (a power of two, at most 32) sums over the warp at once: afterwards lane l holds in values[0] the sum number l / (32 / N). Each
// step halves what a lane still adds up, so 8 sums take 9 shuffles and not 40.
template <int N>
__device__ __forceinline__ void warp_sums(float (&values)[N]) {
  static_assert(N >= 1 && N <= 32 && (N & (N - 1)) == 0);
  int bit = 16;
#pragma unroll
  for (int n = N / 2; n > 0; n /= 2, bit /= 2) {
    const bool upper = (threadIdx.x & bit) != 0;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float sent = upper ? values[i] : values[i + n], kept = upper ? values[i + n] : values[i];
      values[i] = kept + __shfl_xor_sync(0xffffffffu, sent, bit);
    }
  }
#pragma unroll
  for (; bit > 0; bit /= 2) values[0] += __shfl_xor_sync(0xffffffffu, values[0], bit);
}

// The sums over a one-dimensional block of WARPS warps, in every thread. scratch [WARPS * N] is shared memory, free on return.
template <int WARPS, int N>
__device__ __forceinline__ void block_sums(float (&values)[N], float* scratch) {
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = warp_sum(values[i]);
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) scratch[threadIdx.x / 32 * N + i] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    values[i] = 0.0f;
    for (int warp = 0; warp < WARPS; ++warp) values[i] += scratch[warp * N + i];
  }
  __syncthreads();
}

}  // namespace gptfast::cuda
