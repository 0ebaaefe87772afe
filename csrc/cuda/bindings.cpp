// The CUDA ops as PyTorch sees them: checks, outputs, workspace, the current device and stream, then a launcher. No header here
// needs a CUDA toolkit or a CUDA build of torch, so this compiles, links and registers wherever nvcc compiled the kernels.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <Python.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <climits>

#include "check.h"
#include "launchers.h"

namespace gptfast::cuda {
namespace {

Type type_of(const at::Tensor& tensor) {
  if (tensor.scalar_type() == at::kBFloat16) return Type::bf16;
  return tensor.scalar_type() == at::kHalf ? Type::fp16 : Type::fp32;
}

Array array(const at::Tensor& tensor) { return {tensor.data_ptr(), type_of(tensor)}; }
Array array(OptionalTensor tensor) { return has(tensor) ? array(*tensor) : Array{nullptr, Type::fp32}; }

void* current_stream(const at::Tensor& tensor) {
  return c10::impl::VirtualGuardImpl(tensor.device().type()).getStream(tensor.device()).native_handle();
}

void check_launch(const char* error) { TORCH_CHECK(error == nullptr, error); }

using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

Three layer_norm(const at::Tensor& x, OptionalTensor weight, OptionalTensor bias, double eps) {
  check_rows(x, "x");
  check_float(x, "x");
  check_norm_parameters(x, weight, bias);
  TORCH_CHECK(x.size(1) <= INT_MAX, "x has rows of ", x.size(1), " numbers, allowed: ", INT_MAX);
  const c10::DeviceGuard guard(x.device());
  const int64_t rows = x.size(0);
  at::Tensor y = at::empty_like(x), mean = at::empty({rows}, x.options().dtype(at::kFloat)), rstd = at::empty_like(mean);
  check_launch(gptfast_layer_norm(array(x), array(weight), array(bias), static_cast<float>(eps), rows, x.size(1), y.data_ptr(),
                                  mean.data_ptr<float>(), rstd.data_ptr<float>(), current_stream(x)));
  return {y, mean, rstd};
}

Three layer_norm_backward(const at::Tensor& dy, const at::Tensor& x, OptionalTensor weight, const at::Tensor& mean,
                          const at::Tensor& rstd) {
  check_norm_backward(dy, x, weight, mean, rstd);
  TORCH_CHECK(x.size(1) <= INT_MAX, "x has rows of ", x.size(1), " numbers, allowed: ", INT_MAX);
  const c10::DeviceGuard guard(x.device());
  const int64_t rows = x.size(0), columns = x.size(1);
  at::Tensor dx = at::empty_like(x), dweight = at::empty({columns}, x.options().dtype(gradient_type(weight)));
  at::Tensor dbias = at::empty_like(dweight);
  const int64_t floats = gptfast_layer_norm_backward_workspace(rows, columns, type_of(x));
  const at::Tensor workspace = at::empty({floats}, x.options().dtype(at::kFloat));
  check_launch(gptfast_layer_norm_backward(dy.data_ptr(), array(x), array(weight), mean.data_ptr<float>(), rstd.data_ptr<float>(),
                                           rows, columns, dx.data_ptr(), array(dweight), array(dbias),
                                           workspace.data_ptr<float>(), current_stream(x)));
  return {dx, dweight, dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(gptfast, CUDA, m) {
  m.impl("layer_norm", &layer_norm);
  m.impl("layer_norm_backward", &layer_norm_backward);
}

}  // namespace gptfast::cuda

// An importable module without contents: loading it is what registers the kernels
PyMODINIT_FUNC PyInit__C_cuda() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", "gptfast's CUDA kernels; importing it registers them", 0, nullptr,
                               nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
