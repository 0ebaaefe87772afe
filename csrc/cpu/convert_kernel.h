// Copies between fp32, bf16 and fp16 memory, and constants: what front ends need so that kernels have one form for every dtype of a
// parameter, and for its absence.
#pragma once

#include "cpu/isa.h"
#include "cpu/vec_types.h"

// to[i] = from[i] for first <= i < end, rounded to nearest even
GPTFAST_PER_ISA(void convert(Type from_type, const void* from, Type to_type, void* to, int64_t first, int64_t end))
// to[i] += from[i] for first <= i < end
GPTFAST_PER_ISA(void accumulate(Type from_type, const void* from, float* to, int64_t first, int64_t end))
// to[i] = value for i < count
GPTFAST_PER_ISA(void fill(float* to, float value, int64_t count))

#ifdef GPTFAST_ISA

#include "cpu/vec.h"

namespace gptfast::cpu::GPTFAST_ISA {
namespace {

template <typename From, typename To>
void convert_range(const void* from, void* to, int64_t first, int64_t end) {
  const From* source = static_cast<const From*>(from) + first;
  To* target = static_cast<To*>(to) + first;
  for_columns(end - first, [&](int64_t i, int lanes) { store_lanes(target + i, load_lanes(source + i, lanes), lanes); });
}

template <typename From>
void convert_from(const void* from, Type to_type, void* to, int64_t first, int64_t end) {
  switch (to_type) {
    case Type::fp32: return convert_range<From, float>(from, to, first, end);
    case Type::bf16: return convert_range<From, bf16>(from, to, first, end);
    case Type::fp16: return convert_range<From, fp16>(from, to, first, end);
  }
}

template <typename From>
void accumulate_range(const void* from, float* to, int64_t first, int64_t end) {
  const From* source = static_cast<const From*>(from) + first;
  float* target = to + first;
  for_columns(end - first, [&](int64_t i, int lanes) {
    store_lanes(target + i, load_lanes(target + i, lanes) + load_lanes(source + i, lanes), lanes);
  });
}

}  // namespace

void convert(Type from_type, const void* from, Type to_type, void* to, int64_t first, int64_t end) {
  switch (from_type) {
    case Type::fp32: return convert_from<float>(from, to_type, to, first, end);
    case Type::bf16: return convert_from<bf16>(from, to_type, to, first, end);
    case Type::fp16: return convert_from<fp16>(from, to_type, to, first, end);
  }
}

void accumulate(Type from_type, const void* from, float* to, int64_t first, int64_t end) {
  switch (from_type) {
    case Type::fp32: return accumulate_range<float>(from, to, first, end);
    case Type::bf16: return accumulate_range<bf16>(from, to, first, end);
    case Type::fp16: return accumulate_range<fp16>(from, to, first, end);
  }
}

void fill(float* to, float value, int64_t count) {
  for_columns(count, [&](int64_t i, int lanes) { store_lanes(to + i, set(value), lanes); });
}

}  // namespace gptfast::cpu::GPTFAST_ISA

#endif
