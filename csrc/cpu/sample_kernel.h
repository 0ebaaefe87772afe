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

// Tiles of a row, and floats of the parts of SampleMemory
inline __attribute__((always_inline)) int64_t sample_tiles(int64_t vocab) { return (vocab + kSampleTile - 1) / kSampleTile; }
inline __attribute__((always_inline)) int64_t sample_row_room(int64_t vocab) { return sample_tiles(vocab) * kSampleTile + 64; }
inline __attribute__((always_inline)) int64_t sample_tile_room(int64_t vocab) { return 20 * (sample_tiles(vocab) + 1); }
inline __attribute__((always_inline)) int64_t sample_work_room(int64_t vocab) { return 5 * sample_row_room(vocab); }

// A row's memory between the calls below, aligned to 8 bytes. x may be the row of logits itself where these are fp32 and not edited
// (sample_edits) and have sample_row_room floats; they stay as they are, but for what is beyond the vocabulary.
struct SampleMemory {
  float* x;      // sample_row_room floats: written by sample_read
  float* tiles;  // sample_tile_room floats: written by sample_read
  float* work;   // sample_work_room floats, for one thread at a time
};

// The best id of some tiles where all ids can be drawn; nothing where the row is greedy, filtered or failed
struct SampleWinner {
  float score;
  int64_t id;
};

// Floats of scratch memory that sample_rows needs, aligned to 8 bytes
inline __attribute__((always_inline)) int64_t sample_room(int64_t vocab) {
  return sample_row_room(vocab) + sample_tile_room(vocab) + sample_work_room(vocab);
}

// Whether masks, bias or penalties change the logits
inline __attribute__((always_inline)) bool sample_edits(const Sample& args) {
  return args.mask || args.bias || args.repetition || (args.counts && (args.frequency || args.presence));
}

}  // namespace gptfast::cpu

GPTFAST_PER_ISA(void sample_rows(const Sample& args, int64_t first_row, int64_t end_row, float* scratch))

// The same in steps for fp32 logits, so that several threads share a row: sample_read and then sample_share for all tiles, in parts that
// are dealt in any way, then sample_finish by one thread. What a step reads is written by the ones before for all tiles.
GPTFAST_PER_ISA(void sample_read(const Sample& args, int64_t row, int64_t first_tile, int64_t end_tile, const SampleMemory& memory))
GPTFAST_PER_ISA(SampleWinner sample_share(const Sample& args, int64_t row, int64_t first_tile, int64_t end_tile,
                                          const SampleMemory& memory))
GPTFAST_PER_ISA(void sample_finish(const Sample& args, int64_t row, const SampleMemory& memory, const SampleWinner* shares, int64_t count))
// Instead of a draw the log-probability of `target`, with a status and the largest log-probabilities as they go with a draw
GPTFAST_PER_ISA(void sample_target(const Sample& args, int64_t row, const SampleMemory& memory, int64_t target))

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

bool filtered(const Sample& args, int64_t index, const Row& row) {
  const int64_t k = args.top_k ? args.top_k[index] : 0;
  return (k > 0 && k < row.vocab) || (args.top_p && args.top_p[index] < 1) || (args.min_p && args.min_p[index] > 0) ||
         (args.typical_p && args.typical_p[index] < 1);
}

// Status of the row, and what a draw from it needs to know
int8_t begin_draw(const Sample& args, int64_t index, Row& row) {
  combine_tiles(row);
  if (row.failed || row.best == -kInfinity) return row.failed ? 1 : 2;
  row.temperature = args.temperature[index];
  row.best_id = first_best(row);
  row.seed = static_cast<uint64_t>(args.seed[index]);
  row.position = static_cast<uint32_t>(args.position[index]);
  row.choice = static_cast<uint32_t>(args.choice[index]);
  return 0;
}

int64_t draw(const Sample& args, int64_t index, Row& row, const SampleWinner* shares, int64_t count) {
  if (greedy(args, index, row)) return row.best_id;
  if (filtered(args, index, row)) {
    apply_filters(args, index, row);
    return draw_candidate(row);
  }
  if (count == 0) return draw_tiles(row, 0, row.tiles).id;
  Winner winner{shares[0].score, shares[0].id};
  for (int64_t i = 1; i < count; ++i) winner.offer(shares[i].score, shares[i].id);
  return winner.id;
}

template <typename T>
void read_tiles(const Sample& args, int64_t index, int64_t first_tile, int64_t end_tile, const Row& row) {
  const bool edited = sample_edits(args);
  for (int64_t tile = first_tile; tile < end_tile; ++tile) {
    edited ? read_tile<T, true>(args, index, tile, row) : read_tile<T, false>(args, index, tile, row);
  }
}

template <typename T>
void finish_row(const Sample& args, int64_t index, Row& row, const SampleWinner* shares, int64_t count) {
  args.status[index] = begin_draw(args, index, row);
  const int64_t token = args.status[index] == 0 ? draw(args, index, row, shares, count) : -1;
  if (args.counts && token >= 0) ++args.counts[index * args.counts_stride + token];
  args.token[index] = token;
  write_logprobs<T>(args, index, token, row);
}

template <typename T>
void sample_row(const Sample& args, int64_t index, Row row) {
  read_tiles<T>(args, index, 0, row.tiles, row);
  finish_row<T>(args, index, row, nullptr, 0);
}

}  // namespace

void sample_rows(const Sample& args, int64_t first_row, int64_t end_row, float* scratch) {
  float* tiles = scratch + sample_row_room(args.vocab);
  const Row row = row_in({scratch, tiles, tiles + sample_tile_room(args.vocab)}, args.vocab);
  for (int64_t index = first_row; index < end_row; ++index) {
    switch (args.type) {
      case Type::fp32: sample_row<float>(args, index, row); break;
      case Type::bf16: sample_row<bf16>(args, index, row); break;
      case Type::fp16: sample_row<fp16>(args, index, row); break;
    }
  }
}

void sample_read(const Sample& args, int64_t index, int64_t first_tile, int64_t end_tile, const SampleMemory& memory) {
  read_tiles<float>(args, index, first_tile, end_tile, row_in(memory, args.vocab));
}

SampleWinner sample_share(const Sample& args, int64_t index, int64_t first_tile, int64_t end_tile, const SampleMemory& memory) {
  Row row = row_in(memory, args.vocab);
  if (begin_draw(args, index, row) != 0 || greedy(args, index, row) || filtered(args, index, row)) return {-kInfinity, -1};
  const Winner winner = draw_tiles(row, first_tile, end_tile);
  return {winner.score, winner.id};
}

void sample_finish(const Sample& args, int64_t index, const SampleMemory& memory, const SampleWinner* shares, int64_t count) {
  Row row = row_in(memory, args.vocab);
  finish_row<float>(args, index, row, shares, count);
}

void sample_target(const Sample& args, int64_t index, const SampleMemory& memory, int64_t target) {
  Row row = row_in(memory, args.vocab);
  combine_tiles(row);
  args.status[index] = row.raw_nan ? 1 : 0;
  args.token[index] = target;
  write_logprobs<float>(args, index, row.raw_nan ? -1 : target, row);
}

}  // namespace gptfast::cpu::GPTFAST_ISA

#endif
