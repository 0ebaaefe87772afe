// Products of packed weights: fp32 and bf16, and what all formats end with. int8 and int4 are in quantised_kernel.h, which is compiled
// without contraction. One row is bound by reading the weights, which are one stream; many rows by multiply-adds.
#pragma once

#include "cpu/engine/product.h"

#ifdef GPTFAST_ISA

#include "cpu/engine/product_tile.h"
#include "cpu/gelu_kernel.h"

namespace gptfast::cpu::GPTFAST_ISA {
namespace {

struct SingleWords {
  using Sum = Vec;
  GPTFAST_INLINE Vec add(Vec sum, Bits left, Bits right) { return (Vec)left * (Vec)right + sum; }
};

// Two bf16, the first in the lower half. AVX-512's instruction adds both products in fp32 and takes denormals for 0.
struct PairWords {
  using Sum = Vec;
#if defined(__AVX512BF16__)
  GPTFAST_INLINE Vec add(Vec sum, Bits left, Bits right) { return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right); }
#else
  GPTFAST_INLINE Vec add(Vec sum, Bits left, Bits right) {
    sum = (Vec)(left << 16) * (Vec)(right << 16) + sum;
    return (Vec)(left & 0xffff0000u) * (Vec)(right & 0xffff0000u) + sum;
  }
#endif
};

template <engine::Activation kActivation>
GPTFAST_INLINE Vec activate(Vec v) {
  if constexpr (kActivation == engine::Activation::gelu) return v * gate_of<false, false, false>(v);
  if constexpr (kActivation == engine::Activation::gelu_tanh) return v * gate_of<true, false, false>(v);
  return v;
}

// y[first_row .. + rows, the columns of a panel] from sums [rows, kPanel]
template <engine::Activation kActivation>
void finish_panel(const float* sums, int64_t first_row, int64_t rows, int64_t panel, int64_t outputs, const engine::Epilogue& epilogue) {
  const int64_t column = panel * engine::kPanel, left = outputs - column;
  const float* bias = epilogue.bias == nullptr ? nullptr : epilogue.bias + column;
  for (int64_t r = 0; r < rows; ++r, sums += engine::kPanel) {
    const int64_t row = first_row + r, place = column - epilogue.first_column;
    float* y = epilogue.y + row * epilogue.y_stride + place;
    const float* residual = epilogue.residual == nullptr ? nullptr : epilogue.residual + row * epilogue.residual_stride + place;
    for_columns(left < engine::kPanel ? left : engine::kPanel, [&](int64_t i, int lanes) {
      Vec v = load(sums + i);
      if (bias != nullptr) v = v + load_lanes(bias + i, lanes);
      v = activate<kActivation>(v);
      if (residual != nullptr) v = load_lanes(residual + i, lanes) + v;
      store_lanes(y + i, v, lanes);
    });
  }
}

using Finish = void (*)(const float*, int64_t, int64_t, int64_t, int64_t, const engine::Epilogue&);

GPTFAST_INLINE Finish finish_for(engine::Activation activation) {
  switch (activation) {
    case engine::Activation::gelu: return finish_panel<engine::Activation::gelu>;
    case engine::Activation::gelu_tanh: return finish_panel<engine::Activation::gelu_tanh>;
    case engine::Activation::none: break;
  }
  return finish_panel<engine::Activation::none>;
}

}  // namespace

void product(const engine::PackedWeight& weight, const void* prepared, int64_t rows, int64_t first_panel, int64_t end_panel,
             const engine::Epilogue& epilogue) {
  using engine::Format;
  if (rows == 0) return;
  const int64_t stride = engine::panel_bytes(weight.format, weight.inputs), inputs = weight.inputs;
  const RowTiles tiles(rows);
  const Finish finish = finish_for(epilogue.activation);
  const uint32_t* x = static_cast<const uint32_t*>(prepared);
  alignas(64) uint32_t sums[kChunkRows * engine::kPanel];
  if (inputs == 0) __builtin_memset(sums, 0, sizeof(sums));
  for (int64_t panel = first_panel; panel < end_panel; ++panel) {
    const uint8_t* data = weight.data + panel * stride;
    for (int64_t tile = 0; tile < tiles.count; tile += kChunkTiles) {
      const int64_t end = tiles.count - tile < kChunkTiles ? tiles.count : tile + kChunkTiles;
      if (weight.format == Format::fp32) {
        panel_sums<SingleWords>(data, x, tiles, tile, end, inputs, engine::kBlock, sums);
      } else if (weight.format == Format::bf16) {
        panel_sums<PairWords>(data, x, tiles, tile, end, engine::divide_up(inputs, 2), engine::kBlock / 2, sums);
      } else {
        quantised_sums(weight.format, data, inputs, prepared, rows, tile, end, sums);
      }
      const int64_t row = tiles.first(tile);
      finish(reinterpret_cast<const float*>(sums), row, tiles.first(end) - row, panel, weight.outputs, epilogue);
    }
  }
}

void prepare_product(engine::Format format, const float* x, int64_t x_stride, int64_t rows, int64_t inputs, int64_t first_row,
                     int64_t end_row, void* prepared) {
  using engine::Format;
  if (rows == 0) return;
  const RowTiles tiles(rows);
  uint32_t* out = static_cast<uint32_t*>(prepared);
  if (format == Format::fp32) {
    interleave_rows<1>(tiles, inputs, first_row, end_row, out, [&](int64_t row, int64_t first, int64_t count, uint32_t* words) {
      __builtin_memcpy(words, x + row * x_stride + first, count * sizeof(float));
    });
  } else if (format == Format::bf16) {
    interleave_rows<2>(tiles, inputs, first_row, end_row, out, [&](int64_t row, int64_t first, int64_t count, uint32_t* words) {
      if (count % 2 == 1) words[count / 2] = 0;
      for_columns(count, [&](int64_t i, int lanes) {
        store_lanes(reinterpret_cast<bf16*>(words) + i, load_lanes(x + row * x_stride + first + i, lanes), lanes);
      });
    });
  } else {
    prepare_quantised(format, x, x_stride, rows, inputs, first_row, end_row, prepared);
  }
}

}  // namespace gptfast::cpu::GPTFAST_ISA

#endif
