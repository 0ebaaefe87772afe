// The last step of a sum over rows: partial sums of fixed blocks of rows are added in the order of the blocks, whoever made them,
// so that the bits of a gradient depend on its shape and on nothing else.
#pragma once

#include "cpu/isa.h"
#include "cpu/vec_types.h"

// out[i] = partials[0][i] + partials[1][i] + ... for first <= i < end, where row b begins at partials + b * stride
GPTFAST_PER_ISA(void add_partials(const float* partials, int64_t count, int64_t stride, int64_t first, int64_t end, float* out))

#ifdef GPTFAST_ISA

#include "cpu/vec.h"

namespace gptfast::cpu::GPTFAST_ISA {

void add_partials(const float* partials, int64_t count, int64_t stride, int64_t first, int64_t end, float* out) {
  for_columns(end - first, [&](int64_t i, int lanes) {
    Vec total = set(0);
    for (int64_t block = 0; block < count; ++block) total += load_lanes(partials + block * stride + first + i, lanes);
    store_lanes(out + first + i, total, lanes);
  });
}

}  // namespace gptfast::cpu::GPTFAST_ISA

#endif
