// Weights packed for products on the CPU, and the products: what the generation engine and the fused ops share. No torch here.
//
// y[rows, M] = epilogue(x[rows, K] weight[M, K]^T). A row of y has the same bits whatever the number of rows beside it, the number of
// threads and the way panels are dealt to them: in fp32 and bf16 one chain of multiply-adds for each block of kBlock consecutive inputs,
// block sums added in order; in int8 and int4 exact integer sums, and the bits are the same on every instruction set.
//
//   int8   s_x = max|x| / 127 of a row, q_x = clamp(round_half_even(x / s_x), -127, 127); y = float(sum q_x q_w) * (s_x * s_w)
//   int4   the same for each row and group of kGroup inputs; the groups' terms are added in order
// A row or group with s_x = 0 has q_x = 0; one that is not finite gives NaN in its row of y.
#pragma once

#include <stdint.h>

#include "cpu/isa.h"

namespace gptfast::cpu::engine {

enum class Format { fp32, bf16, int8, int4 };  // bf16: both operands are rounded; int8: a scale for each output; int4: for each group

constexpr int64_t kPanel = 32;   // outputs that lie side by side: the unit in which work is dealt to threads
constexpr int64_t kBlock = 128;  // consecutive inputs summed in one chain
constexpr int64_t kGroup = 64;   // consecutive inputs that share an int4 scale
constexpr int64_t kGroupWords = kGroup / 8;                     // for each output: a word holds eight int4 codes
constexpr int64_t kGroupBytes = kPanel * (4 * kGroupWords + 2);  // of a panel: codes and scales

// One buffer on every machine and instruction set, 64-byte aligned: panels of kPanel outputs in order, the last padded with zeros, and
// inputs padded with zeros to whole words of 32 bits (int4: whole groups). In a panel, for each word along the inputs kPanel words lie
// side by side:
//   fp32   word k: input k
//   bf16   word w: inputs 2w and 2w + 1
//   int8   word w: codes of inputs 4w .. 4w + 3; behind all words kPanel fp32 scales and kPanel int32 sums of codes x 128
//   int4   for each group 8 words: byte b of word w holds, plus 8, the code of input 8w + b in its low half and of 8w + 4 + b in its
//          high half; behind them kPanel bf16 scales
// One row reads it once, in order, and as fast as memory gives it: in huge pages nearly twice as fast as in pages of 4 KiB on Zen 4
// (33 against 18 GB/s a core), and no faster with prefetch instructions.
struct PackedWeight {
  Format format;
  int64_t outputs, inputs;  // M, K
  const uint8_t* data;
};

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t panels(int64_t outputs) { return divide_up(outputs, kPanel); }

constexpr int64_t panel_bytes(Format format, int64_t inputs) {
  switch (format) {
    case Format::fp32: return 4 * kPanel * inputs;
    case Format::bf16: return 4 * kPanel * divide_up(inputs, 2);
    case Format::int8: return 4 * kPanel * (divide_up(inputs, 4) + 2);
    case Format::int4: return divide_up(inputs, kGroup) * kGroupBytes;
  }
  return 0;
}

constexpr int64_t packed_bytes(Format format, int64_t outputs, int64_t inputs) { return panels(outputs) * panel_bytes(format, inputs); }

// Bytes that prepare_product writes at most, on any instruction set
constexpr int64_t prepared_bytes(Format format, int64_t rows, int64_t inputs) {
  switch (format) {
    case Format::fp32: return 4 * rows * inputs;
    case Format::bf16: return 4 * rows * divide_up(inputs, 2);
    case Format::int8: return 4 * rows * (divide_up(inputs, 4) + 1);
    case Format::int4: return 4 * rows * divide_up(inputs, kGroup) * (kGroup / 4 + 2);
  }
  return 0;
}

enum class Activation { none, gelu, gelu_tanh };

// y = residual + activation(product + bias)
struct Epilogue {
  const float* bias;      // [M], or null
  Activation activation;
  const float* residual;  // as y, or null; may be y itself
  int64_t residual_stride;
  float* y;               // from row to row y_stride floats; only the columns of the panels asked for are written
  int64_t y_stride;
  int64_t first_column;   // the output that column 0 of y and of residual belongs to: 0, or that of a panel where y holds only a part
};

}  // namespace gptfast::cpu::engine

// Packs these panels of weight [M, K] (any strides, in floats) where they belong in a buffer of packed_bytes
GPTFAST_PER_ISA(void pack_panels(engine::Format format, const float* weight, int64_t row_stride, int64_t column_stride, int64_t outputs,
                                 int64_t inputs, int64_t first_panel, int64_t end_panel, uint8_t* packed))
// The K values that one output's weights stand for
GPTFAST_PER_ISA(void unpack_row(const engine::PackedWeight& weight, int64_t output, float* values))
// Brings rows first_row .. end_row of x [rows, K] (x_stride floats from row to row) into the form that product takes, in a buffer of
// prepared_bytes(format, rows, K), 64-byte aligned. Rows may be dealt to threads in any way; the buffer is good for this ISA only.
GPTFAST_PER_ISA(void prepare_product(engine::Format format, const float* x, int64_t x_stride, int64_t rows, int64_t inputs,
                                     int64_t first_row, int64_t end_row, void* prepared))
// The columns of these panels of y; uses up to 70 KB of stack
GPTFAST_PER_ISA(void product(const engine::PackedWeight& weight, const void* prepared, int64_t rows, int64_t first_panel,
                             int64_t end_panel, const engine::Epilogue& epilogue))

// Of int8 and int4, what the two above do in units of their own: see quantised_kernel.h
GPTFAST_PER_ISA(void prepare_quantised(engine::Format format, const float* x, int64_t x_stride, int64_t rows, int64_t inputs,
                                       int64_t first_row, int64_t end_row, void* prepared))
GPTFAST_PER_ISA(void quantised_sums(engine::Format format, const uint8_t* panel, int64_t inputs, const void* prepared, int64_t rows,
                                    int64_t first_tile, int64_t end_tile, uint32_t* sums))
