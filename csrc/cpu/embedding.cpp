// embedding on the CPU: checks, memory, threads. The arithmetic is in embedding_kernel.h.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "check.h"
#include "cpu/embedding_kernel.h"
#include "cpu/tensor.h"

namespace gptfast::cpu {
namespace {

void check_ids(const at::Tensor& ids, const char* name) {
  const auto type = ids.scalar_type();
  TORCH_CHECK(type == at::kLong || type == at::kInt, name, " is ", type, ", allowed: int64, int32");
  check_rows(ids, name);
}

Ids ids_of(const at::Tensor& ids, int64_t size) { return {ids.scalar_type() == at::kLong, ids.const_data_ptr(), size}; }

at::Tensor embedding_cpu(const at::Tensor& ids, const at::Tensor& positions, const at::Tensor& wte, const at::Tensor& wpe) {
  check_ids(ids, "ids");
  check_ids(positions, "positions");
  check_shape(positions, ids.sizes(), ids, "positions");
  check_rows(wte, "wte");
  check_float(wte, "wte");
  check_shape(wpe, {wpe.size(0), wte.size(1)}, wte, "wpe");
  check_type(wpe, wte.scalar_type(), "wpe");
  at::Tensor y = at::empty({ids.size(0), ids.size(1), wte.size(1)}, wte.options());
  Embedding args{};
  args.type = type_of(wte);
  args.columns = wte.size(1);
  args.ids = ids_of(ids, wte.size(0));
  args.positions = ids_of(positions, wpe.size(0));
  args.wte = wte.const_data_ptr();
  args.wpe = wpe.const_data_ptr();
  args.y = y.mutable_data_ptr();
  at::parallel_for(0, ids.numel(), grain(args.columns), [&](int64_t begin, int64_t end) {
    GPTFAST_CALL(embedding_forward, args, begin, end);
  });
  return y;
}

// dy's rows added up by id: [size, C] in fp32
at::Tensor table_gradient(const at::Tensor& dy, const at::Tensor& ids, int64_t size) {
  const int64_t columns = dy.size(2);
  at::Tensor sums = at::empty({size, columns}, dy.options().dtype(at::kFloat));
  at::Tensor ends = at::empty({size}, at::kLong), places = at::empty({ids.numel()}, at::kLong);
  GPTFAST_CALL(embedding_sort, ids_of(ids, size), ids.numel(), ends.mutable_data_ptr<int64_t>(), places.mutable_data_ptr<int64_t>());
  EmbeddingSums args{};
  args.type = type_of(dy);
  args.columns = columns;
  args.dy = dy.const_data_ptr();
  args.ends = ends.const_data_ptr<int64_t>();
  args.places = places.const_data_ptr<int64_t>();
  args.sums = sums.mutable_data_ptr<float>();
  args.stream = past_caches(sums);
  at::parallel_for(0, size, grain(columns), [&](int64_t begin, int64_t end) { GPTFAST_CALL(embedding_sums, args, begin, end); });
  return sums;
}

std::tuple<at::Tensor, at::Tensor> embedding_backward_cpu(const at::Tensor& dy, const at::Tensor& ids, const at::Tensor& positions,
                                                          int64_t vocab, int64_t context) {
  check_ids(ids, "ids");
  check_ids(positions, "positions");
  check_shape(positions, ids.sizes(), ids, "positions");
  TORCH_CHECK(dy.dim() == 3, "dy has ", dy.dim(), " dimensions, needs 3: [B, T, C]");
  check_float(dy, "dy");
  check_shape(dy, {ids.size(0), ids.size(1), dy.size(2)}, ids, "dy");
  TORCH_CHECK(vocab >= 0 && context >= 0, "vocab is ", vocab, " and context ", context, ", allowed: 0 or more");
  return {table_gradient(dy, ids, vocab), table_gradient(dy, positions, context)};
}

}  // namespace
}  // namespace gptfast::cpu

TORCH_LIBRARY_IMPL(gptfast, CPU, m) {
  m.impl("embedding", TORCH_FN(gptfast::cpu::embedding_cpu));
  m.impl("embedding_backward", TORCH_FN(gptfast::cpu::embedding_backward_cpu));
}
