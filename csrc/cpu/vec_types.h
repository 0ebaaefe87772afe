// The storage types of kernels, the same for every instruction set.
#pragma once

#include <stdint.h>

namespace gptfast::cpu {

enum class Type { fp32, bf16, fp16 };
struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

}  // namespace gptfast::cpu
