// The small steps of the engine that no op has: a row's embedding, and the activations that are no epilogue of a product.
#pragma once

#include "cpu/engine/product.h"

namespace gptfast::cpu::engine {

enum class Nonlinearity { gelu, gelu_tanh, relu, silu, tanh };

}  // namespace gptfast::cpu::engine

// y [columns] = the table's row `token` + position
GPTFAST_PER_ISA(void embed_token(const engine::PackedWeight& table, int64_t token, const float* position, float* y))
// Columns first .. end of y [rows, stride], for relu, silu and tanh
GPTFAST_PER_ISA(void activate(engine::Nonlinearity kind, float* y, int64_t stride, int64_t rows, int64_t first, int64_t end))

#ifdef GPTFAST_ISA

#include "cpu/vec_math.h"

namespace gptfast::cpu::GPTFAST_ISA {

void embed_token(const engine::PackedWeight& table, int64_t token, const float* position, float* y) {
  unpack_row(table, token, y);
  for_columns(table.inputs, [&](int64_t i, int lanes) {
    store_lanes(y + i, load_lanes(y + i, lanes) + load_lanes(position + i, lanes), lanes);
  });
}

void activate(engine::Nonlinearity kind, float* y, int64_t stride, int64_t rows, int64_t first, int64_t end) {
  for (int64_t row = 0; row < rows; ++row) {
    float* values = y + row * stride + first;
    for_columns(end - first, [&](int64_t i, int lanes) {
      Vec u = load_lanes(values + i, lanes);
      if (kind == engine::Nonlinearity::tanh) {
        for (int lane = 0; lane < lanes; ++lane) u[lane] = __builtin_tanhf(u[lane]);
      } else if (kind == engine::Nonlinearity::relu) {
        u = choose(u < set(0), set(0), u);  // NaN stays
      } else {
        u = u / (set(1.0f) + exp(-u));
      }
      store_lanes(values + i, u, lanes);
    });
  }
}

}  // namespace gptfast::cpu::GPTFAST_ISA

#endif
