// One token a row, exactly as gptfast/ops/sample.py defines it: no sort, every step that decides rounded as PyTorch's fp32 steps are.
// The logits are read once, in tiles that stay in the first-level cache: penalties, the largest value of each lane of each tile, the
// log-sum-exp. The lanes' maxima then bound where candidates can be, so that top_k, min_p and top_p look at few ids, and noise is
// drawn for those alone; without filters Philox makes all words, but logarithms only where a word is small enough to win.
// Greedy is limited by the exponentials of the log-sum-exp, a plain draw by Philox's multiplications.
#pragma once

#include "cpu/isa.h"
#include "cpu/vec_types.h"

namespace gptfast::cpu {

struct Sample {
  Type type;               // of the logits
  int64_t vocab;           // V
  const void* logits;      // [B, V]
  int64_t logits_stride;   // elements from row to row, as all strides here
  const float* temperature;  // [B]; below, one number a row, or null where the filter or penalty is off
  const int64_t* top_k;
  const float *top_p, *min_p, *typical_p;
  const float *repetition, *frequency, *presence;
  const float* bias;       // [B, V] or null
  int64_t bias_stride;
  const int32_t *mask, *prompt;  // [B, ceil(V / 32)] bit words (allowed ids, ids of the prompt), or null
  int32_t* counts;         // [B, V] or null: occurrences in the output; the drawn ids are added
  int64_t counts_stride;
  const int64_t *seed, *position, *choice;  // [B]
  int64_t top_n;
  int64_t* token;          // [B]
  int8_t* status;          // [B]
  float* logprob;          // [B]
  int64_t* top_ids;        // [B, top_n]
  float* top_logprobs;     // [B, top_n]
};

constexpr int64_t kSampleTile = 512;

// Floats of scratch memory that sample_rows needs, aligned to 8 bytes: five rows, and what each tile leaves
inline __attribute__((always_inline)) int64_t sample_room(int64_t vocab) {
  const int64_t padded = (vocab + kSampleTile - 1) / kSampleTile * kSampleTile + 64;
  return 5 * padded + 32 * (padded / kSampleTile + 4);
}

}  // namespace gptfast::cpu

GPTFAST_PER_ISA(void sample_rows(const Sample& args, int64_t first_row, int64_t end_row, float* scratch))

#ifdef GPTFAST_ISA

#include "cpu/sample_draw.h"
#include "cpu/sample_filters.h"
#include "cpu/sample_row.h"

namespace gptfast::cpu::GPTFAST_ISA {
namespace {

// The lowest id whose x is row.best
int64_t first_best(const Row& row) {
  for (int64_t tile = 0; tile < row.tiles; ++tile) {
    if (max(load(row.groups + tile * kWidth)) < row.best) continue;
    for (int64_t i = tile * kSampleTile; i < tile_end(row, tile); ++i) {
      if (row.x[i] == row.best) return i;
    }
  }
  return 0;
}

bool greedy(const Sample& args, int64_t index, const Row& row) {
  return row.temperature < 0x1p-126f || row.best == kInfinity || (args.top_p && args.top_p[index] <= 0) ||
         (args.top_k && args.top_k[index] == 1);
}

template <typename T>
void sample_row(const Sample& args, int64_t index, Row& row) {
  const bool edited = args.mask || args.bias || args.repetition || (args.counts && (args.frequency || args.presence));
  edited ? read_row<T, true>(args, index, row) : read_row<T, false>(args, index, row);
  const bool empty = !row.failed && row.best == -kInfinity;
  args.status[index] = row.failed ? 1 : empty ? 2 : 0;
  int64_t token = -1;
  if (!row.failed && !empty) {
    row.temperature = args.temperature[index];
    row.best_id = token = first_best(row);
    if (!greedy(args, index, row)) {
      row.seed = static_cast<uint64_t>(args.seed[index]);
      row.position = static_cast<uint32_t>(args.position[index]);
      row.choice = static_cast<uint32_t>(args.choice[index]);
      token = apply_filters(args, index, row) ? draw_candidate(row) : draw_any(row);
    }
    if (args.counts) ++args.counts[index * args.counts_stride + token];
  }
  args.token[index] = token;
  write_logprobs<T>(args, index, token, row);
}

}  // namespace

void sample_rows(const Sample& args, int64_t first_row, int64_t end_row, float* scratch) {
  Row row = row_in(scratch, args.vocab);
  for (int64_t index = first_row; index < end_row; ++index) {
    switch (args.type) {
      case Type::fp32: sample_row<float>(args, index, row); break;
      case Type::bf16: sample_row<bf16>(args, index, row); break;
      case Type::fp16: sample_row<fp16>(args, index, row); break;
    }
  }
}

}  // namespace gptfast::cpu::GPTFAST_ISA

#endif
