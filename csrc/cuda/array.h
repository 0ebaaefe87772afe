// How an array crosses from bindings.cpp (torch headers, g++) into the launchers and kernels (CUDA, no torch header).
#pragma once

#include <cstdint>

namespace gptfast::cuda {

enum class Type : int32_t { fp32, bf16, fp16 };

// An array whose dtype is known at run time; data is null where an optional one is absent
struct Array {
  void* data;
  Type type;
};

}  // namespace gptfast::cuda
