// Launchers of layer_norm.cuh: which kernel takes a shape, and how large the grid is. Grids depend on shapes alone.
#include "layer_norm.cuh"

#include <algorithm>

#include "launch.cuh"
#include "launchers.h"

namespace gptfast::cuda {
namespace {

// Partial rows of dweight and dbias: enough blocks to fill the machine, few enough that adding them up costs little
int64_t backward_blocks(int64_t rows, int64_t columns, int width) {
  const int64_t threads = round_up(std::max<int64_t>(ceil_div(columns, width), 1), 32);
  const int64_t resident = std::clamp<int64_t>(768 / threads, 1, 8);
  return std::min(ceil_div(rows, kBackwardRows), kMultiprocessors * resident);
}

template <class T, int SPANS = 1>
auto forward_kernel(int spans) {
  if constexpr (SPANS < kMaxSpans) {
    if (spans > SPANS) return forward_kernel<T, SPANS + 1>(spans);
  }
  return layer_norm_forward<T, SPANS>;
}

template <class T>
const char* forward(const T* x, Array weight, Array bias, float eps, int64_t rows, int64_t columns, T* y, float* mean, float* rstd,
                    cudaStream_t stream) {
  constexpr int E = kVectorWidth<T>;
  const bool vectors = columns % E == 0 && aligned_16(x) && aligned_16(y);
  if (vectors && columns > 0 && columns <= kMaxSpans * kSpan) {
    const dim3 grid = std::min<int64_t>(ceil_div(rows, kForwardWarps), kMultiprocessors * 8);
    const auto kernel = forward_kernel<T>(static_cast<int>(ceil_div(columns, kSpan)));
    return launch(kernel, grid, kForwardWarps * 32, stream, x, weight, bias, eps, rows, columns, y, mean, rstd);
  }
  const dim3 grid = std::min<int64_t>(rows, kMultiprocessors * 8);
  const auto kernel = vectors ? layer_norm_forward_wide<T, E> : layer_norm_forward_wide<T, 1>;
  return launch(kernel, grid, kWideThreads, stream, x, weight, bias, eps, rows, columns, y, mean, rstd);
}

template <class T>
const char* backward(const T* dy, const T* x, Array weight, const float* mean, const float* rstd, int64_t rows, int64_t columns,
                     T* dx, float* partial, cudaStream_t stream) {
  constexpr int E = kVectorWidth<T>;
  const bool vectors = columns % E == 0 && aligned_16(dy) && aligned_16(x) && aligned_16(dx);
  const dim3 grid = backward_blocks(rows, columns, E);
  const int64_t threads = round_up(ceil_div(columns, vectors ? E : 1), 32);
  if (threads <= kMaxBackwardThreads) {
    const auto kernel = vectors ? layer_norm_backward<T, E> : layer_norm_backward<T, 1>;
    return launch(kernel, grid, threads, stream, dy, x, weight, mean, rstd, rows, columns, dx, partial);
  }
  const auto kernel = vectors ? layer_norm_backward_wide<T, E> : layer_norm_backward_wide<T, 1>;
  return launch(kernel, grid, kWideThreads, stream, dy, x, weight, mean, rstd, rows, columns, dx, partial);
}

}  // namespace
}  // namespace gptfast::cuda

using namespace gptfast::cuda;

const char* gptfast_layer_norm(Array x, Array weight, Array bias, float eps, int64_t rows, int64_t columns, void* y, float* mean,
                               float* rstd, void* stream) {
  if (rows == 0) return nullptr;
  return with_type(x.type, [&](auto zero) {
    using T = decltype(zero);
    return forward(static_cast<const T*>(x.data), weight, bias, eps, rows, columns, static_cast<T*>(y), mean, rstd,
                   static_cast<cudaStream_t>(stream));
  });
}

int64_t gptfast_layer_norm_backward_workspace(int64_t rows, int64_t columns, Type type) {
  return with_type(type, [&](auto zero) { return backward_blocks(rows, columns, kVectorWidth<decltype(zero)>) * 2 * columns; });
}

const char* gptfast_layer_norm_backward(const void* dy, Array x, Array weight, const float* mean, const float* rstd, int64_t rows,
                                        int64_t columns, void* dx, Array dweight, Array dbias, float* workspace, void* stream) {
  if (columns == 0) return nullptr;
  const auto queue = static_cast<cudaStream_t>(stream);
  if (rows > 0) {
    const char* error = with_type(x.type, [&](auto zero) {
      using T = decltype(zero);
      return backward(static_cast<const T*>(dy), static_cast<const T*>(x.data), weight, mean, rstd, rows, columns,
                      static_cast<T*>(dx), workspace, queue);
    });
    if (error != nullptr) return error;
  }
  const int64_t parts = gptfast_layer_norm_backward_workspace(rows, columns, x.type) / (2 * columns);
  const dim3 grid(ceil_div(columns, 32), 2);
  return launch(layer_norm_reduce, grid, dim3(32, kReduceLanes), queue, workspace, parts, columns, dweight, dbias);
}
