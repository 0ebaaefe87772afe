// attention forward, one head at a time: blocks of 64 queries against blocks of 64 keys, with the running maximum and sum of
// softmax (arXiv:2205.14135), so that the scores never leave the first-level cache. Blocks after the diagonal are skipped and the
// diagonal's products cover its lower half. What limits it is the rate of multiply-adds, 4 T^2 D / 2 a head, then the T^2 / 2 exponentials.
// Softmax is computed to base 2: 2^(s scale log2(e) - maximum).
#pragma once

#include "cpu/attention_block_kernel.h"

// Heads b * H + h from first to end; scratch holds attention_scratch(args) floats
GPTFAST_PER_ISA(void attention_forward(const Attention& args, int64_t first_head, int64_t end_head, float* scratch))
GPTFAST_PER_ISA(int64_t attention_scratch(const Attention& args))

#ifdef GPTFAST_ISA

namespace gptfast::cpu::GPTFAST_ISA {
namespace {

template <typename Product>
struct ForwardMemory {
  typename Product::Storage *queries, *keys, *values;  // rows of a block
  float *key_columns, *value_panels;  // the right operands, all blocks
  float *scores, *output;             // of a block of queries, [64, 64] and [64, width]
  float *maximum, *sums;              // [64] and [64, a register]
  int32_t *labels, *ranges;
  uint8_t *bad, *poisoned;            // [T] tokens, rows
  int64_t floats;

