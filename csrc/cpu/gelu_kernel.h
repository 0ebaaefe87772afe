// gelu on rows in memory, with the bias added on the way: forward, and backward with the bias's gradient in the same pass.
// Everything is written for |u|, so that no exponential overflows and nothing cancels: with e = exp(-2 |z|) and r = 1 / (1 + e) the
// tanh form is u * r for u > 0 and u * e * r below, and its slope follows from the same two numbers. For results in bf16 the
// exponential and the reciprocal are short ones. fp32 is limited by memory, bf16 by the arithmetic of some 20 operations a value.
#pragma once

#include "cpu/isa.h"
#include "cpu/vec_types.h"

namespace gptfast::cpu {

struct Gelu {
  Type type;          // of x, y, dy, dx
  bool tanh;          // the tanh form, or the error function
  int64_t columns;    // C
  const void* x;      // [N, C]
  const float* bias;  // [C], or null
  void* y;            // [N, C]
  const void* dy;     // [N, C]
  void* dx;           // [N, C]
  bool wide_sums;     // the bias's gradient is wanted in fp32: no short exponentials
  bool stream;        // y or dx is written past the caches; needs rows and a start that are whole cache lines
};

}  // namespace gptfast::cpu

GPTFAST_PER_ISA(void gelu_forward(const Gelu& args, int64_t first_row, int64_t end_row))
// Writes dx of these rows and, where there is a bias, the rows' share of its gradient into sums [C]
GPTFAST_PER_ISA(void gelu_backward(const Gelu& args, int64_t first_row, int64_t end_row, float* sums))

#ifdef GPTFAST_ISA

#include "cpu/vec.h"
#include "cpu/vec_math.h"

