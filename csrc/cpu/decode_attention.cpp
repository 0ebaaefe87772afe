// decode_attention on the CPU: checks, memory, threads. The arithmetic is in decode_attention_kernel.h.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "cpu/decode_attention_kernel.h"
#include "cpu/paged_tensor.h"

namespace gptfast::cpu {
namespace {

at::Tensor decode_attention_cpu(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache,
                                const at::Tensor& block_table, const at::Tensor& lengths, double scale) {
  DecodeAttention args{};
  args.cache = paged_cache(q, k_cache, v_cache, block_table);
  args.lengths = integers(lengths, {q.size(0)}, q, "lengths");
  at::Tensor o = at::empty_like(q);
  if (q.numel() == 0) return o;
  for (int64_t row = 0; row < q.size(0); ++row) {
    check_pages(args.cache, row, 0, args.lengths[row], k_cache.size(0));
    TORCH_CHECK(args.lengths[row] >= 0, "lengths hold ", args.lengths[row]);
  }
  args.type = type_of(q);
  args.cache_type = type_of(k_cache);
  args.queries = q.size(1);
  args.q = q.const_data_ptr();
  args.o = o.mutable_data_ptr();
  args.q_stride = args.o_stride = args.cache.heads * args.cache.size;
  args.cache.keys = const_cast<void*>(k_cache.const_data_ptr());
  args.cache.values = const_cast<void*>(v_cache.const_data_ptr());
  args.scale = static_cast<float>(scale);
  const int64_t items = q.size(0) * args.cache.heads * ((args.queries + kQueryBlock - 1) / kQueryBlock);
  const int64_t room = decode_attention_room(args.cache.size), threads = std::min<int64_t>(items, at::get_num_threads());
  at::Tensor scratch = at::empty({threads, room}, q.options().dtype(at::kFloat));
  float* memory = scratch.mutable_data_ptr<float>();
  at::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    GPTFAST_CALL(decode_attention, args, begin, end, memory + at::get_thread_num() * room);
  });
  return o;
}

}  // namespace
}  // namespace gptfast::cpu

TORCH_LIBRARY_IMPL(gptfast, CPU, m) { m.impl("decode_attention", TORCH_FN(gptfast::cpu::decode_attention_cpu)); }
