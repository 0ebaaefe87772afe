// A transformer block on the CPU: the ops' own entries of the dispatcher, called in turn. Nothing is computed here. What a small
// model's step spends between its kernels, in Python and in autograd, is what this saves.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "check.h"

namespace gptfast::cpu {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;
using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

template <typename Signature>
c10::TypedOperatorHandle<Signature> entry(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

struct Ops {
  c10::TypedOperatorHandle<Three(const Tensor&, const Optional&, const Optional&, double)> layer_norm = entry<
      Three(const Tensor&, const Optional&, const Optional&, double)>("gptfast::layer_norm");
  using AddLayerNorm = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Optional&, const Optional&, double);
  c10::TypedOperatorHandle<AddLayerNorm> add_layer_norm = entry<AddLayerNorm>("gptfast::add_layer_norm");
  using AddLayerNormBackward = Three(const Optional&, const Tensor&, const Tensor&, const Optional&, const Tensor&, const Tensor&);
  c10::TypedOperatorHandle<AddLayerNormBackward> add_layer_norm_backward = entry<AddLayerNormBackward>("gptfast::add_layer_norm_backward");
  using Linear = Tensor(const Tensor&, const Tensor&, const Optional&, std::string_view, int64_t);
  c10::TypedOperatorHandle<Linear> linear = entry<Linear>("gptfast::linear");
  using LinearBackward = Three(const Tensor&, const Tensor&, const Tensor&);
  c10::TypedOperatorHandle<LinearBackward> linear_backward = entry<LinearBackward>("gptfast::linear_backward");
  using Attention = Two(const Tensor&, const Tensor&, const Tensor&, double, const Optional&, double, const Optional&);
  c10::TypedOperatorHandle<Attention> attention = entry<Attention>("gptfast::attention");
  using AttentionBackward = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, double,
                                   const Optional&, double, const Optional&, bool);
  c10::TypedOperatorHandle<AttentionBackward> attention_backward = entry<AttentionBackward>("gptfast::attention_backward");
  using Gelu = Tensor(const Tensor&, const Optional&, std::string_view);
  c10::TypedOperatorHandle<Gelu> gelu = entry<Gelu>("gptfast::gelu");
  using GeluBackward = Two(const Tensor&, const Tensor&, const Optional&, std::string_view);
  c10::TypedOperatorHandle<GeluBackward> gelu_backward = entry<GeluBackward>("gptfast::gelu_backward");
  using Dropout = Tensor(const Tensor&, double, const Tensor&);
  c10::TypedOperatorHandle<Dropout> dropout = entry<Dropout>("gptfast::dropout");
  c10::TypedOperatorHandle<Dropout> dropout_backward = entry<Dropout>("gptfast::dropout_backward");
};

const Ops& ops() {
  static const Ops found;
  return found;
}

// with a plain weight
Tensor linear(const Tensor& x, const Tensor& weight, const Optional& bias) { return ops().linear.call(x, weight, bias, "", 0); }

// gptfast/ops/transformer_block.py, PARAMETERS
struct Weights {
  const Tensor &ln_1, &ln_1_bias, &qkv, &qkv_bias, &o, &o_bias, &ln_2, &ln_2_bias, &fc, &fc_bias, &proj, &proj_bias;

  explicit Weights(at::TensorList w)
      : ln_1(w[0]), ln_1_bias(w[1]), qkv(w[2]), qkv_bias(w[3]), o(w[4]), o_bias(w[5]), ln_2(w[6]), ln_2_bias(w[7]), fc(w[8]),
        fc_bias(w[9]), proj(w[10]), proj_bias(w[11]) {}
};

constexpr size_t kWeights = 12, kKept = 12;

// What is dropped where: nothing without seeds
struct Dropouts {
  double attention_p, residual_p;
  Optional attention_seed, seed_1, seed_2;

  Dropouts(OptionalTensor seeds, double attention, double residual) : attention_p(0), residual_p(0) {
    if (!has(seeds)) return;
    TORCH_CHECK(seeds->dim() == 1 && seeds->size(0) == 3, "seeds has shape ", seeds->sizes(), ", needs [3]");
    attention_p = attention;
    residual_p = residual;
    attention_seed = seeds->narrow(0, 0, 1);
    seed_1 = seeds->narrow(0, 1, 1);
    seed_2 = seeds->narrow(0, 2, 1);
  }
  Tensor forward(const Tensor& rows, const Optional& seed) const {
    return residual_p > 0 ? ops().dropout.call(rows, residual_p, *seed) : rows;
  }
  Tensor backward(const Tensor& rows, const Optional& seed) const {
    return residual_p > 0 ? ops().dropout_backward.call(rows, residual_p, *seed) : rows;
  }
};

