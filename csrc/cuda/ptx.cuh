// Every PTX instruction that kernels use, behind a function. Where __CUDA_ARCH__ is not defined the function has a host form, which
// computes what the PTX ISA manual says of the instruction, so that a host that plays a block's threads can execute a kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace gptfast::ptx {

#ifndef __CUDA_ARCH__
// What such a host supplies. nvcc's own host pass parses the host forms and emits none of them.
namespace host {
// Warp-wide: returns 32 copies of the lanes' `bytes` in lane order. `name` tells which instruction the lanes have to meet at.
__device__ const void* exchange(const void* mine, unsigned bytes, const char* name);
// Asynchronous copies of the calling thread: `valid` bytes from `from`, zeros up to `bytes`, in groups closed by commit()
__device__ void copy_later(void* to, const void* from, unsigned bytes, unsigned valid);
__device__ void commit();
__device__ void wait(unsigned groups_left);
__device__ void check_aligned(const void* address, unsigned bytes);
}  // namespace host
#endif

// ---------------------------------------------------------------------------------------------------------------- global memory

// 16 bytes that this kernel reads once and nobody writes meanwhile: past L1. ld.global.nc.L1::no_allocate
__device__ __forceinline__ uint4 load_once(const void* address) {
#ifdef __CUDA_ARCH__
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(__cvta_generic_to_global(address)));
  return v;
#else
  host::check_aligned(address, 16);
  return *static_cast<const uint4*>(address);
#endif
}

// 16 bytes from global to shared memory, `valid` of them (0 to 16) read and the rest zeros; there after cp_async_wait. cp.async.cg
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, unsigned valid = 16) {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(__cvta_generic_to_global(global)), "r"(valid)
               : "memory");
#else
  host::check_aligned(shared, 16);
  host::check_aligned(global, 16);
  host::copy_later(shared, global, 16, valid);
#endif
}

__device__ __forceinline__ void cp_async_commit() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  host::commit();
#endif
}

// Waits until at most GROUPS_LEFT of this thread's committed groups are under way; other threads' copies need a barrier after it
template <int GROUPS_LEFT>
__device__ __forceinline__ void cp_async_wait() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS_LEFT) : "memory");
#else
  host::wait(GROUPS_LEFT);
#endif
}

// ---------------------------------------------------------------------------------------------------------------------- numbers

// Two floats rounded to nearest even; `low` lands in the low half. cvt.rn.bf16x2.f32
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
#ifdef __CUDA_ARCH__
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
#else
  const auto round = [](float value) -> uint32_t {
    const uint32_t bits = __float_as_uint(value);
    return value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  };
  return round(high) << 16 | round(low);
#endif
}

// As pack_bf16 for IEEE half. cvt.rn.f16x2.f32
__device__ __forceinline__ uint32_t pack_fp16(float low, float high) {
#ifdef __CUDA_ARCH__
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
#else
  const auto round = [](float value) -> uint32_t {
    const uint32_t bits = __float_as_uint(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (value != value) return 0x7fff;
    if (magnitude >= 0x477ff000) return sign | 0x7c00;                                                        // 65520 and above
    if (magnitude >= 0x38800000) return sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;  // normal: 2^-14
    return sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000);  // one ulp of 0.5 is half's smallest step
  };
  return round(high) << 16 | round(low);
#endif
}

// IEEE half to float, exact. cvt.f32.f16
__device__ __forceinline__ float unpack_fp16(uint16_t bits) {
#ifdef __CUDA_ARCH__
  float d;
  asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(bits));
  return d;
#else
  const uint32_t sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  const uint32_t special = magnitude >= 0x7c00 ? 0x7f800000u : 0u;
  return __uint_as_float(sign | special | __float_as_uint(__uint_as_float(magnitude << 13) * 0x1p112f));
#endif
}

// -------------------------------------------------------------------------------------------------------- tensor cores, 16-bit

#ifndef __CUDA_ARCH__
namespace host {
// Fragments of mma.m16n8k16: lane l holds rows l/4 and l/4 + 8 of A and D, column l/4 of B; 2 neighbours in k (D: in n) a register
struct Operands {
  uint32_t a[4], b[2];
};

template <class Widen>
__device__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* name, Widen widen) {
  const Operands mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const auto* lanes = static_cast<const Operands*>(exchange(&mine, sizeof mine, name));
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, column = lane % 4 * 2 + i % 2, below = i / 2;
    for (int k = 0; k < 16; ++k) {
      const int pair = k % 8 / 2, shift = k % 2 * 16;
      const uint32_t x = lanes[row * 4 + pair].a[below + k / 8 * 2], y = lanes[column * 4 + pair].b[k / 8];
      d[i] += widen(static_cast<uint16_t>(x >> shift)) * widen(static_cast<uint16_t>(y >> shift));
    }
  }
}

// Lane 8 m + r gives the address of row r of matrix m; every lane gets row lane/4, columns lane%4 * 2 and the next (or transposed)
template <int MATRICES>
__device__ void ldmatrix(uint32_t (&d)[MATRICES], const void* row, bool transposed, const char* name) {
  uint16_t mine[8] = {};
  const int lane = threadIdx.x % 32;
  if (lane < 8 * MATRICES) {
    check_aligned(row, 16);
    __builtin_memcpy(mine, row, 16);
  }
  const auto* rows = static_cast<const uint16_t(*)[8]>(exchange(mine, sizeof mine, name));
  for (int m = 0; m < MATRICES; ++m) {
    const int i = lane / 4, j = lane % 4 * 2;
    const uint32_t low = transposed ? rows[8 * m + j][i] : rows[8 * m + i][j];
    const uint32_t high = transposed ? rows[8 * m + j + 1][i] : rows[8 * m + i][j + 1];
    d[m] = high << 16 | low;
  }
}
}  // namespace host
#endif

// d += a b: a [16, 16] row-major, b [16, 8] column-major, in bf16; d [16, 8] fp32. mma.sync.aligned.m16n8k16
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDA_ARCH__
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  host::mma_m16n8k16(d, a, b, "mma bf16", [](uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); });
#endif
}

// As mma_bf16 with a and b in IEEE half
__device__ __forceinline__ void mma_fp16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDA_ARCH__
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  host::mma_m16n8k16(d, a, b, "mma fp16", unpack_fp16);
#endif
}

// MATRICES (2 or 4) 8x8 matrices of 16-bit numbers from shared memory; lane 8 m + r passes the address of row r of matrix m,
// 16-byte aligned. Register m: row lane/4, columns 2 (lane % 4) and the next; of the transpose if TRANSPOSED. ldmatrix.sync.aligned
template <int MATRICES, bool TRANSPOSED = false>
__device__ __forceinline__ void load_matrices(uint32_t (&d)[MATRICES], const void* row) {
  static_assert(MATRICES == 2 || MATRICES == 4);
#ifdef __CUDA_ARCH__
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (MATRICES == 4 && TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (MATRICES == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(d[0]), "=r"(d[1])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(d[0]), "=r"(d[1]) : "r"(address) : "memory");
  }
#else
  host::ldmatrix<MATRICES>(d, row, TRANSPOSED, TRANSPOSED ? "ldmatrix.trans" : "ldmatrix");
#endif
}

}  // namespace gptfast::ptx
