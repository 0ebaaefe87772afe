// layer_norm on rows in memory: forward, backward and the last step of the parameters' gradients.
// A row stays in the first-level cache for the two passes of its statistics and the one that writes it, so memory is read once and
// written once: 2 elements a value forward, 3 backward, which is what limits it. Backward takes kGroup rows at a time, so that the
// sums for dweight and dbias are loaded and stored once a group.
#pragma once

#include "cpu/isa.h"
#include "cpu/vec_types.h"

namespace gptfast::cpu {

struct LayerNorm {
  Type type;            // of x, y, dy, dx
  int64_t columns;      // C
  float eps;
  const void* x;        // [N, C]
  const float* weight;  // [C]
  const float* bias;    // [C]
  void* y;              // [N, C]
  float* mean;          // [N]
  float* rstd;          // [N]
  const void* dy;       // [N, C]
  void* dx;             // [N, C]
};

}  // namespace gptfast::cpu

GPTFAST_PER_ISA(void layer_norm_forward(const LayerNorm& args, int64_t first_row, int64_t end_row))
// Writes dx of these rows, and the rows' share of dweight and dbias into sums [2, C]
GPTFAST_PER_ISA(void layer_norm_backward(const LayerNorm& args, int64_t first_row, int64_t end_row, float* sums))

#ifdef GPTFAST_ISA

#include "cpu/vec.h"

namespace gptfast::cpu::GPTFAST_ISA {
namespace {

constexpr int kGroup = 4;

template <typename T>
void forward_rows(const LayerNorm& args, int64_t first_row, int64_t end_row) {
  const int64_t columns = args.columns;
  const float count = static_cast<float>(columns);
  for (int64_t row = first_row; row < end_row; ++row) {
    const T* x = static_cast<const T*>(args.x) + row * columns;
    T* y = static_cast<T*>(args.y) + row * columns;
    const float mean = sum_columns(columns, [&](int64_t i, int lanes) { return load_lanes(x + i, lanes); }) / count;
    const float squares = sum_columns(columns, [&](int64_t i, int lanes) {
      const Vec deviation = load_lanes(x + i, lanes) - set(mean);
      return deviation * deviation;
    });
    const float rstd = 1.0f / __builtin_sqrtf(squares / count + args.eps);
    for_columns(columns, [&](int64_t i, int lanes) {
      const Vec normal = (load_lanes(x + i, lanes) - set(mean)) * set(rstd);
      store_lanes(y + i, normal * load_lanes(args.weight + i, lanes) + load_lanes(args.bias + i, lanes), lanes);
    });
    args.mean[row] = mean;
    args.rstd[row] = rstd;
  }
}

// dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) with g = dy * weight, for kRows rows
template <typename T, int kRows>
GPTFAST_INLINE void backward_group(const LayerNorm& args, int64_t row, float* dweight, float* dbias) {
  const int64_t columns = args.columns;
  const float count = static_cast<float>(columns);
  const T* x = static_cast<const T*>(args.x) + row * columns;
  const T* dy = static_cast<const T*>(args.dy) + row * columns;
  T* dx = static_cast<T*>(args.dx) + row * columns;
  const float* weight = args.weight;
  float mean_g[kRows], mean_g_xhat[kRows];
  for (int r = 0; r < kRows; ++r) {
    const Vec mean = set(args.mean[row + r]);
    const int64_t start = r * columns;
    Vec products = set(0);
    mean_g[r] = sum_columns(columns, [&](int64_t i, int lanes) {
      const Vec g = load_lanes(dy + start + i, lanes) * load_lanes(weight + i, lanes);
      products += g * (load_lanes(x + start + i, lanes) - mean);  // a missing lane has g = 0
      return g;
    }) / count;
    mean_g_xhat[r] = sum(products) * args.rstd[row + r] / count;
  }
  for_columns(columns, [&](int64_t i, int lanes) {
    const Vec w = load_lanes(weight + i, lanes);
    Vec sum_weight = load_lanes(dweight + i, lanes), sum_bias = load_lanes(dbias + i, lanes);
    for (int r = 0; r < kRows; ++r) {
      const Vec rstd = set(args.rstd[row + r]);
      const Vec upstream = load_lanes(dy + r * columns + i, lanes);
      const Vec xhat = (load_lanes(x + r * columns + i, lanes) - set(args.mean[row + r])) * rstd;
      sum_weight += upstream * xhat;
      sum_bias += upstream;
      store_lanes(dx + r * columns + i, (upstream * w - set(mean_g[r]) - xhat * set(mean_g_xhat[r])) * rstd, lanes);
    }
    store_lanes(dweight + i, sum_weight, lanes);
    store_lanes(dbias + i, sum_bias, lanes);
  });
}

template <typename T>
void backward_rows(const LayerNorm& args, int64_t first_row, int64_t end_row, float* sums) {
  const int64_t columns = args.columns;
  for_columns(2 * columns, [&](int64_t i, int lanes) { store_lanes(sums + i, set(0), lanes); });
  int64_t row = first_row;
  for (; row + kGroup <= end_row; row += kGroup) backward_group<T, kGroup>(args, row, sums, sums + columns);
  for (; row < end_row; ++row) backward_group<T, 1>(args, row, sums, sums + columns);
}

}  // namespace

void layer_norm_forward(const LayerNorm& args, int64_t first_row, int64_t end_row) {
  switch (args.type) {
    case Type::fp32: return forward_rows<float>(args, first_row, end_row);
    case Type::bf16: return forward_rows<bf16>(args, first_row, end_row);
    case Type::fp16: return forward_rows<fp16>(args, first_row, end_row);
  }
}

void layer_norm_backward(const LayerNorm& args, int64_t first_row, int64_t end_row, float* sums) {
  switch (args.type) {
    case Type::fp32: return backward_rows<float>(args, first_row, end_row, sums);
    case Type::bf16: return backward_rows<bf16>(args, first_row, end_row, sums);
    case Type::fp16: return backward_rows<fp16>(args, first_row, end_row, sums);
  }
}

}  // namespace gptfast::cpu::GPTFAST_ISA

#endif
