// The sum of squares of a range of a tensor: fp32 in stretches, whose sums are added in double. Limited by the reading.
#pragma once

#include "cpu/isa.h"
#include "cpu/vec_types.h"

GPTFAST_PER_ISA(double sum_of_squares(Type type, const void* x, int64_t first, int64_t end))

#ifdef GPTFAST_ISA

#include "cpu/vec.h"

namespace gptfast::cpu::GPTFAST_ISA {
namespace {

constexpr int64_t kStretch = 4096;  // 64 squares a lane and chain at most, with 16 lanes

template <typename T>
double squares(const T* x, int64_t count) {
  double total = 0;
  for (int64_t first = 0; first < count; first += kStretch) {
    const T* stretch = x + first;
    total += static_cast<double>(sum_columns(count - first < kStretch ? count - first : kStretch, [&](int64_t i, int lanes) {
      const Vec v = load_lanes(stretch + i, lanes);
      return v * v;
    }));
  }
  return total;
}

}  // namespace

double sum_of_squares(Type type, const void* x, int64_t first, int64_t end) {
  switch (type) {
    case Type::bf16: return squares(static_cast<const bf16*>(x) + first, end - first);
    case Type::fp16: return squares(static_cast<const fp16*>(x) + first, end - first);
    case Type::fp32: break;
  }
  return squares(static_cast<const float*>(x) + first, end - first);
}

}  // namespace gptfast::cpu::GPTFAST_ISA

#endif
