// Packing of weights and its inverse. Compiled without contraction: a packed buffer has the same bits whichever instruction set made it.
#pragma once

#include "cpu/engine/product.h"

#ifdef GPTFAST_ISA

#include "cpu/vec.h"
#include "cpu/vec_math.h"

namespace gptfast::cpu::GPTFAST_ISA {
namespace {

constexpr float kLargest = 3.4028234663852886e38f;

// kWidth neighbouring outputs of one panel as columns of a matrix: lane i is output `first + i`, 0 from `count` outputs on
struct Lanes {
  const float* first;
  int64_t row_stride, column_stride;
  int count;

  inline __attribute__((always_inline)) Vec at(int64_t input) const {
    const float* place = first + input * column_stride;
    if (row_stride == 1) return load_lanes(place, count);
    float values[kWidth] = {};
    for (int i = 0; i < count; ++i) values[i] = place[i * row_stride];
    return load(values);
  }
};

// to the nearest bf16, halves to even, denormals as they are; the upper half of a NaN may be infinity, so it is made quiet
GPTFAST_INLINE Bits bf16_bits(Vec v) {
  const Bits bits = (Bits)v, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return v == v ? rounded : (bits >> 16) | 0x40u;
}

GPTFAST_INLINE Ints magnitude(Vec v) { return (Ints)((Bits)v & 0x7fffffffu); }

// v where it is a number that can be multiplied by, else 0
GPTFAST_INLINE Vec sound_or_zero(Vec v) { return choose(magnitude(v) <= magnitude(set(kLargest)), v, set(0.0f)); }

GPTFAST_INLINE void put(uint8_t* place, Bits words) { __builtin_memcpy(place, &words, sizeof(words)); }

void pack_single(const Lanes& lanes, int64_t inputs, uint8_t* out) {
  for (int64_t k = 0; k < inputs; ++k) put(out + k * 4 * engine::kPanel, (Bits)lanes.at(k));
}

void pack_pairs(const Lanes& lanes, int64_t inputs, uint8_t* out) {
  for (int64_t k = 0; k < inputs; k += 2, out += 4 * engine::kPanel) {
    const Bits second = k + 1 < inputs ? bf16_bits(lanes.at(k + 1)) : Bits{};
    put(out, bf16_bits(lanes.at(k)) | second << 16);
  }
}

// scale = max|w| / 127 of an output; codes clamp(round_half_even(w / scale), -127, 127), 0 where the scale is 0 or not finite
void pack_bytes(const Lanes& lanes, int64_t inputs, int64_t lane, uint8_t* out) {
  Ints largest = {}, sum = {};
  for (int64_t k = 0; k < inputs; ++k) {
    const Ints size = magnitude(lanes.at(k));
    largest = size > largest ? size : largest;
  }
  const Vec scale = (Vec)largest / set(127.0f);
  const Ints sound = (Ints)(scale > set(0.0f)) & (Ints)(magnitude(scale) <= magnitude(set(kLargest)));
  uint8_t* place = out + 4 * lane;
  for (int64_t k = 0; k < inputs; k += 4, place += 4 * engine::kPanel) {
    Bits word = {};
    for (int64_t b = 0; b < 4 && k + b < inputs; ++b) {
      const Ints code = whole(lanes.at(k + b) / scale, -127, 127) & sound;
      sum += code;
      word |= ((Bits)code & 0xffu) << static_cast<uint32_t>(8 * b);
    }
    put(place, word);
  }
  put(place, (Bits)scale);
  put(place + 4 * engine::kPanel, (Bits)(sum * 128));
}

// The scale of a group of weights: of 17 that bring its largest weight to between -7 and -9, each moved to where the squared error of its
// codes is least and rounded to bf16, the one with the least squared error. All in fp32, sums in the order of the inputs.
GPTFAST_INLINE Vec group_scale(const Vec* w, int64_t count) {
  Vec largest = set(0.0f);
  for (int64_t k = 0; k < count; ++k) largest = choose(magnitude(w[k]) > magnitude(largest), w[k], largest);
  Vec best = set(0.0f), least = set(__builtin_inff());
  for (int candidate = 0; candidate < 17; ++candidate) {
    const Vec inverse = sound_or_zero(set(-7.0f - 0.125f * static_cast<float>(candidate)) / largest);
    Vec products = set(0.0f), squares = set(0.0f);
    for (int64_t k = 0; k < count; ++k) {
      const Vec code = __builtin_convertvector(whole(w[k] * inverse, -8, 7), Vec);
      products += w[k] * code;
      squares += code * code;
    }
    const Vec scale = choose(squares > set(0.0f), (Vec)(bf16_bits(products / squares) << 16), set(0.0f));
    const Vec back = sound_or_zero(set(1.0f) / scale);
    Vec error = set(0.0f);
    for (int64_t k = 0; k < count; ++k) {
      const Vec rest = w[k] - scale * __builtin_convertvector(whole(w[k] * back, -8, 7), Vec);
      error += rest * rest;
    }
    const Ints better = error < least;
    best = choose(better, scale, best);
    least = choose(better, error, least);
  }
  return choose(magnitude(largest) <= magnitude(set(kLargest)), best, set(__builtin_nanf("")));
}

void pack_groups(const Lanes& lanes, int64_t inputs, int64_t lane, uint8_t* out) {
  constexpr int64_t kWords = engine::kGroupWords;
  for (int64_t start = 0; start < inputs; start += engine::kGroup, out += engine::kGroupBytes) {
    const int64_t count = inputs - start < engine::kGroup ? inputs - start : engine::kGroup;
    Vec values[engine::kGroup] = {};
    for (int64_t k = 0; k < count; ++k) values[k] = lanes.at(start + k);
    const Vec scale = group_scale(values, count), inverse = sound_or_zero(set(1.0f) / scale);
    for (int64_t word = 0; word < kWords; ++word) {
      Bits codes = {};
      for (int64_t i = 0; i < 8; ++i) {  // input 8 word + i: the low half of byte i, or the high one of byte i - 4
        const Vec value = choose((Ints)(scale == scale), values[8 * word + i], set(0.0f));
        codes |= (Bits)(whole(value * inverse, -8, 7) + 8) << static_cast<uint32_t>(8 * (i % 4) + i / 4 * 4);
      }
      put(out + 4 * (word * engine::kPanel + lane), codes);
    }
    const Half rounded = __builtin_convertvector(bf16_bits(scale), Half);
    __builtin_memcpy(out + 4 * kWords * engine::kPanel + 2 * lane, &rounded, sizeof(rounded));
  }
}

}  // namespace

void pack_panels(engine::Format format, const float* weight, int64_t row_stride, int64_t column_stride, int64_t outputs, int64_t inputs,
                 int64_t first_panel, int64_t end_panel, uint8_t* packed) {
  using engine::Format;
  const int64_t bytes = engine::panel_bytes(format, inputs);
  for (int64_t panel = first_panel; panel < end_panel; ++panel) {
    uint8_t* out = packed + panel * bytes;
    for (int64_t lane = 0; lane < engine::kPanel; lane += kWidth) {
      const int64_t output = panel * engine::kPanel + lane, left = outputs - output < 0 ? 0 : outputs - output;
      const Lanes lanes{weight + output * row_stride, row_stride, column_stride, left < kWidth ? static_cast<int>(left) : kWidth};
      switch (format) {
        case Format::fp32: pack_single(lanes, inputs, out + 4 * lane); break;
        case Format::bf16: pack_pairs(lanes, inputs, out + 4 * lane); break;
        case Format::int8: pack_bytes(lanes, inputs, lane, out); break;
        case Format::int4: pack_groups(lanes, inputs, lane, out); break;
      }
    }
  }
}

void unpack_row(const engine::PackedWeight& weight, int64_t output, float* values) {
  using engine::Format;
  const int64_t lane = output % engine::kPanel, inputs = weight.inputs;
  const uint8_t* panel = weight.data + output / engine::kPanel * engine::panel_bytes(weight.format, inputs);
  const auto word = [&](int64_t index) { return panel + 4 * (index * engine::kPanel + lane); };
  const auto from_bf16 = [](const uint8_t* place) {
    const uint32_t bits = static_cast<uint32_t>(read<uint16_t>(place)) << 16;
    return read<float>(&bits);
  };
  switch (weight.format) {
    case Format::fp32:
      for (int64_t k = 0; k < inputs; ++k) values[k] = read<float>(word(k));
      break;
    case Format::bf16:
      for (int64_t k = 0; k < inputs; ++k) values[k] = from_bf16(word(k / 2) + 2 * (k % 2));
      break;
    case Format::int8: {
      const float scale = read<float>(word(engine::divide_up(inputs, 4)));
      for (int64_t k = 0; k < inputs; ++k) values[k] = static_cast<float>(read<int8_t>(word(k / 4) + k % 4)) * scale;
      break;
    }
    case Format::int4:
      for (int64_t k = 0; k < inputs; ++k) {
        const int64_t group = k / engine::kGroup, place = k % engine::kGroup;
        const uint8_t* codes = panel + group * engine::kGroupBytes;
        const float scale = from_bf16(codes + 4 * engine::kGroupWords * engine::kPanel + 2 * lane);
        const uint8_t both = codes[4 * (place / 8 * engine::kPanel + lane) + place % 4];
        values[k] = static_cast<float>((place % 8 < 4 ? both & 15 : both >> 4) - 8) * scale;
      }
  }
}

}  // namespace gptfast::cpu::GPTFAST_ISA

#endif
