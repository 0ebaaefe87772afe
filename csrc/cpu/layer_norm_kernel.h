// layer_norm on rows in memory: forward, backward and the last step of the parameters' gradients; add_layer_norm_kernel.h shares it.
// A row stays in the first-level cache for the two passes of its statistics and the one that writes it, so memory is read once and
// written once: 2 elements a value forward, 3 backward, which is what limits it. Rows are taken one after the other, in the order in
// which the hardware fetches ahead: several at a time save operations and lose a third of the bandwidth. Only where a row and the sums
// for dweight and dbias do not fit the first-level cache together does backward take kGroup rows for each pass over these sums.
#pragma once

#include "cpu/isa.h"
#include "cpu/vec_types.h"

namespace gptfast::cpu {

struct LayerNorm {
  Type type;            // of x, y, dy, dtotal, dx
  int64_t columns;      // C
  float eps;
  const void* x;        // [N, C]
  const float* weight;  // [C]
  const float* bias;    // [C]
  void* y;              // [N, C]
  float* mean;          // [N]
  float* rstd;          // [N]
  const void* dy;       // [N, C]
  const void* dtotal;   // [N, C], a gradient of x that comes another way and is added to dx, or null
  void* dx;             // [N, C]
  bool stream;          // y or dx is written past the caches; needs rows and a start that are whole cache lines
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
constexpr int64_t kNear = 24576;  // bytes that stay in the first-level cache

// y, mean and rstd of one row: x, whose sum the caller knows
template <typename T>
GPTFAST_INLINE void normalise_row(const LayerNorm& args, int64_t row, const T* x, float sum_x) {
  const int64_t columns = args.columns;
  const float *weight = args.weight, *bias = args.bias, count = static_cast<float>(columns), mean = sum_x / count;
  const bool past_caches = args.stream;
  T* y = static_cast<T*>(args.y) + row * columns;
  const float squares = sum_values(x, columns, [&](Vec value) { return (value - set(mean)) * (value - set(mean)); });
  const float rstd = 1.0f / __builtin_sqrtf(squares / count + args.eps);
  for_columns(columns, [&](int64_t i, int lanes) {
    const Vec normal = (load_lanes(x + i, lanes) - set(mean)) * set(rstd);
    store_or_stream(y + i, normal * load_lanes(weight + i, lanes) + load_lanes(bias + i, lanes), lanes, past_caches);
  });
  args.mean[row] = mean;
  args.rstd[row] = rstd;
}

template <typename T>
void forward_rows(const LayerNorm& args, int64_t first_row, int64_t end_row) {
  for (int64_t row = first_row; row < end_row; ++row) {
    const T* x = static_cast<const T*>(args.x) + row * args.columns;
    normalise_row(args, row, x, sum_values(x, args.columns, [](Vec value) { return value; }));
  }
  if (args.stream) finish_streams();
}

// dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) with g = dy * weight, for kRows rows
template <typename T, int kRows, bool kAdd>
GPTFAST_INLINE void backward_group(const LayerNorm& args, int64_t row, float* dweight, float* dbias) {
  const int64_t columns = args.columns;
  const T* x = static_cast<const T*>(args.x) + row * columns;
  const T* dy = static_cast<const T*>(args.dy) + row * columns;
  const T* dtotal = static_cast<const T*>(args.dtotal) + row * columns;
  T* dx = static_cast<T*>(args.dx) + row * columns;
  const float* weight = args.weight;
  const bool past_caches = args.stream;
  Vec mean[kRows], rstd[kRows], sum_g[kRows] = {}, sum_products[kRows] = {};
  for (int r = 0; r < kRows; ++r) mean[r] = set(args.mean[row + r]), rstd[r] = set(args.rstd[row + r]);
  for (int r = 0; r < kRows; ++r) {
    for_columns(columns, [&](int64_t i, int lanes) {
      const Vec w = load_lanes(weight + i, lanes);
      const Vec g = rounded(load_lanes(dy + r * columns + i, lanes) * w);  // 0 in a missing lane
      sum_g[r] += g;
      sum_products[r] += g * (load_lanes(x + r * columns + i, lanes) - mean[r]);
    });
  }
  Vec mean_g[kRows], slope[kRows];  // of g, and of what stands before x - mean
  for (int r = 0; r < kRows; ++r) {
    const float count = static_cast<float>(columns);
    mean_g[r] = set(sum(sum_g[r]) / count);
    slope[r] = set(sum(sum_products[r]) / count) * rstd[r] * rstd[r];
  }
  for_columns(columns, [&](int64_t i, int lanes) {
    const Vec w = load_lanes(weight + i, lanes);
    Vec sum_weight = load_lanes(dweight + i, lanes), sum_bias = load_lanes(dbias + i, lanes);
    for (int r = 0; r < kRows; ++r) {
      const int64_t place = r * columns + i;
      const Vec upstream = load_lanes(dy + place, lanes);
      const Vec deviation = load_lanes(x + place, lanes) - mean[r];
      sum_weight += upstream * rstd[r] * deviation;
      sum_bias += upstream;
      // g as it was added up: in a row of one column it cancels, and rstd may be large
      Vec gradient = (rounded(upstream * w) - mean_g[r] - deviation * slope[r]) * rstd[r];
      if (kAdd) gradient += load_lanes(dtotal + place, lanes);
      store_or_stream(dx + place, gradient, lanes, past_caches);
    }
    store_lanes(dweight + i, sum_weight, lanes);
    store_lanes(dbias + i, sum_bias, lanes);
  });
}

template <typename T, bool kAdd>
void backward_rows(const LayerNorm& args, int64_t first_row, int64_t end_row, float* sums) {
  const int64_t columns = args.columns;
  for_columns(2 * columns, [&](int64_t i, int lanes) { store_lanes(sums + i, set(0), lanes); });
  int64_t row = first_row;
  const bool grouped = columns * static_cast<int64_t>(3 * sizeof(T) + 3 * sizeof(float)) > kNear;
  for (; grouped && row + kGroup <= end_row; row += kGroup) backward_group<T, kGroup, kAdd>(args, row, sums, sums + columns);
  for (; row < end_row; ++row) backward_group<T, 1, kAdd>(args, row, sums, sums + columns);
  if (args.stream) finish_streams();
}

template <typename T>
void backward_of(const LayerNorm& args, int64_t first_row, int64_t end_row, float* sums) {
  args.dtotal == nullptr ? backward_rows<T, false>(args, first_row, end_row, sums)
                         : backward_rows<T, true>(args, first_row, end_row, sums);
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
    case Type::fp32: return backward_of<float>(args, first_row, end_row, sums);
    case Type::bf16: return backward_of<bf16>(args, first_row, end_row, sums);
    case Type::fp16: return backward_of<fp16>(args, first_row, end_row, sums);
  }
}

}  // namespace gptfast::cpu::GPTFAST_ISA

#endif
