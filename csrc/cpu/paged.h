// What the kernels of the paged cache share: pages of 64 tokens, and tables of int32 or int64.
#pragma once

#include <stdint.h>

namespace gptfast::cpu {

constexpr int64_t kPage = 64;

// Integers of either width, as block tables, starts and lengths come
struct Integers {
  const void* data;
  bool wide;  // int64, else int32

  inline __attribute__((always_inline)) int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

// Caches [pages, H, 64, D], each page contiguous, and where the pages of a row are
struct PagedCache {
  void *keys, *values;
  int64_t key_stride, value_stride;  // elements from page to page
  int64_t heads, size;               // H, D
  Integers table;                    // [B, pages a row]
  int64_t row_pages;

  inline __attribute__((always_inline)) int64_t page(int64_t row, int64_t position) const {
    return table[row * row_pages + position / kPage];
  }
};

}  // namespace gptfast::cpu
