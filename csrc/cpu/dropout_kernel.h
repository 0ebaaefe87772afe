// dropout on rows in memory: the noise of a row and a column decides, so forward and backward are one function.
// The ten rounds of Philox are what it costs: some 5 operations a value, above what memory takes.
#pragma once

#include "cpu/isa.h"
#include "cpu/vec_types.h"

namespace gptfast::cpu {

struct Dropout {
  Type type;           // of x and y
  int64_t columns;     // C
  uint64_t seed;
  uint32_t threshold;  // an element stays where its word is at least this
  bool keeps;          // false: nothing stays, which would take a threshold of 2^32
  float divisor;       // 1 - p
  const void* x;       // [N, C]
  void* y;             // [N, C]
};

}  // namespace gptfast::cpu

GPTFAST_PER_ISA(void dropout_rows(const Dropout& args, int64_t first_row, int64_t end_row))

#ifdef GPTFAST_ISA

#include "cpu/philox_vec.h"
#include "cpu/vec.h"
#include "cpu/vec_math.h"

namespace gptfast::cpu::GPTFAST_ISA {
namespace {

template <typename T>
void dropout_rows_of(const Dropout& args, int64_t first_row, int64_t end_row) {
  const int64_t columns = args.columns;
  const Ints any = Ints{} - (args.keeps ? 1 : 0);
  for (int64_t row = first_row; row < end_row; ++row) {
    const T* x = static_cast<const T*>(args.x) + row * columns;
    T* y = static_cast<T*>(args.y) + row * columns;
    for (int64_t block = 0; block < columns; block += kNoiseWords) {
      uint32_t words[kNoiseWords];
      noise_words(args.seed, static_cast<uint32_t>(block), static_cast<uint32_t>(row), 0, philox::kDropout, words);
      const int64_t count = columns - block < kNoiseWords ? columns - block : kNoiseWords;
      for_columns(count, [&](int64_t i, int lanes) {
        const Ints kept = (Ints)(read<Bits>(words + i) >= args.threshold) & any;
        const Vec scaled = load_lanes(x + block + i, lanes) / set(args.divisor);
        store_lanes(y + block + i, choose(kept, scaled, set(0)), lanes);
      });
    }
  }
}

}  // namespace

void dropout_rows(const Dropout& args, int64_t first_row, int64_t end_row) {
  switch (args.type) {
    case Type::fp32: return dropout_rows_of<float>(args, first_row, end_row);
    case Type::bf16: return dropout_rows_of<bf16>(args, first_row, end_row);
    case Type::fp16: return dropout_rows_of<fp16>(args, first_row, end_row);
  }
}

}  // namespace gptfast::cpu::GPTFAST_ISA

#endif
