// The contract that cache_append_ and decode_attention have in common, and their caches as the kernels take them.
#pragma once

#include "check.h"
#include "cpu/paged.h"
#include "cpu/tensor.h"

namespace gptfast::cpu {

inline Integers integers(const at::Tensor& tensor, at::IntArrayRef shape, const at::Tensor& like, const char* name) {
  const auto type = tensor.scalar_type();
  TORCH_CHECK(type == at::kInt || type == at::kLong, name, " is ", type, ", allowed: int32, int64");
  check_shape(tensor, shape, like, name);
  return {tensor.const_data_ptr(), type == at::kLong};
}

// A cache [pages, H, 64, D] for tokens [B, Q, H, D]; returns the elements from page to page
inline int64_t check_cache(const at::Tensor& cache, const at::Tensor& tokens, const char* name) {
  const auto type = cache.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16, name, " is ", type, ", allowed: fp32, bf16");
  TORCH_CHECK(cache.dim() == 4 && cache.size(1) == tokens.size(2) && cache.size(2) == kPage && cache.size(3) == tokens.size(3), name,
              " has shape ", cache.sizes(), ", needs [pages, ", tokens.size(2), ", 64, ", tokens.size(3), "]");
  const int64_t heads = cache.size(1), size = cache.size(3);
  const bool dense = (size == 1 || cache.stride(3) == 1) && cache.stride(2) == size && (heads == 1 || cache.stride(1) == kPage * size);
  TORCH_CHECK(cache.numel() == 0 || dense, name, " has pages that are not contiguous: strides ", cache.strides());
  return cache.stride(0);
}

// Every position first..end of every row lies in the row's pages, and these in the cache
inline void check_pages(const PagedCache& cache, int64_t row, int64_t first, int64_t end, int64_t pages) {
  TORCH_CHECK(first >= 0 && end <= cache.row_pages * kPage, "row ", row, " has tokens ", first, " to ", end - 1, "; its pages hold ",
              cache.row_pages * kPage);
  for (int64_t position = first / kPage * kPage; position < end; position += kPage) {
    const int64_t page = cache.page(row, position);
    TORCH_CHECK(page >= 0 && page < pages, "row ", row, " names page ", page, "; the cache has ", pages);
  }
}

inline PagedCache paged_cache(const at::Tensor& tokens, const at::Tensor& k_cache, const at::Tensor& v_cache,
                              const at::Tensor& block_table) {
  TORCH_CHECK(tokens.dim() == 4, "tokens have ", tokens.dim(), " dimensions, need 4: [B, Q, H, D]");
  check_float(tokens, "tokens");
  check_contiguous(tokens, "tokens");
  PagedCache cache{};
  cache.key_stride = check_cache(k_cache, tokens, "k_cache");
  cache.value_stride = check_cache(v_cache, tokens, "v_cache");
  check_type(v_cache, k_cache.scalar_type(), "v_cache");
  TORCH_CHECK(v_cache.size(0) == k_cache.size(0), "v_cache has ", v_cache.size(0), " pages, k_cache ", k_cache.size(0));
  TORCH_CHECK(block_table.dim() == 2, "block_table has ", block_table.dim(), " dimensions, needs 2: [B, pages a row]");
  cache.row_pages = block_table.size(1);
  cache.table = integers(block_table, {tokens.size(0), cache.row_pages}, tokens, "block_table");
  cache.heads = tokens.size(2);
  cache.size = tokens.size(3);
  return cache;
}

}  // namespace gptfast::cpu
