// attention backward, one head at a time: for each block of 64 keys one pass over the queries that see it. The weights are computed
// again from lse; of the five products dv and dk stay in the first-level cache, dq is added up in scratch memory, in the order of the
// blocks, so that bits depend on shapes alone. What limits it is the rate of multiply-adds, 10 T^2 D / 2 a head.
#pragma once

#include "cpu/attention_block_kernel.h"

// Heads b * H + h from first to end; scratch holds attention_backward_scratch(args) floats
GPTFAST_PER_ISA(void attention_backward(const Attention& args, int64_t first_head, int64_t end_head, float* scratch))
GPTFAST_PER_ISA(int64_t attention_backward_scratch(const Attention& args))

#ifdef GPTFAST_ISA

namespace gptfast::cpu::GPTFAST_ISA {
namespace {

template <typename Product>
struct BackwardMemory {
  using Storage = typename Product::Storage;
  Storage *queries, *upstream;           // rows of all blocks
  float *query_panels, *upstream_panels;  // the same as right operands; words of one float are both
  float *lse, *delta, *dq;               // [T] in base 2, [T], [T, width]
  Storage *keys, *values;                // rows of a block
  float *key_panel, *key_columns, *value_columns, *dk, *dv;  // of a block
  float *weights, *gradients;            // [64, 64]: scores, then p; dp, then ds
  Storage* gradient_rows;                // ds once more, where words lie along the keys
  int32_t *labels, *ranges;
  uint8_t *bad, *poisoned;               // [T] queries, keys
  int64_t floats;

