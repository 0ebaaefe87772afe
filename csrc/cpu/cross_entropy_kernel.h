// Cross entropy on rows of logits: log-sum-exp and loss, the gradient, and both in one go.
// One reading of a row from memory gives its log-sum-exp: block by block, each lane keeps its own maximum and a sum relative to it,
// and exponentials are taken while a block is in the first-level cache. For a gradient they are kept (a row fits in the second-level
// cache) and then only scaled. What limits it is exp, then bandwidth: 1 element a logit read, 1 written for a gradient.
#pragma once

#include "cpu/isa.h"
#include "cpu/vec_types.h"

namespace gptfast::cpu {

struct CrossEntropy {
  Type type;                // of logits
  Type gradient_type;       // of gradient: type, or any where type is fp32
  const void* logits;       // rows of `columns`, `logits_stride` elements from row to row
  int64_t logits_stride;
  void* gradient;           // as logits; in one go it may be the memory of the logits where the two types are one
  int64_t gradient_stride;
  bool stream;              // a gradient of its own that no cache will hold: its lines need not be read before they are written
  const void* targets;      // [N] int64 or int32
  bool targets_are_64_bit;
  int64_t ignore_index;
  int64_t vocab;            // real columns
  int64_t columns;          // with the padding, whose gradient is 0
  const float* factor;      // of a row's gradient: factor[row * factor_stride]
  int64_t factor_stride;    // 1, or 0 where one number serves all rows
  float* loss;              // [N]
  float* lse;               // [N]; in one go it may be absent
};

constexpr int64_t kCrossEntropyBlock = 1024;
constexpr int64_t kWidestVec = 16;

// Floats that a thread needs to itself for gradients: the exponentials of a row, and the maxima that a block's stand for
inline int64_t cross_entropy_scratch(int64_t vocab) {
  return vocab + ((vocab + kCrossEntropyBlock - 1) / kCrossEntropyBlock + 1) * kWidestVec;
}

}  // namespace gptfast::cpu

// Writes loss and lse
GPTFAST_PER_ISA(void cross_entropy_forward(const CrossEntropy& args, int64_t first_row, int64_t end_row))
// Reads lse, writes gradient; scratch [cross_entropy_scratch(vocab)] is the calling thread's own
GPTFAST_PER_ISA(void cross_entropy_backward(const CrossEntropy& args, int64_t first_row, int64_t end_row, float* scratch))
// Writes loss, lse and gradient
GPTFAST_PER_ISA(void cross_entropy_forward_backward(const CrossEntropy& args, int64_t first_row, int64_t end_row, float* scratch))

#ifdef GPTFAST_ISA

#include "cpu/vec_math.h"

