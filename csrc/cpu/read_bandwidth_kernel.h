// Reads memory and does nothing else: the rate that a token's read of the weights is held against. Which pattern is fastest differs
// between CPUs and from hour to hour on a shared one, so there are several, and read_bandwidth.h tries them all.
#pragma once

#include <stdint.h>

#include "cpu/isa.h"

namespace gptfast::cpu {

enum class Prefetch { none, near, once };  // the CPU's own only; into every cache; past the outer ones

struct ReadPattern {
  int streams, lines;  // places that are read in turn, and cache lines at each
  Prefetch prefetch;
  int ahead;           // bytes
};

}  // namespace gptfast::cpu

// A value that depends on all bytes; data is aligned to a cache line. What is left behind whole turns of the pattern is not read.
GPTFAST_PER_ISA(uint64_t read_memory(const ReadPattern& pattern, const uint8_t* data, int64_t bytes))

#ifdef GPTFAST_ISA

#include "cpu/vec.h"

namespace gptfast::cpu::GPTFAST_ISA {
namespace {

constexpr int kLine = 64;
constexpr int kPieces = kLine / static_cast<int>(sizeof(Bits));

template <int kStreams, int kLines, Prefetch kPrefetch>
uint64_t read_pattern(const uint8_t* data, int64_t bytes, int ahead) {
  constexpr int64_t step = kLine * kLines;
  const int64_t part = bytes / kStreams / step * step;
  Bits total[kLines] = {};
  for (int64_t offset = 0; offset < part; offset += step) {
#pragma GCC unroll 8
    for (int stream = 0; stream < kStreams; ++stream) {
      const uint8_t* place = data + stream * part + offset;
#pragma GCC unroll 16
      for (int line = 0; line < kLines; ++line) {
        if (kPrefetch == Prefetch::near) __builtin_prefetch(place + line * kLine + ahead, 0, 3);
        if (kPrefetch == Prefetch::once) __builtin_prefetch(place + line * kLine + ahead, 0, 0);
#pragma GCC unroll 4
        for (int piece = 0; piece < kPieces; ++piece) {
          total[line] ^= read<Bits>(place + line * kLine + piece * static_cast<int>(sizeof(Bits)));
        }
      }
    }
  }
  uint64_t value = 0;
  for (int line = 0; line < kLines; ++line) {
    for (int lane = 0; lane < kWidth; ++lane) value += total[line][lane];
  }
  return value;
}

template <int kStreams, int kLines>
uint64_t read_shape(const ReadPattern& pattern, const uint8_t* data, int64_t bytes) {
  switch (pattern.prefetch) {
    case Prefetch::none: return read_pattern<kStreams, kLines, Prefetch::none>(data, bytes, 0);
    case Prefetch::near: return read_pattern<kStreams, kLines, Prefetch::near>(data, bytes, pattern.ahead);
    case Prefetch::once: return read_pattern<kStreams, kLines, Prefetch::once>(data, bytes, pattern.ahead);
  }
  return 0;
}

}  // namespace

uint64_t read_memory(const ReadPattern& pattern, const uint8_t* data, int64_t bytes) {
  switch (pattern.streams * 100 + pattern.lines) {
    case 104: return read_shape<1, 4>(pattern, data, bytes);
    case 108: return read_shape<1, 8>(pattern, data, bytes);
    case 116: return read_shape<1, 16>(pattern, data, bytes);
    case 208: return read_shape<2, 8>(pattern, data, bytes);
    case 404: return read_shape<4, 4>(pattern, data, bytes);
    case 408: return read_shape<4, 8>(pattern, data, bytes);
    case 802: return read_shape<8, 2>(pattern, data, bytes);
    default: return 0;
  }
}

}  // namespace gptfast::cpu::GPTFAST_ISA

#endif
