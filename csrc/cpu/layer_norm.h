// The backward of layer_norm as add_layer_norm uses it too: the front end of layer_norm_backward's kernel.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "check.h"

namespace gptfast::cpu {

using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// dx + dtotal (which may be absent: a gradient of x that comes another way), dweight, dbias
Three layer_norm_gradients(OptionalTensor dtotal, const at::Tensor& dy, const at::Tensor& x, OptionalTensor weight,
                           const at::Tensor& mean, const at::Tensor& rstd);

}  // namespace gptfast::cpu
