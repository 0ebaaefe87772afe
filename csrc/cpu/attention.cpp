// attention on the CPU: checks, memory, threads. The arithmetic is in attention_kernel.h and attention_backward_kernel.h.
// A head is one task, whole: its sums have one order whatever the number of threads.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>
#include <unordered_map>

#include "check.h"
#include "cpu/attention_backward_kernel.h"
#include "cpu/attention_kernel.h"
#include "cpu/tensor.h"

namespace gptfast::cpu {
namespace {

void check_heads(const at::Tensor& tensor, const at::Tensor& q, const char* name) {
  TORCH_CHECK(tensor.dim() == 4 && tensor.sizes() == q.sizes(), name, " has shape ", tensor.sizes(), ", q has ", q.sizes());
  check_type(tensor, q.scalar_type(), name);
  TORCH_CHECK(tensor.numel() == 0 || tensor.stride(3) == 1, name, " has strides ", tensor.strides(), ", the last must be 1");
}

void check_inputs(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, OptionalTensor document_ids, double dropout_p,
                  OptionalTensor seed) {
  TORCH_CHECK(q.dim() == 4, "q has ", q.dim(), " dimensions, needs 4: [B, T, H, D]");
  check_float(q, "q");
  check_heads(q, q, "q");
  check_heads(k, q, "k");
  check_heads(v, q, "v");
  const int64_t size = q.size(3);
  TORCH_CHECK(size == 32 || size == 40 || size == 64 || size == 80 || size == 96 || size == 128, "the head size is ", size,
              ", allowed: 32, 40, 64, 80, 96, 128");
  if (has(document_ids)) {
    const at::IntArrayRef shape = q.sizes().slice(0, 2);
    TORCH_CHECK(document_ids->sizes() == shape, "document_ids has shape ", document_ids->sizes(), ", needs ", shape);
    TORCH_CHECK(at::isIntegralType(document_ids->scalar_type(), false), "document_ids is ", document_ids->scalar_type(),
                ", allowed: integers");
  }
  TORCH_CHECK(dropout_p >= 0 && dropout_p <= 1, "dropout_p is ", dropout_p, ", allowed: 0 to 1");
  if (dropout_p == 0) return;
  TORCH_CHECK(has(seed), "dropout_p is ", dropout_p, " and there is no seed");
  check_shape(*seed, {1}, q, "seed");
  check_type(*seed, at::kLong, "seed");
}

// Small labels for documents, by first appearance in their batch row, so that ids of any size compare as 32 bits; -1 for padding
template <typename Id>
void label(const at::Tensor& ids, int32_t* labels) {
  const Id* data = ids.const_data_ptr<Id>();
  for (int64_t b = 0; b < ids.size(0); ++b) {
    std::unordered_map<int64_t, int32_t> known;
    int64_t last = -1;
    int32_t current = -1;
    for (int64_t t = 0; t < ids.size(1); ++t) {
      const auto id = static_cast<int64_t>(data[b * ids.stride(0) + t * ids.stride(1)]);
      if (id != last) current = id < 0 ? -1 : known.emplace(id, static_cast<int32_t>(known.size())).first->second;
      last = id;
      labels[b * ids.size(1) + t] = current;
    }
  }
}

at::Tensor labels_of(const at::Tensor& document_ids) {
  at::Tensor labels = at::empty(document_ids.sizes(), document_ids.options().dtype(at::kInt));
  AT_DISPATCH_INTEGRAL_TYPES(document_ids.scalar_type(), "attention", [&] {
    label<scalar_t>(document_ids, labels.mutable_data_ptr<int32_t>());
  });
  return labels;
}

Heads heads_of(const at::Tensor& tensor) { return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)}; }