std::vector<Tensor> transformer_block_cpu(const Tensor& residual, const Optional& x, at::TensorList weights, const Optional& document_ids,
                                          const Optional& seeds, int64_t heads, double scale, double eps, std::string_view approximate,
                                          double attention_p, double residual_p) {
  TORCH_CHECK(residual.dim() == 3, "residual has ", residual.dim(), " dimensions, needs 3: [B, T, C]");
  TORCH_CHECK(weights.size() == kWeights, weights.size(), " weights, needs ", kWeights);
  TORCH_CHECK(heads > 0 && residual.size(2) % heads == 0, "heads is ", heads, ", must divide the width ", residual.size(2));
  const Weights w(weights);
  const Dropouts drop(seeds, attention_p, residual_p);
  const int64_t batch = residual.size(0), length = residual.size(1), width = residual.size(2), size = width / heads;
  const Tensor stream = residual.view({batch * length, width});
  Tensor total = at::empty({0, width}, residual.options()), y, mean, rstd;  // without x the total is the residual, which the caller has
  if (has(x)) {
    std::tie(total, y, mean, rstd) = ops().add_layer_norm.call(stream, x->view({batch * length, width}), w.ln_1, w.ln_1_bias, eps);
  } else {
    std::tie(y, mean, rstd) = ops().layer_norm.call(stream, w.ln_1, w.ln_1_bias, eps);
  }
  const Tensor qkv = linear(y, w.qkv.t(), w.qkv_bias).view({batch, length, 3, heads, size});
  const auto [o, lse] = ops().attention.call(qkv.select(2, 0), qkv.select(2, 1), qkv.select(2, 2), scale, document_ids, drop.attention_p,
                                             drop.attention_seed);
  const Tensor attended = drop.forward(linear(o.view({-1, width}), w.o.t(), w.o_bias), drop.seed_1);
  const auto [total_2, y_2, mean_2, rstd_2] =
      ops().add_layer_norm.call(has(x) ? total : stream, attended, w.ln_2, w.ln_2_bias, eps);
  const Tensor hidden = linear(y_2, w.fc.t(), std::nullopt);
  const Tensor active = ops().gelu.call(hidden, w.fc_bias, approximate);
  const Tensor out = drop.forward(linear(active, w.proj.t(), w.proj_bias), drop.seed_2);
  const auto sizes = residual.sizes();
  return {total_2.view(sizes), out.view(sizes), total, mean, rstd, y, qkv, o, lse, mean_2, rstd_2, y_2, hidden, active};
}

// residual: the block's input where it had no x, else total again; total: the block's first output; kept: its outputs from the third on
std::vector<Tensor> transformer_block_backward_cpu(const Tensor& d_total, const Tensor& d_out, const Tensor& residual, const Tensor& total,
                                                   at::TensorList kept, at::TensorList weights, const Optional& document_ids,
                                                   const Optional& seeds, int64_t heads, double scale, std::string_view approximate,
                                                   double attention_p, double residual_p, bool deterministic) {
  TORCH_CHECK(kept.size() == kKept, kept.size(), " kept tensors, needs ", kKept);
  TORCH_CHECK(weights.size() == kWeights, weights.size(), " weights, needs ", kWeights);
  const Weights w(weights);
  const Dropouts drop(seeds, attention_p, residual_p);
  const int64_t width = d_total.size(2);
  const Tensor &y = kept[3], &qkv = kept[4], &o = kept[5], &lse = kept[6], &y_2 = kept[9], &hidden = kept[10], &active = kept[11];
  TORCH_CHECK(qkv.dim() == 5 && qkv.size(3) == heads, "qkv has shape ", qkv.sizes(), ", needs [B, T, 3, ", heads, ", D]");
  const Tensor first = kept[0].size(0) > 0 ? kept[0] : residual.view({-1, width});
  auto [rows, dw_proj, db_proj] = ops().linear_backward.call(drop.backward(d_out.view({-1, width}), drop.seed_2), active, w.proj.t());
  Tensor db_fc, dw_fc, unused, d, dw_2, db_2, dw_o, db_o, dw_qkv, db_qkv, dw_1, db_1;
  std::tie(rows, db_fc) = ops().gelu_backward.call(rows, hidden, w.fc_bias, approximate);
  std::tie(rows, dw_fc, unused) = ops().linear_backward.call(rows, y_2, w.fc.t());
  std::tie(d, dw_2, db_2) = ops().add_layer_norm_backward.call(d_total.view({-1, width}), rows, total.view({-1, width}), w.ln_2, kept[7],
                                                               kept[8]);
  std::tie(rows, dw_o, db_o) = ops().linear_backward.call(drop.backward(d, drop.seed_1), o.view({-1, width}), w.o.t());
  const Tensor q = qkv.select(2, 0), k = qkv.select(2, 1), v = qkv.select(2, 2);
  const Tensor dqkv = ops().attention_backward.call(rows.view(o.sizes()), q, k, v, o, lse, scale, document_ids, drop.attention_p,
                                                    drop.attention_seed, deterministic);
  std::tie(rows, dw_qkv, db_qkv) = ops().linear_backward.call(dqkv.view({-1, 3 * width}), y, w.qkv.t());
  std::tie(d, dw_1, db_1) = ops().add_layer_norm_backward.call(d, rows, first, w.ln_1, kept[1], kept[2]);
  return {d.view(d_total.sizes()), dw_1, db_1, dw_qkv.t(), db_qkv, dw_o.t(), db_o, dw_2, db_2, dw_fc.t(), db_fc, dw_proj.t(), db_proj};
}

}  // namespace
}  // namespace gptfast::cpu

TORCH_LIBRARY_IMPL(gptfast, CPU, m) {
  m.impl("transformer_block", TORCH_FN(gptfast::cpu::transformer_block_cpu));
  m.impl("transformer_block_backward", TORCH_FN(gptfast::cpu::transformer_block_backward_cpu));
}
