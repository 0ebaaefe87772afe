// Products of int8 and int4 weights: rows are quantised too, sums of codes are exact integers, and each fp32 operation that follows is
// rounded by itself (the unit is compiled without contraction), so that the bits are the same on every instruction set.
#pragma once

#include "cpu/engine/product.h"

#ifdef GPTFAST_ISA

#include "cpu/engine/product_tile.h"
#include "cpu/vec_math.h"

namespace gptfast::cpu::GPTFAST_ISA {
namespace {

// sum + four products of unsigned bytes with signed ones
#if defined(__AVX512VNNI__)
GPTFAST_INLINE Ints add_dots(Ints sum, Bits bytes, Bits codes) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)bytes, (__m512i)codes);
}
#elif defined(__AVX2__)
// bytes * codes of two neighbours must fit 16 bits
GPTFAST_INLINE Ints add_dots(Ints sum, Bits bytes, Bits codes) {
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)bytes, (__m256i)codes);
  return sum + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#else
GPTFAST_INLINE Ints add_dots(Ints sum, Bits bytes, Bits codes) {
  for (int shift = 0; shift < 32; shift += 8) sum += (Ints)((bytes >> shift) & 0xffu) * ((Ints)(codes << (24 - shift)) >> 24);
  return sum;
}
#endif

// Four int8 codes a word. With VNNI a row's codes are stored plus 128, unsigned, and the sum of the weights' codes x 128 is taken off at
// the end; elsewhere they are signed.
struct ByteWords {
  using Sum = Ints;
#if defined(__AVX512VNNI__)
  static constexpr int kShift = 128;
  GPTFAST_INLINE Ints add(Ints sum, Bits left, Bits right) { return add_dots(sum, left, right); }
#elif defined(__AVX2__)
  static constexpr int kShift = 0;
  GPTFAST_INLINE Ints add(Ints sum, Bits left, Bits right) {
    const __m256i signs = (__m256i)right;
    return add_dots(sum, (Bits)_mm256_abs_epi8(signs), (Bits)_mm256_sign_epi8((__m256i)left, signs));
  }
#else
  static constexpr int kShift = 0;
  GPTFAST_INLINE Ints add(Ints sum, Bits left, Bits right) {
    for (int shift = 24; shift >= 0; shift -= 8) sum += ((Ints)(left << shift) >> 24) * ((Ints)(right << shift) >> 24);
    return sum;
  }
#endif
};

// What lies before the words of rows: a scale for each row (int4: for each row and group, and -8 times the sum of the group's codes)
struct QuantisedRows {
  float* scales;     // [rows, groups]
  int32_t* offsets;  // [rows, groups], int4 only
  uint32_t* words;

  QuantisedRows(engine::Format format, void* prepared, int64_t rows, int64_t inputs) {
    const int64_t groups = format == engine::Format::int4 ? engine::divide_up(inputs, engine::kGroup) : 1;
    scales = static_cast<float*>(prepared);
    offsets = reinterpret_cast<int32_t*>(scales + rows * groups);
    words = format == engine::Format::int4 ? reinterpret_cast<uint32_t*>(offsets + rows * groups) : reinterpret_cast<uint32_t*>(offsets);
  }
};

// max|x| / 127; NaN where one is NaN
GPTFAST_INLINE float row_scale(const float* x, int64_t count) {
  Ints largest = {};
  for_columns(count, [&](int64_t i, int lanes) {
    const Ints magnitude = (Ints)((Bits)load_lanes(x + i, lanes) & 0x7fffffffu);  // NaN above infinity, above all numbers
    largest = magnitude > largest ? magnitude : largest;
  });
  int32_t bits = 0;
  for (int i = 0; i < kWidth; ++i) bits = largest[i] > bits ? largest[i] : bits;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value / 127.0f;
}