  ForwardMemory(const Attention& args, const Shape<Product>& shape, float* memory) {
    using Storage = typename Product::Storage;
    Scratch scratch{memory};
    queries = reinterpret_cast<Storage*>(scratch.take(kBlock * shape.row));
    keys = reinterpret_cast<Storage*>(scratch.take(kBlock * shape.row));
    values = reinterpret_cast<Storage*>(scratch.take(kBlock * shape.row));
    key_columns = scratch.take(shape.blocks * kBlock * shape.row);
    value_panels = scratch.take(shape.blocks * (Product::kPack == 1 ? kBlock * shape.row : panel_words(shape)));
    scores = scratch.take(kBlock * kBlock);
    output = scratch.take(kBlock * shape.width);
    maximum = scratch.take(kBlock);
    sums = scratch.take(kBlock * kWidth);
    const bool documents = args.labels != nullptr;
    labels = documents ? reinterpret_cast<int32_t*>(scratch.take(shape.blocks * kBlock)) : nullptr;
    ranges = documents ? reinterpret_cast<int32_t*>(scratch.take(2 * shape.blocks)) : nullptr;
    bad = reinterpret_cast<uint8_t*>(scratch.take(shape.blocks * kBlock / 4));
    poisoned = reinterpret_cast<uint8_t*>(scratch.take(shape.blocks * kBlock / 4));
    floats = scratch.used;
  }
};

// What was summed for row i so far, in terms of a larger maximum
GPTFAST_INLINE void shrink_row(float* sums, float* output, int64_t width, float before, float now) {
  const Vec factor = exp2(set(before - now));
  store(sums, load(sums) * factor);
  for (int64_t d = 0; d < width; d += kWidth) store(output + d, load(output + d) * factor);
}

// Row i of a block of scores: the new maximum, and the weights in place of the scores, as words of the product that follows
template <typename Product, bool kMasked, bool kDocuments>
GPTFAST_INLINE void softmax_row(const Attention& args, const ForwardMemory<Product>& memory, const Mask& mask, int64_t i,
                                int64_t width, int64_t output_width, const uint32_t* noise) {
  float *scores = memory.scores + i * kBlock, *sums = memory.sums + i * kWidth;
  const Vec factor = set(args.scale * kLog2E), nothing = set(-__builtin_inff());
  Vec top = nothing;
  for (int64_t j = 0; j < width; j += kWidth) {
    Vec s = load(scores + j) * factor;
    if (kMasked) s = choose(visible<kDocuments>(mask, i, j), s, nothing);
    store(scores + j, s);
    top = maximum(top, s);
  }
  const float before = memory.maximum[i], found = max(top), now = found > before ? found : before;
  if (found > before) {
    memory.maximum[i] = now;
    if (before > -__builtin_inff()) shrink_row(sums, memory.output + i * output_width, output_width, before, now);
  }
  const Vec base = set(now == -__builtin_inff() ? 0.0f : now);  // no visible key so far: all weights become 0
  Vec sum = load(sums);
  auto* weights = reinterpret_cast<typename Product::Storage*>(scores);
  for (int64_t j = 0; j < width; j += kWidth) {
    Vec p = exp2(load(scores + j) - base);
    sum += p;
    if (noise != nullptr) p = choose(kept(args, noise + j), p, set(0.0f));
    store(weights + j, p);
  }
  store(sums, sum);
}

template <typename Product, bool kMasked, bool kDocuments>
void softmax_block(const Attention& args, const ForwardMemory<Product>& memory, const Mask& mask, int64_t rows, int64_t output_width,
                   int64_t head, int64_t first_query, int64_t first_key) {
  alignas(64) uint32_t noise[kBlock];
  const bool drops = args.drop_below > 0;
  for (int64_t i = 0; i < rows; ++i) {
    if (drops) noise_row(args, head, first_query + i, first_key, noise);
    const int64_t width = kMasked ? mask.width(i) : kBlock;
    softmax_row<Product, kMasked, kDocuments>(args, memory, mask, i, width, output_width, drops ? noise : nullptr);
  }
}

// A block of queries against a block of keys
template <typename Product>
void forward_block(const Attention& args, const Shape<Product>& shape, const ForwardMemory<Product>& memory, int64_t head,
                   int64_t query_block, int64_t key_block, int64_t rows) {
  const Sight seen = sight(memory.ranges, query_block, key_block);
  if (seen == Sight::none) return;
  const bool documents = seen == Sight::some, diagonal = query_block == key_block;
  const Mask mask{diagonal, documents ? memory.labels + key_block * kBlock : nullptr,
                  documents ? memory.labels + query_block * kBlock : nullptr};
  const Left queries{reinterpret_cast<const float*>(memory.queries), shape.row, 1};
  const Right keys{memory.key_columns + key_block * kBlock * shape.row, kBlock};
  multiply<Product, false>(diagonal ? Part::columns_to_row : Part::all, queries, keys, rows, shape.steps, kBlock, memory.scores, kBlock);
  const int64_t first_query = query_block * kBlock, first_key = key_block * kBlock;
  if (documents) {
    softmax_block<Product, true, true>(args, memory, mask, rows, shape.width, head, first_query, first_key);
  } else if (diagonal) {
    softmax_block<Product, true, false>(args, memory, mask, rows, shape.width, head, first_query, first_key);
  } else {
    softmax_block<Product, false, false>(args, memory, mask, rows, shape.width, head, first_query, first_key);
  }
  constexpr int64_t kPack = Product::kPack;
  const int64_t step = kPack == 1 ? shape.row : shape.width;
  const Right values{memory.value_panels + key_block * (kBlock / kPack) * step, step};
  const Left weights{memory.scores, kBlock, 1};
  multiply<Product, true>(diagonal ? Part::steps_to_row : Part::all, weights, values, rows, kBlock / kPack, shape.width, memory.output,
                          shape.width);
}

// o and lse of a block of queries: first all sums and logarithms, so that they do not wait for each other
template <typename T, typename Product>
void finish_block(const Attention& args, const Shape<Product>& shape, const ForwardMemory<Product>& memory, int64_t head, int64_t first,
                  int64_t count) {
  const int64_t b = head / args.heads, h = head % args.heads;
  const uint8_t* poisoned = memory.poisoned + first;
  const auto padding = [&](int64_t i) { return memory.labels != nullptr && memory.labels[first + i] < 0; };
  float totals[kBlock];
  for (int64_t i = 0; i < count; ++i) totals[i] = sum(load(memory.sums + i * kWidth));
  for (int64_t i = 0; i < count; ++i) {
    const float lse = memory.maximum[i] * kLn2 + __builtin_logf(totals[i]);
    args.lse[head * args.length + first + i] = padding(i) ? -__builtin_inff() : poisoned[i] ? __builtin_nanf("") : lse;
  }
  const float keep = args.drop_below > 0 ? args.keep : 1.0f;
  for (int64_t i = 0; i < count; ++i) {
    T* o = static_cast<T*>(args.o) + ((b * args.length + first + i) * args.heads + h) * args.size;
    const Vec factor = set(poisoned[i] ? __builtin_nanf("") : keep / totals[i]);
    const bool empty = padding(i);
    for_columns(args.size, [&](int64_t d, int n) {
      store_lanes(o + d, empty ? set(0.0f) : load(memory.output + i * shape.width + d) * factor, n);
    });
  }
}

// Copies k and v of a head, and finds the tokens that are not finite
template <typename T, typename Product>
bool pack_keys(const Attention& args, const Shape<Product>& shape, const ForwardMemory<Product>& memory, int64_t b, int64_t h) {
  bool any = false;
  for (int64_t block = 0; block < shape.blocks; ++block) {
    const int64_t first = block * kBlock, count = least(kBlock, args.length - first);
    const int32_t* labels = memory.labels == nullptr ? nullptr : memory.labels + first;
    auto* values = memory.values;
    if constexpr (Product::kPack == 1) values = memory.value_panels + first * shape.row;
    any |= pack_rows(shape, head_of<T>(args.k, b, h, first), args.k.token, count, args.size, labels, memory.keys, memory.bad + first);
    any |= pack_rows(shape, head_of<T>(args.v, b, h, first), args.v.token, count, args.size, labels, values, memory.bad + first);
    pack_columns(shape, memory.keys, memory.key_columns + first * shape.row);
    if constexpr (Product::kPack == 2) pack_panel(shape, values, memory.value_panels + block * panel_words(shape));
  }
  return any;
}

template <typename T, typename Product>
void forward_head(const Attention& args, const Shape<Product>& shape, const ForwardMemory<Product>& memory, int64_t head) {
  const int64_t b = head / args.heads, h = head % args.heads;
  copy_labels(args, b, memory.labels, memory.ranges);
  __builtin_memset(memory.bad, 0, args.length);
  __builtin_memset(memory.poisoned, 0, args.length);
  if (pack_keys<T>(args, shape, memory, b, h)) spread(memory.labels, args.length, memory.bad, true, memory.poisoned);
  for (int64_t block = 0; block < shape.blocks; ++block) {
    const int64_t first = block * kBlock, count = least(kBlock, args.length - first);
    pack_rows(shape, head_of<T>(args.q, b, h, first), args.q.token, count, args.size,
              memory.labels == nullptr ? nullptr : memory.labels + first, memory.queries, memory.poisoned + first);
    for (int64_t i = 0; i < kBlock; ++i) memory.maximum[i] = -__builtin_inff();
    clear(memory.sums, kBlock * kWidth);
    clear(memory.output, kBlock * shape.width);
    for (int64_t key_block = 0; key_block <= block; ++key_block) {
      forward_block(args, shape, memory, head, block, key_block, round_up(count, kRows));
    }
    finish_block<T>(args, shape, memory, head, first, count);
  }
}

template <typename T, typename Product>
void forward_heads(const Attention& args, int64_t first_head, int64_t end_head, float* scratch) {
  const Shape<Product> shape(args);
  const ForwardMemory<Product> memory(args, shape, scratch);
  for (int64_t head = first_head; head < end_head; ++head) forward_head<T>(args, shape, memory, head);
}

}  // namespace

int64_t attention_scratch(const Attention& args) {
  if (args.type == Type::bf16) return ForwardMemory<Bf16Product>(args, Shape<Bf16Product>(args), nullptr).floats;
  return ForwardMemory<Single>(args, Shape<Single>(args), nullptr).floats;
}

void attention_forward(const Attention& args, int64_t first_head, int64_t end_head, float* scratch) {
  switch (args.type) {
    case Type::fp32: return forward_heads<float, Single>(args, first_head, end_head, scratch);
    case Type::bf16: return forward_heads<bf16, Bf16Product>(args, first_head, end_head, scratch);
    case Type::fp16: return forward_heads<fp16, Single>(args, first_head, end_head, scratch);
  }
}

}  // namespace gptfast::cpu::GPTFAST_ISA

#endif
