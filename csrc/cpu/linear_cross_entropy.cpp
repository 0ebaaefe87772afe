// linear_cross_entropy on the CPU: for each piece of the rows one product makes its logits, cross entropy turns these into their gradient
// in place, and two more products take the gradients of x and weight from them. Only one piece's logits ever exist. The three
// products (6 N C Vp operations) are what limits it.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cstring>
#include <tuple>

#include "check.h"
#include "cpu/cross_entropy.h"
#include "cpu/matmul.h"
#include "cpu/tensor.h"

namespace gptfast::cpu {
namespace {

void check_head(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& targets, int64_t vocab, const at::Tensor& scale) {
  check_rows(x, "x");
  check_float(x, "x");
  TORCH_CHECK(weight.dim() == 2, "weight has ", weight.dim(), " dimensions, needs 2: [Vp, C]");
  check_shape(weight, {weight.size(0), x.size(1)}, x, "weight");
  check_type(weight, x.scalar_type(), "weight");
  check_shape(targets, {x.size(0)}, x, "targets");
  TORCH_CHECK(vocab > 0 && vocab <= weight.size(0), "vocab is ", vocab, ", allowed: 1 to ", weight.size(0));
  check_shape(scale, {1}, x, "scale");
  check_type(scale, at::kFloat, "scale");
}

// Cross entropy of one piece; with gradients these replace the logits
void cross_entropy_of(const at::Tensor& logits, const at::Tensor& targets, int64_t ignore_index, int64_t vocab, bool need_grad,
                      const float* scale, float* loss, float* lse, float* scratch) {
  CrossEntropy args = cross_entropy_arguments(logits, targets, ignore_index, vocab);
  args.gradient = logits.mutable_data_ptr();
  args.factor = scale;
  args.loss = loss;
  args.lse = lse;
  at::parallel_for(0, logits.size(0), grain(args.columns), [&](int64_t begin, int64_t end) {
    if (need_grad) {
      GPTFAST_CALL(cross_entropy_forward_backward, args, begin, end, scratch + at::get_thread_num() * cross_entropy_scratch(vocab));
    } else {
      GPTFAST_CALL(cross_entropy_forward, args, begin, end);
    }
  });
}

// The gradient of weight: the only piece's product itself, or the fp32 sum over the pieces, each rounded once to x's dtype
class WeightGradient {
 public:
  explicit WeightGradient(bool whole) : whole_(whole) {}

  void add(const at::Tensor& dlogits, const at::Tensor& x) {
    const at::Tensor part = multiply(dlogits.t(), x.t());
    if (!total_.defined()) {
      total_ = whole_ ? part : as_type(part, at::kFloat);
      return;
    }
    float* total = total_.mutable_data_ptr<float>();
    at::parallel_for(0, part.numel(), 1 << 16, [&](int64_t begin, int64_t end) {
      GPTFAST_CALL(accumulate, type_of(part), part.const_data_ptr(), total, begin, end);
    });
  }

  // rows beyond vocab are 0 whatever x holds
  at::Tensor finish(int64_t vocab) {
    const int64_t row = total_.size(1) * static_cast<int64_t>(total_.element_size());
    std::memset(static_cast<char*>(total_.mutable_data_ptr()) + vocab * row, 0, (total_.size(0) - vocab) * row);
    return total_;
  }

 private:
  bool whole_;
  at::Tensor total_;
};

using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Four linear_cross_entropy_cpu(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& targets, int64_t ignore_index,
                              int64_t vocab, const at::Tensor& scale, int64_t chunks, bool need_grad) {
  check_head(x, weight, targets, vocab, scale);
  TORCH_CHECK(chunks >= 1, "chunks is ", chunks, ", allowed: 1 and more");
  const int64_t rows = x.size(0);
  const auto fp32 = x.options().dtype(at::kFloat);
  at::Tensor loss = at::empty({rows}, fp32), lse = at::empty({rows}, fp32);
  at::Tensor scratch = at::empty({at::get_num_threads(), cross_entropy_scratch(vocab)}, fp32);
  at::Tensor dx = need_grad ? at::empty_like(x) : at::empty({0}, x.options());
  WeightGradient dweight(chunks == 1);
  // as torch.tensor_split: the first pieces have one row more. Without rows one empty piece still makes gradients of zeros.
  for (int64_t chunk = 0, first = 0; chunk < chunks; ++chunk) {
    const int64_t length = rows / chunks + (chunk < rows % chunks ? 1 : 0);
    if (length == 0 && chunk > 0) break;
    const at::Tensor piece = x.narrow(0, first, length), wanted = targets.narrow(0, first, length);
    const at::Tensor logits = multiply(piece, weight);
    cross_entropy_of(logits, wanted, ignore_index, vocab, need_grad, scale.const_data_ptr<float>(),
                     loss.mutable_data_ptr<float>() + first, lse.mutable_data_ptr<float>() + first, scratch.mutable_data_ptr<float>());
    if (need_grad) {
      const at::Tensor part = multiply(logits, weight.t());
      if (length > 0) std::memcpy(dx.narrow(0, first, length).mutable_data_ptr(), part.const_data_ptr(), part.nbytes());
      dweight.add(logits, piece);
    }
    first += length;
  }
  return {loss, lse, dx, need_grad ? dweight.finish(vocab) : at::empty({0}, x.options())};
}

}  // namespace
}  // namespace gptfast::cpu

TORCH_LIBRARY_IMPL(gptfast, CPU, m) {
  m.impl("linear_cross_entropy", TORCH_FN(gptfast::cpu::linear_cross_entropy_cpu));
}
