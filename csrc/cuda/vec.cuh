// 16-bit number types, 128-bit vectors of numbers, and arrays whose dtype is known at run time.
#pragma once

#include <type_traits>

#include "array.h"
#include "ptx.cuh"

namespace gptfast::cuda {

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(bf16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }
__device__ __forceinline__ float widen(fp16 value) { return ptx::unpack_fp16(value.bits); }

// Rounded to nearest even
template <class T>
__device__ __forceinline__ T narrow(float value) {
  if constexpr (std::is_same_v<T, float>) return value;
  if constexpr (std::is_same_v<T, bf16>) return {static_cast<uint16_t>(ptx::pack_bf16(value, 0.0f))};
  if constexpr (std::is_same_v<T, fp16>) return {static_cast<uint16_t>(ptx::pack_fp16(value, 0.0f))};
}

template <class T>
constexpr int kVectorWidth = 16 / sizeof(T);

// E neighbouring numbers as they lie in memory: one, or 16 bytes of them at an address that is a multiple of 16
template <class T, int E>
struct Vec {
  static_assert(E == 1 || E == kVectorWidth<T>);
  std::conditional_t<E == 1, T, uint4> raw;

  // Reads what nobody reads again and nobody writes meanwhile
  static __device__ __forceinline__ Vec load(const T* from) {
    if constexpr (E == 1) {
      return {*from};
    } else {
      return {ptx::load_once(from)};
    }
  }

  static __device__ __forceinline__ Vec zero() {
    if constexpr (E == 1) {
      return {T{}};
    } else {
      return {uint4{0, 0, 0, 0}};
    }
  }

  static __device__ __forceinline__ Vec pack(const float* values) {
    if constexpr (E == 1) {
      return {narrow<T>(values[0])};
    } else if constexpr (std::is_same_v<T, float>) {
      return {uint4{__float_as_uint(values[0]), __float_as_uint(values[1]), __float_as_uint(values[2]),
                    __float_as_uint(values[3])}};
    } else {
      uint32_t word[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float low = values[2 * i], high = values[2 * i + 1];
        word[i] = std::is_same_v<T, bf16> ? ptx::pack_bf16(low, high) : ptx::pack_fp16(low, high);
      }
      return {uint4{word[0], word[1], word[2], word[3]}};
    }
  }

  __device__ __forceinline__ void unpack(float* values) const {
    if constexpr (E == 1) {
      values[0] = widen(raw);
    } else {
      const uint32_t word[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (std::is_same_v<T, float>) {
          values[i] = __uint_as_float(word[i]);
        } else {
          values[2 * i] = widen(T{static_cast<uint16_t>(word[i])});
          values[2 * i + 1] = widen(T{static_cast<uint16_t>(word[i] >> 16)});
        }
      }
    }
  }

  __device__ __forceinline__ void store(T* to) const {
    if constexpr (E == 1) {
      *to = raw;
    } else {
      *reinterpret_cast<uint4*>(to) = raw;
    }
  }
};

// Element i of a parameter, `absent` where there is none. The branch is the same for a whole launch.
__device__ __forceinline__ float parameter(const Array& array, int64_t i, float absent) {
  if (array.data == nullptr) return absent;
  if (array.type == Type::fp32) return static_cast<const float*>(array.data)[i];
  if (array.type == Type::bf16) return widen(static_cast<const bf16*>(array.data)[i]);
  return widen(static_cast<const fp16*>(array.data)[i]);
}

__device__ __forceinline__ void set(const Array& array, int64_t i, float value) {
  if (array.type == Type::fp32) {
    static_cast<float*>(array.data)[i] = value;
  } else if (array.type == Type::bf16) {
    static_cast<bf16*>(array.data)[i] = narrow<bf16>(value);
  } else {
    static_cast<fp16*>(array.data)[i] = narrow<fp16>(value);
  }
}

}  // namespace gptfast::cuda
