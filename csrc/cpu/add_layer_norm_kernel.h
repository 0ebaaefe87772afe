// add_layer_norm on rows in memory: the sum of two rows, rounded and written, then layer_norm's passes over it while it is in the
// first-level cache: 4 elements a value move, which is what limits it. Its backward is layer_norm's, with dtotal added.
#pragma once

#include "cpu/isa.h"
#include "cpu/layer_norm_kernel.h"
#include "cpu/vec_types.h"

namespace gptfast::cpu {

struct AddLayerNorm {
  LayerNorm norm;        // of total: norm.x is what is added to the residual
  const void* residual;  // [N, C]
  void* total;           // [N, C]
};

}  // namespace gptfast::cpu

GPTFAST_PER_ISA(void add_layer_norm_forward(const AddLayerNorm& args, int64_t first_row, int64_t end_row))

#ifdef GPTFAST_ISA

#include "cpu/vec.h"

namespace gptfast::cpu::GPTFAST_ISA {
namespace {

template <typename T>
void add_rows(const AddLayerNorm& args, int64_t first_row, int64_t end_row) {
  const int64_t columns = args.norm.columns;
  for (int64_t row = first_row; row < end_row; ++row) {
    const int64_t start = row * columns;
    const T *residual = static_cast<const T*>(args.residual) + start, *x = static_cast<const T*>(args.norm.x) + start;
    T* total = static_cast<T*>(args.total) + start;
    for_columns(columns, [&](int64_t i, int lanes) {
      store_lanes(total + i, load_lanes(residual + i, lanes) + load_lanes(x + i, lanes), lanes);
    });
    normalise_row(args.norm, row, total, sum_values(total, columns, [](Vec value) { return value; }));
  }
  if (args.norm.stream) finish_streams();
}

}  // namespace

void add_layer_norm_forward(const AddLayerNorm& args, int64_t first_row, int64_t end_row) {
  switch (args.norm.type) {
    case Type::fp32: return add_rows<float>(args, first_row, end_row);
    case Type::bf16: return add_rows<bf16>(args, first_row, end_row);
    case Type::fp16: return add_rows<fp16>(args, first_row, end_row);
  }
}

}  // namespace gptfast::cpu::GPTFAST_ISA

#endif