// Codes of x[0 .. count) plus `shift` as bytes, up to whole words; returns the sum of the codes
GPTFAST_INLINE int32_t quantise(const float* x, int64_t count, float scale, int shift, uint32_t* words) {
  typedef int8_t Bytes __attribute__((vector_size(kWidth)));
  const bool sound = scale > 0 && scale < __builtin_inff();
  Ints sums = {};
  int8_t* codes = reinterpret_cast<int8_t*>(words);
  for_columns(count, [&](int64_t i, int lanes) {
    Ints code = {};
    if (sound) code = whole(load_lanes(x + i, lanes) / set(scale), -127, 127);
    sums += code;
    const Bytes bytes = __builtin_convertvector(code + shift, Bytes);
    __builtin_memcpy(codes + i, &bytes, lanes == kWidth ? kWidth : (lanes + 3) / 4 * 4);
  });
  int32_t total = 0;
  for (int i = 0; i < kWidth; ++i) total += sums[i];
  return total;
}

void prepare_bytes(const float* x, int64_t x_stride, const RowTiles& tiles, int64_t inputs, int64_t first_row, int64_t end_row,
                   const QuantisedRows& out) {
  for (int64_t row = first_row; row < end_row; ++row) out.scales[row] = row_scale(x + row * x_stride, inputs);
  interleave_rows<4>(tiles, inputs, first_row, end_row, out.words, [&](int64_t row, int64_t first, int64_t count, uint32_t* words) {
    quantise(x + row * x_stride + first, count, out.scales[row], ByteWords::kShift, words);
  });
}

void prepare_groups(const float* x, int64_t x_stride, const RowTiles& tiles, int64_t inputs, int64_t first_row, int64_t end_row,
                    const QuantisedRows& out) {
  const int64_t groups = engine::divide_up(inputs, engine::kGroup);
  interleave_rows<4>(tiles, groups * engine::kGroup, first_row, end_row, out.words,
                     [&](int64_t row, int64_t first, int64_t count, uint32_t* words) {
    __builtin_memset(words, 0, count);
    for (int64_t start = first; start < first + count; start += engine::kGroup) {
      const float* values = x + row * x_stride + start;
      const int64_t present = inputs - start < engine::kGroup ? inputs - start : engine::kGroup;
      const int64_t place = row * groups + start / engine::kGroup;
      out.scales[place] = row_scale(values, present);
      out.offsets[place] = -8 * quantise(values, present, out.scales[place], 0, words + (start - first) / 4);
    }
  });
}

// int32 sums [rows, kPanel] of codes become fp32: each by its row's and its output's scale
void scale_sums(const uint8_t* scales, const float* row_scales, int64_t rows, uint32_t* sums) {
  for (int64_t r = 0; r < rows; ++r, sums += engine::kPanel) {
    for (int64_t i = 0; i < engine::kPanel; i += kWidth) {
      Ints sum = read<Ints>(sums + i);
      if (ByteWords::kShift != 0) sum -= read<Ints>(scales + 4 * (engine::kPanel + i));
      const Vec result = __builtin_convertvector(sum, Vec) * (set(row_scales[r]) * read<Vec>(scales + 4 * i));
      __builtin_memcpy(sums + i, &result, sizeof(result));
    }
  }
}

constexpr int64_t kBlockGroups = 8;  // groups that stay in the first-level cache from tile to tile

