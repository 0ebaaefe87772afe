// One AdamW step on a range of one tensor: every element is read and written once, which is what limits it. In pieces that stay in
// the first-level cache, so that the copy in another dtype is made from there and leaves by stores that skip the caches.
#pragma once

#include "cpu/isa.h"
#include "cpu/vec_types.h"

namespace gptfast::cpu {

struct AdamWTensor {
  Type type;           // of param, exp_avg, exp_avg_sq
  Type gradient_type;
  Type copy_type;
  void* param;
  void* exp_avg;
  void* exp_avg_sq;
  const void* gradient;
  void* copy;          // or nullptr
  float keep;          // 1 - lr weight_decay
};

struct AdamW {
  float beta1, rest1;  // beta, 1 - beta
  float beta2, rest2;
  float rate;          // lr / (1 - beta1^step)
  float root;          // 1 / sqrt(1 - beta2^step)
  float eps;
  float scale;         // of the gradient
  bool stream;         // the copies are larger than a cache
};

}  // namespace gptfast::cpu

GPTFAST_PER_ISA(void adamw_update(const AdamW& args, const AdamWTensor& tensor, int64_t first, int64_t end))

#ifdef GPTFAST_ISA

#include "cpu/vec.h"

namespace gptfast::cpu::GPTFAST_ISA {
namespace {

constexpr int64_t kPiece = 1024;

// PyTorch's order (its fused kernel); the mean moves towards g by a share of the distance, from the nearer end: no rounding of
// beta1 accumulates over the steps
template <typename P, typename G>
void update_range(const AdamW& args, const AdamWTensor& tensor, int64_t first, int64_t end) {
  P *param = static_cast<P*>(tensor.param) + first, *exp_avg = static_cast<P*>(tensor.exp_avg) + first;
  P* exp_avg_sq = static_cast<P*>(tensor.exp_avg_sq) + first;
  const G* gradient = static_cast<const G*>(tensor.gradient) + first;
  const bool from_mean = args.rest1 < 0.5f;
  const Vec share = set(from_mean ? args.rest1 : -args.beta1);
  for_columns(end - first, [&](int64_t i, int lanes) {
    const Vec g = load_lanes(gradient + i, lanes) * set(args.scale);
    const Vec old_mean = load_lanes(exp_avg + i, lanes);
    const Vec mean = (from_mean ? old_mean : g) + share * (g - old_mean);
    const Vec square = load_lanes(exp_avg_sq + i, lanes) * set(args.beta2) + set(args.rest2) * g * g;
    const Vec denominator = sqrt(square) * set(args.root) + set(args.eps);
    const Vec p = load_lanes(param + i, lanes) * set(tensor.keep) - set(args.rate) * mean / denominator;
    store_lanes(exp_avg + i, mean, lanes);
    store_lanes(exp_avg_sq + i, square, lanes);
    store_lanes(param + i, p, lanes);
  });
}

template <typename P>
void update(const AdamW& args, const AdamWTensor& tensor, int64_t first, int64_t end) {
  switch (tensor.gradient_type) {
    case Type::fp32: return update_range<P, float>(args, tensor, first, end);
    case Type::bf16: return update_range<P, bf16>(args, tensor, first, end);
    case Type::fp16: return update_range<P, fp16>(args, tensor, first, end);
  }
}

template <typename P, typename C>
void copy_range(const AdamWTensor& tensor, bool past_caches, int64_t first, int64_t end) {
  const P* param = static_cast<const P*>(tensor.param) + first;
  C* copy = static_cast<C*>(tensor.copy) + first;
  if (past_caches) {
    for_aligned_columns(copy, end - first, [&](int64_t i, int lanes) { stream_lanes(copy + i, load_lanes(param + i, lanes), lanes); });
  } else {
    for_columns(end - first, [&](int64_t i, int lanes) { store_lanes(copy + i, load_lanes(param + i, lanes), lanes); });
  }
}

template <typename P>
void update_and_copy(const AdamW& args, const AdamWTensor& tensor, int64_t first, int64_t end) {
  if (tensor.copy == nullptr) return update<P>(args, tensor, first, end);
  for (int64_t i = first; i < end; i += kPiece) {
    const int64_t stop = end - i < kPiece ? end : i + kPiece;
    update<P>(args, tensor, i, stop);
    switch (tensor.copy_type) {
      case Type::fp32: copy_range<P, float>(tensor, args.stream, i, stop); break;
      case Type::bf16: copy_range<P, bf16>(tensor, args.stream, i, stop); break;
      case Type::fp16: copy_range<P, fp16>(tensor, args.stream, i, stop); break;
    }
  }
  finish_streams();
}

}  // namespace

void adamw_update(const AdamW& args, const AdamWTensor& tensor, int64_t first, int64_t end) {
  switch (tensor.type) {
    case Type::fp32: return update_and_copy<float>(args, tensor, first, end);
    case Type::bf16: return update_and_copy<bf16>(args, tensor, first, end);
    case Type::fp16: return update_and_copy<fp16>(args, tensor, first, end);
  }
}

}  // namespace gptfast::cpu::GPTFAST_ISA

#endif