  BackwardMemory(const Attention& args, const Shape<Product>& shape, float* memory) {
    Scratch scratch{memory};
    const auto rows = [&](int64_t blocks) { return reinterpret_cast<Storage*>(scratch.take(blocks * kBlock * shape.row)); };
    const auto panels = [&](int64_t blocks, Storage* same) {
      return Product::kPack == 1 ? reinterpret_cast<float*>(same) : scratch.take(blocks * panel_words(shape));
    };
    const int64_t tokens = shape.blocks * kBlock;
    queries = rows(shape.blocks);
    upstream = rows(shape.blocks);
    query_panels = panels(shape.blocks, queries);
    upstream_panels = panels(shape.blocks, upstream);
    lse = scratch.take(tokens);
    delta = scratch.take(tokens);
    dq = scratch.take(tokens * shape.width);
    keys = rows(1);
    values = rows(1);
    key_panel = panels(1, keys);
    key_columns = scratch.take(kBlock * shape.row);
    value_columns = scratch.take(kBlock * shape.row);
    dk = scratch.take(kBlock * shape.width);
    dv = scratch.take(kBlock * shape.width);
    weights = scratch.take(kBlock * kBlock);
    gradients = scratch.take(kBlock * kBlock);
    gradient_rows = reinterpret_cast<Storage*>(Product::kPack == 1 ? gradients : scratch.take(kBlock * kBlock / Product::kPack));
    const bool documents = args.labels != nullptr;
    labels = documents ? reinterpret_cast<int32_t*>(scratch.take(tokens)) : nullptr;
    ranges = documents ? reinterpret_cast<int32_t*>(scratch.take(2 * shape.blocks)) : nullptr;
    bad = reinterpret_cast<uint8_t*>(scratch.take(tokens / 4));
    poisoned = reinterpret_cast<uint8_t*>(scratch.take(tokens / 4));
    floats = scratch.used;
  }
};

// Rows i and i + 1 of a product's result, as the left operands of the sums over queries, and over keys
GPTFAST_INLINE void keep_rows(const BackwardMemory<Single>&, float* square, int64_t i, int64_t j, Vec low, Vec high, bool) {
  store(square + i * kBlock + j, low);
  store(square + (i + 1) * kBlock + j, high);
}

#if defined(__AVX512BF16__)
GPTFAST_INLINE void keep_rows(const BackwardMemory<Pair>& memory, float* square, int64_t i, int64_t j, Vec low, Vec high, bool along_keys) {
  const Half a = to_bf16(low), b = to_bf16(high);
  store(square + i / 2 * kBlock + j, join(a, b));
  if (!along_keys) return;
  __builtin_memcpy(memory.gradient_rows + i * kBlock + j, &a, sizeof(a));
  __builtin_memcpy(memory.gradient_rows + (i + 1) * kBlock + j, &b, sizeof(b));
}
#endif

// p and ds of two queries of a block, in place of the scores and of dp
template <typename Product, bool kMasked, bool kDocuments>
GPTFAST_INLINE void weigh_rows(const Attention& args, const BackwardMemory<Product>& memory, const Mask& mask, int64_t i, int64_t query,
                               int64_t width, const uint32_t* noise) {
  const Vec factor = set(args.scale * kLog2E), keep = set(args.keep), zero = set(0.0f);
  for (int64_t j = 0; j < width; j += kWidth) {
    Vec p[2], ds[2];
    for (int r = 0; r < 2; ++r) {
      const int64_t place = (i + r) * kBlock + j;
      const Vec weight = exp2(load(memory.weights + place) * factor - set(memory.lse[query + r]));
      Vec dp = load(memory.gradients + place);
      p[r] = weight;
      if (noise != nullptr) {
        const Ints stays = kept(args, noise + r * kBlock + j);
        p[r] = choose(stays, weight, zero);
        dp = choose(stays, dp * keep, zero);
      }
      ds[r] = weight * (dp - set(memory.delta[query + r]));
      if (kMasked) {
        const Ints seen = visible<kDocuments>(mask, i + r, j);
        p[r] = choose(seen, p[r], zero);
        ds[r] = choose(seen, ds[r], zero);
      }
    }
    keep_rows(memory, memory.weights, i, j, p[0], p[1], false);
    keep_rows(memory, memory.gradients, i, j, ds[0], ds[1], true);
  }
}

template <typename Product, bool kMasked, bool kDocuments>
void weigh_block(const Attention& args, const BackwardMemory<Product>& memory, const Mask& mask, int64_t head, int64_t first_query,
                 int64_t first_key, int64_t rows) {
  alignas(64) uint32_t noise[2 * kBlock];
  const bool drops = args.drop_below > 0;
  for (int64_t i = 0; i < rows; i += 2) {
    if (drops) {
      noise_row(args, head, first_query + i, first_key, noise);
      noise_row(args, head, first_query + i + 1, first_key, noise + kBlock);
    }
    const int64_t width = kMasked ? mask.width(i) : kBlock;
    weigh_rows<Product, kMasked, kDocuments>(args, memory, mask, i, first_query + i, width, drops ? noise : nullptr);
  }
}

// What a block of queries gives to dv and dk of a block of keys, and takes from it for its dq
template <typename Product>
void backward_block(const Attention& args, const Shape<Product>& shape, const BackwardMemory<Product>& memory, int64_t head,
                    int64_t query_block, int64_t key_block) {
  const Sight seen = sight(memory.ranges, query_block, key_block);
  if (seen == Sight::none) return;
  constexpr int64_t kPack = Product::kPack, kSteps = kBlock / kPack;
  const bool documents = seen == Sight::some, diagonal = query_block == key_block;
  const int64_t query = query_block * kBlock, key = key_block * kBlock, step = kPack == 1 ? shape.row : shape.width;
  const int64_t rows = round_up(least(kBlock, args.length - query), kRows), keys = round_up(least(kBlock, args.length - key), kRows);
  const Left q{reinterpret_cast<const float*>(memory.queries) + query * shape.row, shape.row, 1};
  const Left upstream{reinterpret_cast<const float*>(memory.upstream) + query * shape.row, shape.row, 1};
  const Part part = diagonal ? Part::columns_to_row : Part::all;
  multiply<Product, false>(part, q, {memory.key_columns, kBlock}, rows, shape.steps, kBlock, memory.weights, kBlock);
  multiply<Product, false>(part, upstream, {memory.value_columns, kBlock}, rows, shape.steps, kBlock, memory.gradients, kBlock);
  const Mask mask{diagonal, documents ? memory.labels + key : nullptr, documents ? memory.labels + query : nullptr};
  if (documents) {
    weigh_block<Product, true, true>(args, memory, mask, head, query, key, rows);
  } else if (diagonal) {
    weigh_block<Product, true, false>(args, memory, mask, head, query, key, rows);
  } else {
    weigh_block<Product, false, false>(args, memory, mask, head, query, key, rows);
  }
  const Part below = diagonal ? Part::steps_from_row : Part::all;
  const int64_t panel = query / kPack * step, steps = rows / kPack;
  multiply<Product, true>(below, {memory.weights, 1, kBlock}, {memory.upstream_panels + panel, step}, keys, steps, shape.width, memory.dv,
                          shape.width);
  multiply<Product, true>(below, {memory.gradients, 1, kBlock}, {memory.query_panels + panel, step}, keys, steps, shape.width, memory.dk,
                          shape.width);
  const Left gradients{reinterpret_cast<const float*>(memory.gradient_rows), kSteps, 1};
  multiply<Product, true>(diagonal ? Part::steps_to_row : Part::all, gradients, {memory.key_panel, step}, rows, kSteps, shape.width,
                          memory.dq + query * shape.width, shape.width);
}

// lse in base 2 and delta of a block's queries. Queries that count for nothing (padding, beyond T, not finite) get lse = inf, so p = 0.
template <typename T, typename Product>
bool statistics(const Attention& args, const BackwardMemory<Product>& memory, int64_t b, int64_t h, int64_t first) {
  bool any = false;
  for (int64_t t = first; t < first + kBlock; ++t) {
    memory.lse[t] = __builtin_inff();
    memory.delta[t] = 0;
    if (t >= args.length || (memory.labels != nullptr && memory.labels[t] < 0)) continue;
    const int64_t row = ((b * args.length + t) * args.heads + h) * args.size;
    const T *o = static_cast<const T*>(args.o) + row, *upstream = static_cast<const T*>(args.upstream) + row;
    const float delta = sum_columns(args.size, [&](int64_t d, int n) { return load_lanes(o + d, n) * load_lanes(upstream + d, n); });
    const float lse = args.lse[(b * args.heads + h) * args.length + t] * kLog2E;
    if (!(lse - lse == 0)) memory.bad[t] = 1;
    any |= memory.bad[t];
    if (memory.bad[t]) continue;
    memory.lse[t] = lse;
    memory.delta[t] = delta;
  }
  return any;
}

template <typename T, typename Product>
bool pack_queries(const Attention& args, const Shape<Product>& shape, const BackwardMemory<Product>& memory, int64_t b, int64_t h) {
  bool any = false;
  const int64_t stride = args.heads * args.size;
  for (int64_t block = 0; block < shape.blocks; ++block) {
    const int64_t first = block * kBlock, count = least(kBlock, args.length - first);
    const int32_t* labels = memory.labels == nullptr ? nullptr : memory.labels + first;
    auto *queries = memory.queries + first * shape.row_numbers, *upstream = memory.upstream + first * shape.row_numbers;
    const T* gradient = static_cast<const T*>(args.upstream) + ((b * args.length + first) * args.heads + h) * args.size;
    pack_rows(shape, head_of<T>(args.q, b, h, first), args.q.token, count, args.size, labels, queries, memory.bad + first);
    pack_rows(shape, gradient, stride, count, args.size, labels, upstream, memory.bad + first);
    if constexpr (Product::kPack == 2) {
      pack_panel(shape, queries, memory.query_panels + block * panel_words(shape));
      pack_panel(shape, upstream, memory.upstream_panels + block * panel_words(shape));
    }
    any |= statistics<T>(args, memory, b, h, first);
  }
  return any;
}

// A token of k or v that is not finite makes lse NaN in every row that sees it, so these rows are marked in `bad` already
template <typename T, typename Product>
void pack_key_block(const Attention& args, const Shape<Product>& shape, const BackwardMemory<Product>& memory, int64_t b, int64_t h,
                    int64_t first) {
  const int64_t count = least(kBlock, args.length - first);
  const int32_t* labels = memory.labels == nullptr ? nullptr : memory.labels + first;
  uint8_t known[kBlock];
  pack_rows(shape, head_of<T>(args.k, b, h, first), args.k.token, count, args.size, labels, memory.keys, known);
  pack_rows(shape, head_of<T>(args.v, b, h, first), args.v.token, count, args.size, labels, memory.values, known);
  pack_columns(shape, memory.keys, memory.key_columns);
  pack_columns(shape, memory.values, memory.value_columns);
  if constexpr (Product::kPack == 2) pack_panel(shape, memory.keys, memory.key_panel);
}

// Part 0, 1, 2 (dq, dk, dv) of `count` tokens of dqkv from sums [count, width]
template <typename T>
void write_gradient(const Attention& args, int64_t head, int64_t part, int64_t first, int64_t count, int64_t width, const float* sums,
                    float factor, const uint8_t* poisoned) {
  const int64_t b = head / args.heads, h = head % args.heads;
  for (int64_t i = 0; i < count; ++i) {
    T* row = static_cast<T*>(args.dqkv) + (((b * args.length + first + i) * 3 + part) * args.heads + h) * args.size;
    const Vec scale = set(poisoned[first + i] ? __builtin_nanf("") : factor);
    for_columns(args.size, [&](int64_t d, int n) { store_lanes(row + d, load(sums + i * width + d) * scale, n); });
  }
}

template <typename T, typename Product>
void backward_head(const Attention& args, const Shape<Product>& shape, const BackwardMemory<Product>& memory, int64_t head) {
  const int64_t b = head / args.heads, h = head % args.heads;
  copy_labels(args, b, memory.labels, memory.ranges);
  __builtin_memset(memory.bad, 0, args.length);
  __builtin_memset(memory.poisoned, 0, args.length);
  if (pack_queries<T>(args, shape, memory, b, h)) spread(memory.labels, args.length, memory.bad, false, memory.poisoned);
  clear(memory.dq, shape.blocks * kBlock * shape.width);
  for (int64_t block = 0; block < shape.blocks; ++block) {
    const int64_t first = block * kBlock, count = least(kBlock, args.length - first);
    pack_key_block<T>(args, shape, memory, b, h, first);
    clear(memory.dk, kBlock * shape.width);
    clear(memory.dv, kBlock * shape.width);
    for (int64_t queries = block; queries < shape.blocks; ++queries) backward_block(args, shape, memory, head, queries, block);
    write_gradient<T>(args, head, 1, first, count, shape.width, memory.dk, args.scale, memory.poisoned);
    write_gradient<T>(args, head, 2, first, count, shape.width, memory.dv, args.drop_below > 0 ? args.keep : 1.0f, memory.poisoned);
  }
  write_gradient<T>(args, head, 0, 0, args.length, shape.width, memory.dq, args.scale, memory.bad);
}

template <typename T, typename Product>
void backward_heads(const Attention& args, int64_t first_head, int64_t end_head, float* scratch) {
  const Shape<Product> shape(args);
  const BackwardMemory<Product> memory(args, shape, scratch);
  for (int64_t head = first_head; head < end_head; ++head) backward_head<T>(args, shape, memory, head);
}

}  // namespace

int64_t attention_backward_scratch(const Attention& args) {
  if (args.type == Type::bf16) return BackwardMemory<Bf16Product>(args, Shape<Bf16Product>(args), nullptr).floats;
  return BackwardMemory<Single>(args, Shape<Single>(args), nullptr).floats;
}

void attention_backward(const Attention& args, int64_t first_head, int64_t end_head, float* scratch) {
  switch (args.type) {
    case Type::fp32: return backward_heads<float, Single>(args, first_head, end_head, scratch);
    case Type::bf16: return backward_heads<bf16, Bf16Product>(args, first_head, end_head, scratch);
    case Type::fp16: return backward_heads<fp16, Single>(args, first_head, end_head, scratch);
  }
}

}  // namespace gptfast::cpu::GPTFAST_ISA

#endif
