// dropout on the CPU: checks, memory, threads. The arithmetic is in dropout_kernel.h.
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>

#include "check.h"
#include "cpu/dropout_kernel.h"
#include "cpu/tensor.h"

namespace gptfast::cpu {
namespace {

at::Tensor dropout_cpu(const at::Tensor& x, double p, const at::Tensor& seed) {
  check_rows(x, "x");
  check_float(x, "x");
  TORCH_CHECK(p >= 0 && p <= 1, "p is ", p, ", allowed: 0 to 1");
  check_type(seed, at::kLong, "seed");
  TORCH_CHECK(seed.numel() == 1, "seed has ", seed.numel(), " elements, needs 1");
  at::Tensor y = at::empty_like(x);
  const double threshold = std::ceil(p * 0x1p32);  // both steps are exact
  Dropout args{};
  args.type = type_of(x);
  args.columns = x.size(1);
  args.seed = static_cast<uint64_t>(*seed.const_data_ptr<int64_t>());
  args.keeps = threshold < 0x1p32;
  args.threshold = args.keeps ? static_cast<uint32_t>(threshold) : 0;
  args.divisor = static_cast<float>(1 - p);
  args.x = x.const_data_ptr();
  args.y = y.mutable_data_ptr();
  at::parallel_for(0, x.size(0), grain(args.columns), [&](int64_t begin, int64_t end) {
    GPTFAST_CALL(dropout_rows, args, begin, end);
  });
  return y;
}

}  // namespace
}  // namespace gptfast::cpu

TORCH_LIBRARY_IMPL(gptfast, CPU, m) {
  m.impl("dropout", TORCH_FN(gptfast::cpu::dropout_cpu));
  m.impl("dropout_backward", TORCH_FN(gptfast::cpu::dropout_cpu));
}
