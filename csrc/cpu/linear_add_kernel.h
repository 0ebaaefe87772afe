// The last step of linear_add with a plain weight: a product added to the residual stream, in fp32, rounded once.
#pragma once

#include "cpu/isa.h"
#include "cpu/vec_types.h"

// out[i] = residual[i] + y[i] for first <= i < end; out has the residual's type
GPTFAST_PER_ISA(void add_to_residual(Type type, const void* residual, Type product_type, const void* y, void* out, int64_t first,
                                     int64_t end))

#ifdef GPTFAST_ISA

#include "cpu/vec.h"

namespace gptfast::cpu::GPTFAST_ISA {
namespace {

template <typename T, typename Product>
void add_range(const void* residual, const void* y, void* out, int64_t first, int64_t end) {
  const T* a = static_cast<const T*>(residual) + first;
  const Product* b = static_cast<const Product*>(y) + first;
  T* to = static_cast<T*>(out) + first;
  for_columns(end - first, [&](int64_t i, int lanes) { store_lanes(to + i, load_lanes(a + i, lanes) + load_lanes(b + i, lanes), lanes); });
}

template <typename T>
void add_product(const void* residual, Type product_type, const void* y, void* out, int64_t first, int64_t end) {
  switch (product_type) {
    case Type::fp32: return add_range<T, float>(residual, y, out, first, end);
    case Type::bf16: return add_range<T, bf16>(residual, y, out, first, end);
    case Type::fp16: return add_range<T, fp16>(residual, y, out, first, end);
  }
}

}  // namespace

void add_to_residual(Type type, const void* residual, Type product_type, const void* y, void* out, int64_t first, int64_t end) {
  switch (type) {
    case Type::fp32: return add_product<float>(residual, product_type, y, out, first, end);
    case Type::bf16: return add_product<bf16>(residual, product_type, y, out, first, end);
    case Type::fp16: return add_product<fp16>(residual, product_type, y, out, first, end);
  }
}

}  // namespace gptfast::cpu::GPTFAST_ISA

#endif
