// The loop of every product: a tile of a few rows by the outputs of one panel. Operands are 32-bit words - one fp32, two bf16, four int8
// neighbours along the inputs - of which weights lie [word][kPanel], rows [word][rows of the tile], and both are read once in that order.
#pragma once

#include "cpu/engine/product.h"
#include "cpu/vec.h"

namespace gptfast::cpu::GPTFAST_ISA {
namespace {

constexpr int kPanelVectors = static_cast<int>(engine::kPanel) / kWidth;

#if defined(__AVX512F__)
constexpr int kTileRows = 12;  // 12 rows x 2 registers of sums, of 32
#elif defined(__AVX2__)
constexpr int kTileRows = 6;  // 6 x 2 of 16
#else
constexpr int kTileRows = 4;
#endif

// Registers of columns that a pass over a tile takes: as many as leave room for the operands
template <int kCount>
constexpr int kTileVectors = kPanelVectors == 2 ? 2 : kPanelVectors == 4 ? (kCount <= 3 ? 4 : 2) : kCount == 1 ? 8 : kCount == 2 ? 4 : 2;

// How rows are cut into tiles: as few as there can be, and of about equal size
struct RowTiles {
  int64_t count, rows, larger;  // the first `larger` tiles have a row more than the others

  explicit RowTiles(int64_t all) : count(engine::divide_up(all, kTileRows)), rows(all / count), larger(all % count) {}
  int64_t first(int64_t tile) const { return tile * rows + (tile < larger ? tile : larger); }
  int size(int64_t tile) const { return static_cast<int>(rows + (tile < larger)); }
};

constexpr int64_t kChunkTiles = 40;  // tiles whose sums are held at a time: less than 64 KB of stack
constexpr int64_t kChunkRows = kChunkTiles * kTileRows;

GPTFAST_INLINE Bits word_in_all(const uint32_t* word) { return (Bits)set(read<float>(word)); }

// sums[kCount, kPanel] = or += the products of `words` words. A Kind has the type of a sum and add(sum, row's word, weights).
template <typename Kind, int kCount>
void product_tile(const uint8_t* weights, const uint32_t* x, int64_t words, bool first, void* sums) {
  using Sum = typename Kind::Sum;
  constexpr int kColumns = kTileVectors<kCount>;
  for (int column = 0; column < kPanelVectors; column += kColumns) {
    const uint8_t* right = weights + column * sizeof(Vec);
    Sum total[kCount][kColumns] = {};
    for (int64_t word = 0; word < words; ++word, right += 4 * engine::kPanel) {
      Bits columns[kColumns];
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) columns[c] = read<Bits>(right + c * sizeof(Vec));
#pragma GCC unroll 12
      for (int r = 0; r < kCount; ++r) {
        const Bits left = word_in_all(x + word * kCount + r);
#pragma GCC unroll 8
        for (int c = 0; c < kColumns; ++c) total[r][c] = Kind::add(total[r][c], left, columns[c]);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) {
        uint8_t* place = static_cast<uint8_t*>(sums) + (r * kPanelVectors + column + c) * sizeof(Vec);
        if (!first) total[r][c] = read<Sum>(place) + total[r][c];
        __builtin_memcpy(place, &total[r][c], sizeof(Sum));
      }
    }
  }
}

using TileFunction = void (*)(const uint8_t* weights, const uint32_t* x, int64_t words, bool first, void* sums);

template <typename Kind, int kCount = kTileRows>
TileFunction tile_for(int count) {
  if constexpr (kCount > 1) {
    if (count < kCount) return tile_for<Kind, kCount - 1>(count);
  }
  return product_tile<Kind, kCount>;
}

// sums[rows of the tiles, kPanel] of one panel, in blocks of `block` words that stay in the first-level cache from tile to tile
template <typename Kind>
GPTFAST_INLINE void panel_sums(const uint8_t* panel, const uint32_t* x, const RowTiles& tiles, int64_t first_tile, int64_t end_tile,
                               int64_t words, int64_t block, uint32_t* sums) {
  const int64_t first_row = tiles.first(first_tile);
  for (int64_t word = 0; word < words; word += block) {
    const int64_t count = words - word < block ? words - word : block;
    for (int64_t tile = first_tile; tile < end_tile; ++tile) {
      const int64_t row = tiles.first(tile);
      const int size = tiles.size(tile);
      uint32_t* place = sums + (row - first_row) * engine::kPanel;
      tile_for<Kind>(size)(panel + word * 4 * engine::kPanel, x + row * words + word * size, count, word == 0, place);
    }
  }
}

// Rows first_row .. end_row of x [rows, K] as words [word][rows of a tile] at `out`. make(row, first, count, words) writes the words of
// these `count` inputs, of which kInputs share a word.
template <int kInputs, typename Make>
GPTFAST_INLINE void interleave_rows(const RowTiles& tiles, int64_t inputs, int64_t first_row, int64_t end_row, uint32_t* out, Make make) {
  constexpr int64_t kChunk = 64;  // words
  const int64_t words = engine::divide_up(inputs, kInputs);
  uint32_t made[kTileRows][kChunk];
  for (int64_t tile = 0; tile < tiles.count; ++tile) {
    const int64_t row = tiles.first(tile), size = tiles.size(tile);
    const int64_t begin = row < first_row ? first_row - row : 0, end = row + size < end_row ? size : end_row - row;
    for (int64_t word = 0; begin < end && word < words; word += kChunk) {
      const int64_t chunk = words - word < kChunk ? words - word : kChunk, input = word * kInputs;
      const int64_t count = inputs - input < kChunk * kInputs ? inputs - input : kChunk * kInputs;
      for (int64_t r = begin; r < end; ++r) make(row + r, input, count, made[r]);
      uint32_t* place = out + row * words + word * size;
      for (int64_t w = 0; w < chunk; ++w) {
        for (int64_t r = begin; r < end; ++r) place[w * size + r] = made[r][w];
      }
    }
  }
}

}  // namespace
}  // namespace gptfast::cpu::GPTFAST_ISA