namespace gptfast::cpu::GPTFAST_ISA {
namespace {

constexpr int kGeluRows = 4;  // rows whose share of dbias is added in registers

// exp(x) for x <= 0, or, good enough for results in bf16, 2^x; kUnit<kShort> is what brings the one to the other
template <bool kShort>
GPTFAST_INLINE Vec exponential(Vec x) {
  return kShort ? exp2_16bit(x) : exp_bounded(x);
}

template <bool kShort>
constexpr float kUnit = kShort ? 1.4426950408889634f : 1.0f;

GPTFAST_INLINE Vec absolute(Vec x) { return (Vec)((Bits)x & 0x7fffffffu); }

// gate(u) of y = u * gate(u); with kSlope the derivative of y
template <bool kShort, bool kSlope>
GPTFAST_INLINE Vec tanh_form(Vec u) {
  constexpr float kRate = 1.5957691216057308f, kCube = 0.044715f;  // 2 z = kRate * (u + kCube u^3)
  const Vec square = u * u;
  const Vec e = exponential<kShort>(absolute(u) * (square * set(-kUnit<kShort> * kRate * kCube) + set(-kUnit<kShort> * kRate)));
  const Vec r = kShort ? reciprocal_16bit(e + set(1.0f)) : reciprocal(e + set(1.0f));
  const Vec below = e * r, gate = choose(u < set(0), below, r);
  return kSlope ? gate + u * (below * r) * (square * set(3 * kRate * kCube) + set(kRate)) : gate;
}

template <bool kShort, bool kSlope>
GPTFAST_INLINE Vec error_form(Vec u) {
  constexpr float kDensity = 0.3989422804014327f;  // 1 / sqrt(2 pi)
  const Vec e = exponential<kShort>(u * u * set(-0.5f * kUnit<kShort>));
  const Vec tail = e * normal_tail<kShort>(absolute(u)), gate = choose(u < set(0), tail, set(1.0f) - tail);
  return kSlope ? gate + u * (e * set(kDensity)) : gate;
}

template <bool kTanh, bool kShort, bool kSlope>
GPTFAST_INLINE Vec gate_of(Vec u) {
  return kTanh ? tanh_form<kShort, kSlope>(u) : error_form<kShort, kSlope>(u);
}

template <typename T, bool kTanh, bool kShort>
void gelu_rows(const Gelu& args, int64_t first_row, int64_t end_row) {
  const int64_t columns = args.columns;
  const T* x = static_cast<const T*>(args.x) + first_row * columns;
  T* y = static_cast<T*>(args.y) + first_row * columns;
  const float* bias = args.bias;
  const bool past_caches = args.stream;
  if (bias == nullptr) {
    for_columns((end_row - first_row) * columns, [&](int64_t i, int lanes) {
      const Vec u = load_lanes(x + i, lanes);
      store_or_stream(y + i, u * gate_of<kTanh, kShort, false>(u), lanes, past_caches);
    });
    return;
  }
  for (int64_t row = first_row; row < end_row; ++row, x += columns, y += columns) {
    for_columns(columns, [&](int64_t i, int lanes) {
      const Vec u = load_lanes(x + i, lanes) + load_lanes(bias + i, lanes);
      store_or_stream(y + i, u * gate_of<kTanh, kShort, false>(u), lanes, past_caches);
    });
  }
}

template <typename T, bool kTanh, bool kShort, int kRows>
GPTFAST_INLINE void gelu_backward_group(const Gelu& args, int64_t row, float* sums) {
  const int64_t columns = args.columns;
  const T* x = static_cast<const T*>(args.x) + row * columns;
  const T* dy = static_cast<const T*>(args.dy) + row * columns;
  T* dx = static_cast<T*>(args.dx) + row * columns;
  const float* biases = args.bias;
  const bool past_caches = args.stream;
  for_columns(columns, [&](int64_t i, int lanes) {
    const Vec bias = load_lanes(biases + i, lanes);
    Vec total = load_lanes(sums + i, lanes);
    for (int r = 0; r < kRows; ++r) {
      const int64_t place = r * columns + i;
      const Vec slope = gate_of<kTanh, kShort, true>(load_lanes(x + place, lanes) + bias);
      const Vec gradient = load_lanes(dy + place, lanes) * slope;
      store_or_stream(dx + place, gradient, lanes, past_caches);
      total += gradient;
    }
    store_lanes(sums + i, total, lanes);
  });
}

template <typename T, bool kTanh, bool kShort>
void gelu_backward_rows(const Gelu& args, int64_t first_row, int64_t end_row, float* sums) {
  const int64_t columns = args.columns;
  if (args.bias == nullptr) {
    const T* x = static_cast<const T*>(args.x) + first_row * columns;
    const T* dy = static_cast<const T*>(args.dy) + first_row * columns;
    T* dx = static_cast<T*>(args.dx) + first_row * columns;
    const bool past_caches = args.stream;
    for_columns((end_row - first_row) * columns, [&](int64_t i, int lanes) {
      const Vec slope = gate_of<kTanh, kShort, true>(load_lanes(x + i, lanes));
      store_or_stream(dx + i, load_lanes(dy + i, lanes) * slope, lanes, past_caches);
    });
    return;
  }
  for_columns(columns, [&](int64_t i, int lanes) { store_lanes(sums + i, set(0), lanes); });
  int64_t row = first_row;
  for (; row + kGeluRows <= end_row; row += kGeluRows) gelu_backward_group<T, kTanh, kShort, kGeluRows>(args, row, sums);
  for (; row < end_row; ++row) gelu_backward_group<T, kTanh, kShort, 1>(args, row, sums);
}

template <typename T, bool kShort>
void gelu_forward_of(const Gelu& args, int64_t first_row, int64_t end_row) {
  args.tanh ? gelu_rows<T, true, kShort>(args, first_row, end_row) : gelu_rows<T, false, kShort>(args, first_row, end_row);
  if (args.stream) finish_streams();
}

template <typename T, bool kShort>
void gelu_backward_of(const Gelu& args, int64_t first_row, int64_t end_row, float* sums) {
  args.tanh ? gelu_backward_rows<T, true, kShort>(args, first_row, end_row, sums)
            : gelu_backward_rows<T, false, kShort>(args, first_row, end_row, sums);
  if (args.stream) finish_streams();
}

}  // namespace

void gelu_forward(const Gelu& args, int64_t first_row, int64_t end_row) {
  switch (args.type) {
    case Type::fp32: return gelu_forward_of<float, false>(args, first_row, end_row);
    case Type::bf16: return gelu_forward_of<bf16, true>(args, first_row, end_row);
    case Type::fp16: return gelu_forward_of<fp16, false>(args, first_row, end_row);
  }
}

void gelu_backward(const Gelu& args, int64_t first_row, int64_t end_row, float* sums) {
  switch (args.type) {
    case Type::fp32: return gelu_backward_of<float, false>(args, first_row, end_row, sums);
    case Type::bf16:
      return args.wide_sums ? gelu_backward_of<bf16, false>(args, first_row, end_row, sums)
                            : gelu_backward_of<bf16, true>(args, first_row, end_row, sums);
    case Type::fp16: return gelu_backward_of<fp16, false>(args, first_row, end_row, sums);
  }
}

}  // namespace gptfast::cpu::GPTFAST_ISA

#endif
