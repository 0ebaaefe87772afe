// Table of contents: the schema of every op, and the module gptfast._C. Kernels attach themselves to these schemas in cpu/<op>.cpp
// (TORCH_LIBRARY_IMPL(gptfast, CPU, m)) and cuda/bindings.cpp; fake kernels and autograd are in gptfast/ops/<op>.py.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>

#include "cpu/isa.h"

TORCH_LIBRARY(gptfast, m) {
  // weight and bias share a dtype: x's or fp32. mean and rstd are fp32 [N]. dweight and dbias have weight's dtype, fp32 without one.
  m.def("layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)");
  m.def("layer_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd) -> (Tensor dx, Tensor dweight, Tensor dbias)");
}

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = __VERSION__;
  info["isas"] = gptfast::cpu::usable_isas();
  info["isa"] = gptfast::cpu::isa_name(gptfast::cpu::isa());
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "gptfast's C++ ops; importing it registers them as torch.ops.gptfast.*";
  m.def("build_info", &build_info, "dict: torch (version built against), compiler, openmp, isas (that this CPU can run), isa (in use)");
  m.def("set_isa", &gptfast::cpu::set_isa, "Use the kernels of one instruction set from now on; ValueError if this CPU lacks it");
}
