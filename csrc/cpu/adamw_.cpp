// adamw_ on the CPU: checks and one parallel loop over equal blocks of all tensors. The arithmetic is in adamw__kernel.h.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "check.h"
#include "cpu/adamw__kernel.h"
#include "cpu/tensor.h"

namespace gptfast::cpu {
namespace {

double number(const at::Tensor& scalar) {
  return scalar.scalar_type() == at::kDouble ? *scalar.const_data_ptr<double>() : *scalar.const_data_ptr<float>();
}

void check_number(const at::Tensor& scalar, const at::Tensor& like, const char* name) {
  check_shape(scalar, {1}, like, name);
  const auto type = scalar.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kDouble, name, " is ", type, ", allowed: fp32, fp64");
}

void check_list(at::TensorList tensors, at::TensorList params, const char* name) {
  TORCH_CHECK(tensors.size() == params.size(), name, " has ", tensors.size(), " tensors for ", params.size(), " params");
  for (size_t i = 0; i < tensors.size(); ++i) {
    check_shape(tensors[i], params[i].sizes(), params[i], name);
    check_float(tensors[i], name);
  }
}

// The front door leaves the checks of the lists to this function: in Python they cost more than a step of a small model
std::vector<AdamWTensor> places(at::TensorList params, at::TensorList grads, at::TensorList exp_avg, at::TensorList exp_avg_sq,
                                const c10::optional<at::TensorList>& copies, double lr, at::ArrayRef<double> weight_decay) {
  check_list(params, params, "params");
  check_list(grads, params, "grads");
  check_list(exp_avg, params, "exp_avg");
  check_list(exp_avg_sq, params, "exp_avg_sq");
  if (copies.has_value()) check_list(*copies, params, "copies");
  TORCH_CHECK(weight_decay.size() == params.size(), "weight_decay has ", weight_decay.size(), " numbers for ", params.size(), " params");
  std::vector<AdamWTensor> result(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    check_type(exp_avg[i], params[i].scalar_type(), "exp_avg");
    check_type(exp_avg_sq[i], params[i].scalar_type(), "exp_avg_sq");
    AdamWTensor& place = result[i];
    place.type = type_of(params[i]);
    place.gradient_type = type_of(grads[i]);
    place.param = params[i].mutable_data_ptr();
    place.gradient = grads[i].const_data_ptr();
    place.exp_avg = exp_avg[i].mutable_data_ptr();
    place.exp_avg_sq = exp_avg_sq[i].mutable_data_ptr();
    place.keep = static_cast<float>(1 - lr * weight_decay[i]);
    if (!copies.has_value()) continue;
    place.copy_type = type_of((*copies)[i]);
    place.copy = (*copies)[i].mutable_data_ptr();
  }
  return result;
}

void adamw_cpu(at::TensorList params, at::TensorList grads, at::TensorList exp_avg, at::TensorList exp_avg_sq,
               c10::optional<at::TensorList> copies, const at::Tensor& lr, const at::Tensor& step, const at::Tensor& scale,
               const at::Tensor& finite, at::ArrayRef<double> weight_decay, double beta1, double beta2, double eps) {
  check_number(lr, params[0], "lr");
  check_number(step, params[0], "step");
  check_number(scale, params[0], "scale");
  check_number(finite, params[0], "finite");
  const std::vector<AdamWTensor> tensors = places(params, grads, exp_avg, exp_avg_sq, copies, number(lr), weight_decay);
  if (number(finite) == 0) return;
  const double steps = number(step) + 1;
  if (step.scalar_type() == at::kDouble) {
    *step.mutable_data_ptr<double>() = steps;
  } else {
    *step.mutable_data_ptr<float>() = static_cast<float>(steps);
  }
  AdamW args{};
  args.beta1 = static_cast<float>(beta1);
  args.rest1 = static_cast<float>(1 - beta1);
  args.beta2 = static_cast<float>(beta2);
  args.rest2 = static_cast<float>(1 - beta2);
  args.rate = static_cast<float>(number(lr) / (1 - std::pow(beta1, steps)));
  args.root = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, steps)));
  args.eps = static_cast<float>(eps);
  args.scale = static_cast<float>(number(scale));
  const ListBlocks blocks(params);
  args.stream = copies.has_value() && blocks.count * ListBlocks::kLength * 2 >= kLarge;
  at::parallel_for(0, blocks.count, 1, [&](int64_t begin, int64_t end) {
    blocks.pieces(begin, end, [&](int64_t, int64_t tensor, int64_t first, int64_t stop) {
      GPTFAST_CALL(adamw_update, args, tensors[tensor], first, stop);
    });
  });
}

}  // namespace
}  // namespace gptfast::cpu

TORCH_LIBRARY_IMPL(gptfast, CPU, m) { m.impl("adamw_", TORCH_FN(gptfast::cpu::adamw_cpu)); }
