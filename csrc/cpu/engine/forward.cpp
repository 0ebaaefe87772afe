#include "cpu/engine/forward.h"

#include <algorithm>

#include "cpu/cache_append__kernel.h"
#include "cpu/decode_attention_kernel.h"
#include "cpu/layer_norm_kernel.h"

namespace gptfast::cpu::engine {
namespace {

int64_t ready_bytes(const Model& model, int64_t rows) {
  const int64_t blocks = std::max(prepared_bytes(model.format, rows, model.width), prepared_bytes(model.format, rows, model.inner));
  return std::max(blocks, prepared_bytes(model.head_format, rows, model.width));
}

}  // namespace

// ------------------------------------------------------------------------------------------------------------- ready for products

Rows::Rows(const Model& model, Team& team)
    : model_(model), team_(team), normal_(kRows * model.width), prepared_(ready_bytes(model, kRows)) {
  for (int thread = 0; thread < team.size(); ++thread) {
    mine_.push_back({Buffer<float>(kTogether * model.width), Buffer<float>(2), Buffer<uint8_t>(ready_bytes(model, kTogether))});
  }
}

const void* Rows::normalised(int thread, const float* const* x, int64_t rows, const float* weight, const float* bias, Format format) {
  const bool alone = rows <= kTogether;
  const Share share = alone ? Share(rows, 0, 1) : Share(rows, thread, team_.size());
  const Mine& mine = mine_[thread];
  float* normal = alone ? mine.normal.get() : normal_.get();
  void* prepared = alone ? mine.prepared.get() : prepared_.get();
  LayerNorm args{};
  args.type = Type::fp32;
  args.columns = model_.width;
  args.eps = model_.epsilon;
  args.weight = weight;
  args.bias = bias;
  args.mean = mine.statistics.get();
  args.rstd = args.mean + 1;
  for (int64_t row = share.first; row < share.end; ++row) {
    args.x = x[row];
    args.y = normal + row * model_.width;
    GPTFAST_CALL(layer_norm_forward, args, 0, 1);
  }
  GPTFAST_CALL(prepare_product, format, normal, model_.width, rows, model_.width, share.first, share.end, prepared);
  if (!alone) team_.barrier();
  return prepared;
}

const void* Rows::prepared(int thread, const float* x, int64_t rows, int64_t columns, Format format) {
  const bool alone = rows <= kTogether;
  const Share share = alone ? Share(rows, 0, 1) : Share(rows, thread, team_.size());
  void* prepared = alone ? mine_[thread].prepared.get() : prepared_.get();
  GPTFAST_CALL(prepare_product, format, x, columns, rows, columns, share.first, share.end, prepared);
  if (!alone) team_.barrier();
  return prepared;
}

// --------------------------------------------------------------------------------------------------------------------- the blocks

Forward::Forward(const Model& model, const Cache& cache, Team& team, Rows& rows)
    : model_(model),
      cache_(cache),
      team_(team),
      rows_(rows),
      own_heads_(model.size() % kPanel == 0),
      residual_(kRows * model.width),
      qkv_(kRows * 3 * model.width),
      attended_(kRows * model.width),
      inner_(kRows * model.inner),
      residual_rows_(kRows) {
  for (int thread = 0; thread < team.size(); ++thread) scratch_.emplace_back(decode_attention_room(model.size()));
  for (int64_t row = 0; row < kRows; ++row) residual_rows_.get()[row] = hidden(row);
}

bool Forward::run(int thread, const Pass& pass, const std::atomic<bool>* stop) {
  const int64_t rows = pass.rows, width = model_.width, inner = model_.inner;
  float *residual = residual_.get(), *attended = attended_.get(), *between = inner_.get();
  const Share mine(rows, thread, team_.size());
  for (int64_t row = mine.first; row < mine.end; ++row) {
    GPTFAST_CALL(embed_token, model_.wte, pass.tokens[row], model_.wpe + pass.positions[row] * width, residual + row * width);
  }
  team_.barrier();
  for (size_t index = 0; index < model_.blocks.size(); ++index) {
    const Block& block = model_.blocks[index];
    const void* x = rows_.normalised(thread, residual_rows_.get(), rows, block.ln_1_weight, block.ln_1_bias, model_.format);
    project(thread, block, x, rows);
    attend(thread, static_cast<int64_t>(index), pass);
    team_.barrier();
    x = rows_.prepared(thread, attended, rows, width, model_.format);
    multiply(thread, block.attn_c_proj, x, rows, {block.attn_c_proj_bias, Activation::none, residual, width, residual, width, 0});
    team_.barrier();
    x = rows_.normalised(thread, residual_rows_.get(), rows, block.ln_2_weight, block.ln_2_bias, model_.format);
    const Nonlinearity kind = model_.activation;
    const Activation fused = kind == Nonlinearity::gelu        ? Activation::gelu
                             : kind == Nonlinearity::gelu_tanh ? Activation::gelu_tanh
                                                               : Activation::none;
    multiply(thread, block.c_fc, x, rows, {block.c_fc_bias, fused, nullptr, 0, between, inner, 0});
    if (fused == Activation::none) {
      const Share panel(panels(inner), thread, team_.size());
      GPTFAST_CALL(activate, kind, between, inner, rows, panel.first * kPanel, std::min(panel.end * kPanel, inner));
    }
    team_.barrier();
    x = rows_.prepared(thread, between, rows, inner, model_.format);
    multiply(thread, block.mlp_c_proj, x, rows, {block.mlp_c_proj_bias, Activation::none, residual, width, residual, width, 0});
    if (thread == 0) stopped_ = stop != nullptr && stop->load(std::memory_order_relaxed);  // one look for all threads
    team_.barrier();
    if (stopped_) return false;
  }
  return true;
}

void Forward::multiply(int thread, const PackedWeight& weight, const void* x, int64_t rows, Epilogue epilogue) const {
  const Share share(panels(weight.outputs), thread, team_.size());
  GPTFAST_CALL(product, weight, x, rows, share.first, share.end, epilogue);
}

// Queries, keys and values. Where a head is whole panels, a thread computes those of its own heads, and need not wait for others.
void Forward::project(int thread, const Block& block, const void* x, int64_t rows) {
  const Epilogue epilogue{block.c_attn_bias, Activation::none, nullptr, 0, qkv_.get(), 3 * model_.width, 0};
  if (!own_heads_) {
    multiply(thread, block.c_attn, x, rows, epilogue);
    team_.barrier();
    return;
  }
  const Share heads(model_.heads, thread, team_.size());
  const int64_t head = model_.size() / kPanel, all = model_.heads * head;
  for (int64_t part = 0; part < 3; ++part) {
    GPTFAST_CALL(product, block.c_attn, x, rows, part * all + heads.first * head, part * all + heads.end * head, epilogue);
  }
}

// Puts keys and values of the new tokens into the cache, then attends
void Forward::attend(int thread, int64_t index, const Pass& pass) {
  const Share heads(model_.heads, thread, team_.size());
  for (const Piece& piece : pass.pieces) append(index, piece, heads);
  // where heads do not come out even, many queries are dealt block by block
  const bool by_heads = pass.rows <= kTogether || model_.heads % team_.size() == 0;
  if (!by_heads) team_.barrier();
  const int64_t width = model_.width;
  DecodeAttention args{};
  args.type = Type::fp32;
  args.cache_type = cache_.type;
  args.q_stride = 3 * width;
  args.o_stride = width;
  args.scale = model_.blocks[index].scale;
  args.cache.keys = cache_.keys(index);
  args.cache.values = cache_.values(index);
  args.cache.key_stride = args.cache.value_stride = cache_.stride();
  args.cache.heads = cache_.heads;
  args.cache.size = cache_.size;
  float* scratch = scratch_[thread].get();
  for (const Piece& piece : pass.pieces) {
    const int32_t length = static_cast<int32_t>(piece.start + piece.count);
    const int64_t blocks = (piece.count + kQueryBlock - 1) / kQueryBlock;
    args.queries = piece.count;
    args.q = qkv_.get() + piece.row * 3 * width;
    args.o = attended_.get() + piece.row * width;
    args.lengths = {&length, false};
    args.cache.table = {piece.table, false};
    if (by_heads) {
      GPTFAST_CALL(decode_attention, args, heads.first * blocks, heads.end * blocks, scratch);
      continue;
    }
    for (int64_t item = thread; item < model_.heads * blocks; item += team_.size()) {
      GPTFAST_CALL(decode_attention, args, item, item + 1, scratch);
    }
  }
}

void Forward::append(int64_t index, const Piece& piece, const Share& heads) const {
  const int64_t width = model_.width, size = cache_.size, first = heads.first * size, item = cache_.item();
  const int32_t start = static_cast<int32_t>(piece.start);
  const float* qkv = qkv_.get() + piece.row * 3 * width + first;
  CacheAppend args{};
  args.key_type = args.value_type = Type::fp32;
  args.cache_type = cache_.type;
  args.tokens = piece.count;
  args.keys = qkv + width;
  args.values = qkv + 2 * width;
  args.key_stride = args.value_stride = 3 * width;
  args.cache.keys = cache_.keys(index) + first * kPage * item;
  args.cache.values = cache_.values(index) + first * kPage * item;
  args.cache.key_stride = args.cache.value_stride = cache_.stride();
  args.cache.heads = heads.end - heads.first;
  args.cache.size = size;
  args.cache.table = {piece.table, false};
  args.start = {&start, false};
  GPTFAST_CALL(cache_append, args, 0, piece.count);
}

}  // namespace gptfast::cpu::engine