namespace gptfast::cpu::GPTFAST_ISA {
namespace {

constexpr int64_t kIgnored = -1, kOutside = -2;
constexpr float kLowest = -__FLT_MAX__;

GPTFAST_INLINE int64_t target_of(const CrossEntropy& args, int64_t row) {
  const int64_t target = args.targets_are_64_bit ? static_cast<const int64_t*>(args.targets)[row]
                                                 : static_cast<const int32_t*>(args.targets)[row];
  if (target == args.ignore_index) return kIgnored;
  return target >= 0 && target < args.vocab ? target : kOutside;
}

// sum = sum of exp(x - largest)
struct Statistics {
  float largest, sum;
  float log_sum() const { return __builtin_logf(sum); }
};

// The first n lanes of v, the lowest number in the others
GPTFAST_INLINE Vec or_lowest(Vec v, int n) {
  return n == kWidth ? v : keep_first(v, n) + (set(kLowest) - keep_first(set(kLowest), n));
}

template <typename T>
GPTFAST_INLINE Vec largest_of(const T* x, int64_t count, Vec largest) {
  Vec a = largest, b = largest, c = largest, d = largest;
  int64_t i = 0;
  for (; i + 4 * kWidth <= count; i += 4 * kWidth) {
    a = maximum(a, load(x + i));
    b = maximum(b, load(x + i + kWidth));
    c = maximum(c, load(x + i + 2 * kWidth));
    d = maximum(d, load(x + i + 3 * kWidth));
  }
  for_columns(count - i, [&](int64_t j, int lanes) { a = maximum(a, or_lowest(load_lanes(x + i + j, lanes), lanes)); });
  return maximum(maximum(a, b), maximum(c, d));
}

// A lane's maximum starts at the lowest number, not at -inf: a row of -inf then has the sum 0 and no inf - inf on the way to it.
// Blocks are summed apart, so that a sum of many terms is rounded as seldom with 4 lanes as with 16.
// With kKeep exp(x - its lane's maximum so far) goes to kept [vocab], and that maximum to maxima [blocks, kWidth]; kept may be x.
template <bool kKeep, typename T>
GPTFAST_INLINE Statistics statistics(const T* x, int64_t vocab, float* kept, float* maxima) {
  Vec largest = set(kLowest), total = set(0);
  for (int64_t first = 0; first < vocab; first += kCrossEntropyBlock) {
    const int64_t count = vocab - first < kCrossEntropyBlock ? vocab - first : kCrossEntropyBlock;
    const T* block = x + first;
    const Vec before = largest;
    largest = largest_of(block, count, before);
    Vec a = set(0), b = set(0), c = set(0), d = set(0);
    if constexpr (kKeep) store(maxima + first / kCrossEntropyBlock * kWidth, largest);
    const auto exponential = [&](int64_t i, int lanes) {
      const Vec e = exp_bounded(load_lanes(block + i, lanes) - largest);
      if constexpr (kKeep) store_lanes(kept + first + i, e, lanes);
      return e;
    };
    int64_t i = 0;
    for (; i + 4 * kWidth <= count; i += 4 * kWidth) {
      a += exponential(i, kWidth);
      b += exponential(i + kWidth, kWidth);
      c += exponential(i + 2 * kWidth, kWidth);
      d += exponential(i + 3 * kWidth, kWidth);
    }
    for_columns(count - i, [&](int64_t j, int lanes) {
      const Vec e = exponential(i + j, lanes);
      a += lanes == kWidth ? e : keep_first(e, lanes);
    });
    total = total * exp_bounded(before - largest) + ((a + b) + (c + d));
  }
  const float most = max(largest);
  return {most, sum(total * exp_bounded(largest - set(most)))};
}

template <typename T>
GPTFAST_INLINE float loss_of(const Statistics& row, const T* x, int64_t target) {
  if (target == kIgnored) return 0;
  return target == kOutside ? __builtin_nanf("") : row.log_sum() - (load(x + target, 1)[0] - row.largest);
}

template <typename G>
GPTFAST_INLINE void fill_columns(G* gradient, int64_t first, int64_t end, float value) {
  for_columns(end - first, [&](int64_t i, int lanes) { store_lanes(gradient + first + i, set(value), lanes); });
}

// Where no logit matters: rows that are ignored, or whose target is outside the vocabulary
template <typename G>
GPTFAST_INLINE void constant_row(const CrossEntropy& args, G* gradient, int64_t target) {
  fill_columns(gradient, 0, args.vocab, target == kIgnored ? 0 : __builtin_nanf(""));
  fill_columns(gradient, args.vocab, args.columns, 0);
}

template <typename T>
void forward(const CrossEntropy& args, int64_t first_row, int64_t end_row) {
  for (int64_t row = first_row; row < end_row; ++row) {
    const T* x = static_cast<const T*>(args.logits) + row * args.logits_stride;
    const Statistics found = statistics<false>(x, args.vocab, nullptr, nullptr);
    args.loss[row] = loss_of(found, x, target_of(args, row));
    args.lse[row] = found.largest + found.log_sum();
  }
}

// Softmax from the exponentials' own sum: that of exp(x - lse) is not quite 1, because lse, a number of the logits' size, was rounded
template <typename T, typename G>
void backward(const CrossEntropy& args, int64_t first_row, int64_t end_row, float* scratch) {
  for (int64_t row = first_row; row < end_row; ++row) {
    const T* x = static_cast<const T*>(args.logits) + row * args.logits_stride;
    G* gradient = static_cast<G*>(args.gradient) + row * args.gradient_stride;
    const int64_t target = target_of(args, row);
    if (target < 0) {
      constant_row(args, gradient, target);
      continue;
    }
    const Vec lse = set(args.lse[row]);
    const float total = sum_columns(args.vocab, [&](int64_t i, int lanes) {
      const Vec e = exp_bounded(load_lanes(x + i, lanes) - lse);
      store_lanes(scratch + i, e, lanes);
      return e;
    });
    const float factor = args.factor[row * args.factor_stride], share = factor / total;
    if (args.stream) {
      for_aligned_columns(gradient, args.vocab, [&](int64_t i, int lanes) {
        stream_lanes(gradient + i, load_lanes(scratch + i, lanes) * set(share), lanes);
      });
    } else {
      for_columns(args.vocab, [&](int64_t i, int lanes) {
        store_lanes(gradient + i, load_lanes(scratch + i, lanes) * set(share), lanes);
      });
    }
    fill_columns(gradient, args.vocab, args.columns, 0);
    store(gradient + target, set(scratch[target] * share - factor), 1);
  }
  finish_streams();
}

template <typename T, typename G>
void forward_backward(const CrossEntropy& args, int64_t first_row, int64_t end_row, float* scratch) {
  const int64_t vocab = args.vocab;
  for (int64_t row = first_row; row < end_row; ++row) {
    const T* x = static_cast<const T*>(args.logits) + row * args.logits_stride;
    G* gradient = static_cast<G*>(args.gradient) + row * args.gradient_stride;
    const int64_t target = target_of(args, row);
    float* maxima = scratch;
    float* kept = scratch + (cross_entropy_scratch(vocab) - vocab);
    if constexpr (__is_same(T, float) && __is_same(G, float)) kept = x == gradient ? gradient : kept;
    if (target < 0 && args.lse == nullptr) {
      args.loss[row] = target == kIgnored ? 0 : __builtin_nanf("");
      constant_row(args, gradient, target);
      continue;
    }
    const float logit = load(x + (target < 0 ? 0 : target), 1)[0];  // before exponentials take its place
    const Statistics found = statistics<true>(x, vocab, kept, maxima);
    if (args.lse != nullptr) args.lse[row] = found.largest + found.log_sum();
    args.loss[row] = loss_of(found, &logit, target < 0 ? target : 0);
    if (target < 0) {
      constant_row(args, gradient, target);
      continue;
    }
    const float factor = args.factor[row * args.factor_stride], share = factor / found.sum;
    const auto scaling = [&](int64_t column) {  // of a block's exponentials, lane by lane
      return exp_bounded(load(maxima + column / kCrossEntropyBlock * kWidth) - set(found.largest)) * set(share);
    };
    const float at_target = kept[target] * scaling(target)[target % kWidth] - factor;
    for (int64_t first = 0; first < vocab; first += kCrossEntropyBlock) {
      const int64_t count = vocab - first < kCrossEntropyBlock ? vocab - first : kCrossEntropyBlock;
      const Vec scale = scaling(first);
      for_columns(count, [&](int64_t i, int lanes) {
        store_lanes(gradient + first + i, load_lanes(kept + first + i, lanes) * scale, lanes);
      });
    }
    fill_columns(gradient, vocab, args.columns, 0);
    store(gradient + target, set(at_target), 1);
  }
}

}  // namespace

void cross_entropy_forward(const CrossEntropy& args, int64_t first_row, int64_t end_row) {
  switch (args.type) {
    case Type::fp32: return forward<float>(args, first_row, end_row);
    case Type::bf16: return forward<bf16>(args, first_row, end_row);
    case Type::fp16: return forward<fp16>(args, first_row, end_row);
  }
}

void cross_entropy_backward(const CrossEntropy& args, int64_t first_row, int64_t end_row, float* scratch) {
  switch (args.type) {
    case Type::fp32: return backward<float, float>(args, first_row, end_row, scratch);
    case Type::bf16: return backward<bf16, bf16>(args, first_row, end_row, scratch);
    case Type::fp16: return backward<fp16, fp16>(args, first_row, end_row, scratch);
  }
}

void cross_entropy_forward_backward(const CrossEntropy& args, int64_t first_row, int64_t end_row, float* scratch) {
  switch (args.type) {
    case Type::bf16: return forward_backward<bf16, bf16>(args, first_row, end_row, scratch);
    case Type::fp16: return forward_backward<fp16, fp16>(args, first_row, end_row, scratch);
    case Type::fp32: break;
  }
  switch (args.gradient_type) {
    case Type::fp32: return forward_backward<float, float>(args, first_row, end_row, scratch);
    case Type::bf16: return forward_backward<float, bf16>(args, first_row, end_row, scratch);
    case Type::fp16: return forward_backward<float, fp16>(args, first_row, end_row, scratch);
  }
}

}  // namespace gptfast::cpu::GPTFAST_ISA

#endif
