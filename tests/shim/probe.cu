// Kernels that test the shim and the host forms of ptx.cuh: small, and each of them wrong without the step that it is named for.
#include "cuda/ptx.cuh"

namespace ptx = gptfast::ptx;

extern __shared__ __align__(1024) unsigned char dynamic_shared[];

namespace {

// Reverses each block's values through shared memory
__global__ void reverse_block(const float* from, float* to) {
  __shared__ float values[256];
  const int i = threadIdx.x, base = blockIdx.x * blockDim.x;
  values[i] = from[base + i];
  __syncthreads();  // mutant: missing barrier
  to[base + i] = values[blockDim.x - 1 - i];
}

// Sums tiles of 4 floats a thread that arrive by asynchronous copies, two tiles under way
__global__ void pipeline(const float* from, float* to, int tiles) {
  auto* stage = reinterpret_cast<float(*)[256]>(dynamic_shared);
  const int i = threadIdx.x, n = blockDim.x * 4;
  float sum[4] = {};
  for (int tile = 0; tile < tiles + 1; ++tile) {
    if (tile < tiles) ptx::cp_async_16(&stage[tile % 2][i * 4], from + tile * n + i * 4, tile + 1 < tiles ? 16 : 8);
    ptx::cp_async_commit();
    if (tile == 0) continue;
    ptx::cp_async_wait<1>();  // mutant: missing wait
    __syncthreads();
    const int other = blockDim.x - 1 - i;
    for (int j = 0; j < 4; ++j) sum[j] += stage[(tile - 1) % 2][other * 4 + j];
    __syncthreads();
  }
  for (int j = 0; j < 4; ++j) to[i * 4 + j] = sum[j];
}

// d [16, 8] = a [16, 16] b [16, 8] with a by ldmatrix, b by ldmatrix.trans
template <bool BF16>
__global__ void product(const uint16_t* a, const uint16_t* b, float* d) {
  __shared__ __align__(16) uint16_t left[16][16], right[16][8];
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) left[i / 16][i % 16] = a[i];
  for (int i = lane; i < 128; i += 32) right[i / 8][i % 8] = b[i];
  __syncwarp();
  uint32_t x[4], y[2];
  ptx::load_matrices<4>(x, &left[lane % 16][lane / 16 * 8]);
  ptx::load_matrices<2, true>(y, &right[lane % 16][0]);
  float sums[4] = {};
  if (BF16) {
    ptx::mma_bf16(sums, x, y);
  } else {
    ptx::mma_fp16(sums, x, y);
  }
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

// All 8x8 matrix loads against the plain one: to [4 forms, 32 lanes, 4 registers]
__global__ void matrices(const uint16_t* from, uint32_t* to) {
  __shared__ __align__(16) uint16_t tile[32][8];
  const int lane = threadIdx.x;
  for (int j = 0; j < 8; ++j) tile[lane][j] = from[lane * 8 + j];
  __syncwarp();
  uint32_t four[4], two[2];
  ptx::load_matrices<4>(four, tile[lane]);
  for (int i = 0; i < 4; ++i) to[lane * 4 + i] = four[i];
  ptx::load_matrices<4, true>(four, tile[lane]);
  for (int i = 0; i < 4; ++i) to[128 + lane * 4 + i] = four[i];
  ptx::load_matrices<2>(two, tile[lane % 16]);
  for (int i = 0; i < 2; ++i) to[256 + lane * 4 + i] = two[i];
  ptx::load_matrices<2, true>(two, tile[lane % 16]);
  for (int i = 0; i < 2; ++i) to[384 + lane * 4 + i] = two[i];
}

__global__ void collectives(int* to) {
  const int lane = threadIdx.x % 32;
  int* mine = to + threadIdx.x * 8;
  mine[0] = __shfl_sync(0xffffffffu, lane * 3, 5);
  mine[1] = __shfl_up_sync(0xffffffffu, lane, 2);
  mine[2] = __shfl_down_sync(0xffffffffu, lane, 2, 16);
  mine[3] = __shfl_xor_sync(0xffffffffu, lane, 9);
  mine[4] = static_cast<int>(__ballot_sync(0xffffffffu, lane % 3 == 0));
  mine[5] = __any_sync(0xffffffffu, lane == 31) * 2 + __all_sync(0xffffffffu, lane < 31);
  // the two halves of a warp meet apart, in different code
  mine[6] = lane < 16 ? __shfl_xor_sync(0xffffu, lane, 1) : __shfl_xor_sync(0xffff0000u, lane, 2);
  mine[7] = static_cast<int>(threadIdx.x);
}

__global__ void numbers(const float* from, uint32_t* bf16, uint32_t* fp16, float* widened, int count) {
  for (int i = threadIdx.x; i < count / 2; i += blockDim.x) {
    bf16[i] = ptx::pack_bf16(from[2 * i], from[2 * i + 1]);
    fp16[i] = ptx::pack_fp16(from[2 * i], from[2 * i + 1]);
  }
  for (int i = threadIdx.x; i < 65536; i += blockDim.x) widened[i] = ptx::unpack_fp16(static_cast<uint16_t>(i));
}

// One mistake a number; what reports it is in test_shim.py
__global__ void mistakes(int which, float* out) {
  __shared__ float values[64];
  const int i = threadIdx.x;
  values[i] = 0.0f;
  if (which == 0) out[i] = ptx::load_once(out + 1).x;
  if (which == 1) *reinterpret_cast<float4*>(values + 1) = float4{0, 0, 0, 0};
  if (which == 2) values[i + 64] = 1.0f;
  if (which == 3 && i < 32) __syncwarp();
  if (which == 3 && i == 40) __syncwarp();
  if (which == 4) out[i] = __shfl_sync(0xffu, out[i], 0);
  if (which == 5) reinterpret_cast<float*>(dynamic_shared)[i + 16] = 1.0f;
  if (which == 6) out[i] = reinterpret_cast<float*>(dynamic_shared)[i];
  if (which == 7) out[i] = values[i + 1 < 64 ? i + 1 : 0];  // a race: forward and reverse order disagree
  if (which == 8) out[i] = out[64];
  if (which == 9) out[64] = 0.0f;
  if (which == 10) ptx::cp_async_16(&dynamic_shared[0], out + 64);
}

template <class... Parameters, class... Arguments>
const char* run(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_bytes, Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = dynamic_bytes;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

extern "C" {
const char* probe_reverse_block(const float* from, float* to, int blocks, int threads) {
  return run(reverse_block, blocks, threads, 0, from, to);
}
const char* probe_pipeline(const float* from, float* to, int tiles) { return run(pipeline, 1, 64, 2048, from, to, tiles); }
const char* probe_product(const uint16_t* a, const uint16_t* b, float* d, int bf16) {
  return run(bf16 ? product<true> : product<false>, 1, 32, 0, a, b, d);
}
const char* probe_matrices(const uint16_t* from, uint32_t* to) { return run(matrices, 1, 32, 0, from, to); }
const char* probe_collectives(int* to) { return run(collectives, 1, 64, 0, to); }
const char* probe_numbers(const float* from, uint32_t* bf16, uint32_t* fp16, float* widened, int count) {
  return run(numbers, 1, 32, 0, from, bf16, fp16, widened, count);
}
const char* probe_mistake(int which, float* out) { return run(mistakes, 1, 64, 256, which, out); }
const char* probe_block(int threads, int dynamic_bytes, float* out) { return run(mistakes, 1, threads, dynamic_bytes, 100, out); }
}