// sums[kCount, kPanel] += the terms of `count` groups, in order; x and the rows' scales and offsets begin with the first of them
template <int kCount>
void group_tile(const uint8_t* weights, const uint32_t* x, const float* scales, const int32_t* offsets, int64_t row_groups, int64_t count,
                float* sums) {
  constexpr int kColumns = kTileVectors<kCount>;
  for (int column = 0; column < kPanelVectors; column += kColumns) {
    for (int64_t group = 0; group < count; ++group) {
      const uint8_t* right = weights + group * engine::kGroupBytes + column * sizeof(Vec);
      const uint32_t* left = x + group * 2 * engine::kGroupWords * kCount;
      Ints total[kCount][kColumns];
#pragma GCC unroll 12
      for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 8
        for (int c = 0; c < kColumns; ++c) total[r][c] = Ints{} + offsets[r * row_groups + group];
      }
      for (int64_t word = 0; word < engine::kGroupWords; ++word, right += 4 * engine::kPanel, left += 2 * kCount) {
        Bits low[kColumns], high[kColumns];
#pragma GCC unroll 8
        for (int c = 0; c < kColumns; ++c) {
          const Bits codes = read<Bits>(right + c * sizeof(Vec));
          low[c] = codes & 0x0f0f0f0fu;
          high[c] = (codes >> 4) & 0x0f0f0f0fu;
        }
#pragma GCC unroll 12
        for (int r = 0; r < kCount; ++r) {
          const Bits first = word_in_all(left + r), second = word_in_all(left + kCount + r);
#pragma GCC unroll 8
          for (int c = 0; c < kColumns; ++c) total[r][c] = add_dots(add_dots(total[r][c], low[c], first), high[c], second);
        }
      }
      const uint8_t* ends = weights + group * engine::kGroupBytes + engine::kGroupWords * 4 * engine::kPanel;
      const bf16* own = reinterpret_cast<const bf16*>(ends) + column * kWidth;
#pragma GCC unroll 12
      for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 8
        for (int c = 0; c < kColumns; ++c) {
          float* place = sums + r * engine::kPanel + (column + c) * kWidth;
          const Vec scale = set(scales[r * row_groups + group]) * load(own + c * kWidth);
          store(place, load(place) + __builtin_convertvector(total[r][c], Vec) * scale);
        }
      }
    }
  }
}

using GroupFunction = void (*)(const uint8_t*, const uint32_t*, const float*, const int32_t*, int64_t, int64_t, float*);

template <int kCount = kTileRows>
GroupFunction group_tile_for(int count) {
  if constexpr (kCount > 1) {
    if (count < kCount) return group_tile_for<kCount - 1>(count);
  }
  return group_tile<kCount>;
}

void group_sums(const uint8_t* panel, const QuantisedRows& x, const RowTiles& tiles, int64_t first_tile, int64_t end_tile, int64_t inputs,
                float* sums) {
  const int64_t groups = engine::divide_up(inputs, engine::kGroup), first_row = tiles.first(first_tile);
  __builtin_memset(sums, 0, (tiles.first(end_tile) - first_row) * engine::kPanel * sizeof(float));
  for (int64_t group = 0; group < groups; group += kBlockGroups) {
    const int64_t count = groups - group < kBlockGroups ? groups - group : kBlockGroups;
    for (int64_t tile = first_tile; tile < end_tile; ++tile) {
      const int64_t row = tiles.first(tile), place = row * groups + group;
      const int size = tiles.size(tile);
      const uint32_t* words = x.words + 2 * engine::kGroupWords * (row * groups + group * size);
      group_tile_for(size)(panel + group * engine::kGroupBytes, words, x.scales + place, x.offsets + place, groups, count,
                           sums + (row - first_row) * engine::kPanel);
    }
  }
}

}  // namespace

void prepare_quantised(engine::Format format, const float* x, int64_t x_stride, int64_t rows, int64_t inputs, int64_t first_row,
                       int64_t end_row, void* prepared) {
  const auto prepare = format == engine::Format::int8 ? prepare_bytes : prepare_groups;
  prepare(x, x_stride, RowTiles(rows), inputs, first_row, end_row, QuantisedRows(format, prepared, rows, inputs));
}

void quantised_sums(engine::Format format, const uint8_t* panel, int64_t inputs, const void* prepared, int64_t rows, int64_t first_tile,
                    int64_t end_tile, uint32_t* sums) {
  const QuantisedRows x(format, const_cast<void*>(prepared), rows, inputs);
  const RowTiles tiles(rows);
  if (format == engine::Format::int4) return group_sums(panel, x, tiles, first_tile, end_tile, inputs, reinterpret_cast<float*>(sums));
  const int64_t words = engine::divide_up(inputs, 4), first_row = tiles.first(first_tile);
  panel_sums<ByteWords>(panel, x.words, tiles, first_tile, end_tile, words, engine::kBlock, sums);
  scale_sums(panel + 4 * engine::kPanel * words, x.scales + first_row, tiles.first(end_tile) - first_row, sums);
}

}  // namespace gptfast::cpu::GPTFAST_ISA

#endif