Attention arguments(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double scale, double dropout_p, OptionalTensor seed,
                    const at::Tensor& labels) {
  Attention args{};
  args.type = type_of(q);
  args.batches = q.size(0);
  args.length = q.size(1);
  args.heads = q.size(2);
  args.size = q.size(3);
  args.scale = static_cast<float>(scale);
  args.q = heads_of(q);
  args.k = heads_of(k);
  args.v = heads_of(v);
  args.labels = labels.defined() ? labels.const_data_ptr<int32_t>() : nullptr;
  if (dropout_p > 0) {
    const double below = std::ceil(dropout_p * 0x1p32);  // dropout_p = 1 drops the largest word as well
    args.drop_below = static_cast<uint32_t>(std::min(below, 0x1p32 - 1));
    args.keep = below < 0x1p32 ? static_cast<float>(1 / (1 - dropout_p)) : 0.0f;
    args.seed = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
  }
  return args;
}

// kernel(first head, end head, scratch memory of the thread), on all heads
template <typename Kernel>
void for_heads(const Attention& args, int64_t scratch_floats, Kernel kernel) {
  const int64_t count = args.batches * args.heads;
  const int64_t stride = (scratch_floats + 31) / 32 * 32;
  at::Tensor scratch = at::empty({std::min<int64_t>(at::get_num_threads(), count) * stride}, at::kFloat);
  float* memory = scratch.mutable_data_ptr<float>();
  const int64_t grain_size = grain(args.length * args.length * args.size / 8);
  at::parallel_for(0, count, grain_size, [&](int64_t begin, int64_t end) { kernel(begin, end, memory + at::get_thread_num() * stride); });
}

std::tuple<at::Tensor, at::Tensor> attention_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double scale,
                                                 OptionalTensor document_ids, double dropout_p, OptionalTensor seed) {
  check_inputs(q, k, v, document_ids, dropout_p, seed);
  at::Tensor o = at::empty(q.sizes(), q.options());
  at::Tensor lse = at::empty({q.size(0), q.size(2), q.size(1)}, q.options().dtype(at::kFloat));
  if (q.numel() == 0) return {o, lse};
  const at::Tensor labels = has(document_ids) ? labels_of(*document_ids) : at::Tensor();
  Attention args = arguments(q, k, v, scale, dropout_p, seed, labels);
  args.o = o.mutable_data_ptr();
  args.lse = lse.mutable_data_ptr<float>();
  for_heads(args, GPTFAST_CALL(attention_scratch, args), [&](int64_t begin, int64_t end, float* scratch) {
    GPTFAST_CALL(attention_forward, args, begin, end, scratch);
  });
  return {o, lse};
}

at::Tensor attention_backward_cpu(const at::Tensor& upstream, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                  const at::Tensor& o, const at::Tensor& lse, double scale, OptionalTensor document_ids, double dropout_p,
                                  OptionalTensor seed, bool /* deterministic: it always is */) {
  check_inputs(q, k, v, document_ids, dropout_p, seed);
  check_shape(upstream, q.sizes(), q, "do");
  check_type(upstream, q.scalar_type(), "do");
  check_shape(o, q.sizes(), q, "o");
  check_type(o, q.scalar_type(), "o");
  check_shape(lse, {q.size(0), q.size(2), q.size(1)}, q, "lse");
  check_type(lse, at::kFloat, "lse");
  at::Tensor dqkv = at::empty({q.size(0), q.size(1), 3, q.size(2), q.size(3)}, q.options());
  if (q.numel() == 0) return dqkv;
  const at::Tensor labels = has(document_ids) ? labels_of(*document_ids) : at::Tensor();
  Attention args = arguments(q, k, v, scale, dropout_p, seed, labels);
  args.o = const_cast<void*>(o.const_data_ptr());
  args.lse = const_cast<float*>(lse.const_data_ptr<float>());
  args.upstream = upstream.const_data_ptr();
  args.dqkv = dqkv.mutable_data_ptr();
  for_heads(args, GPTFAST_CALL(attention_backward_scratch, args), [&](int64_t begin, int64_t end, float* scratch) {
    GPTFAST_CALL(attention_backward, args, begin, end, scratch);
  });
  return dqkv;
}

}  // namespace
}  // namespace gptfast::cpu

TORCH_LIBRARY_IMPL(gptfast, CPU, m) {
  m.impl("attention", TORCH_FN(gptfast::cpu::attention_cpu));
  m.impl("attention_backward", TORCH_FN(gptfast::cpu::attention_backward_cpu));
}
