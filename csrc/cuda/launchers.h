// The launchers of every kernel, in plain C types. Each queues its work on `stream` (a cudaStream_t) of the current device,
// allocates nothing, waits for nothing, and returns null or why the launch failed. All arrays are contiguous.
#pragma once

#include "array.h"

extern "C" {

// x [rows, columns]; weight, bias [columns] or null; y as x; mean, rstd [rows] fp32
const char* gptfast_layer_norm(gptfast::cuda::Array x, gptfast::cuda::Array weight, gptfast::cuda::Array bias, float eps,
                               int64_t rows, int64_t columns, void* y, float* mean, float* rstd, void* stream);

// Floats of workspace that layer_norm_backward needs; depends on the shape and the size of an element of x only
int64_t gptfast_layer_norm_backward_workspace(int64_t rows, int64_t columns, gptfast::cuda::Type type);

// dy, dx as x; dweight, dbias [columns], always written
const char* gptfast_layer_norm_backward(const void* dy, gptfast::cuda::Array x, gptfast::cuda::Array weight, const float* mean,
                                        const float* rstd, int64_t rows, int64_t columns, void* dx, gptfast::cuda::Array dweight,
                                        gptfast::cuda::Array dbias, float* workspace, void* stream);
}
