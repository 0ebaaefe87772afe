// cache_append_ on the CPU: checks, threads. The copies are in cache_append__kernel.h.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "cpu/cache_append__kernel.h"
#include "cpu/paged_tensor.h"

namespace gptfast::cpu {
namespace {

// block_table and start may not name a place twice: rows are written in parallel
void cache_append_cpu(const at::Tensor& k_cache, const at::Tensor& v_cache, const at::Tensor& k, const at::Tensor& v,
                      const at::Tensor& block_table, const at::Tensor& start) {
  CacheAppend args{};
  args.cache = paged_cache(k, k_cache, v_cache, block_table);
  check_float(v, "v");
  check_shape(v, k.sizes(), k, "v");
  args.start = integers(start, {k.size(0)}, k, "start");
  if (k.numel() == 0) return;
  args.tokens = k.size(1);
  for (int64_t row = 0; row < k.size(0); ++row) {
    check_pages(args.cache, row, args.start[row], args.start[row] + args.tokens, k_cache.size(0));
  }
  args.key_type = type_of(k);
  args.value_type = type_of(v);
  args.cache_type = type_of(k_cache);
  args.keys = k.const_data_ptr();
  args.values = v.const_data_ptr();
  args.key_stride = args.value_stride = args.cache.heads * args.cache.size;
  args.cache.keys = k_cache.mutable_data_ptr();
  args.cache.values = v_cache.mutable_data_ptr();
  at::parallel_for(0, k.size(0) * args.tokens, grain(args.key_stride), [&](int64_t begin, int64_t end) {
    GPTFAST_CALL(cache_append, args, begin, end);
  });
}

}  // namespace
}  // namespace gptfast::cpu

TORCH_LIBRARY_IMPL(gptfast, CPU, m) { m.impl("cache_append_", TORCH_FN(gptfast::cpu::cache_append_cpu)); }
