// Layer normalisation, forward and backward; formulas in gptfast/ops/layer_norm.py. x [rows, columns] contiguous, statistics fp32.
// Forward gives a warp a row and keeps it in registers; backward gives a thread a few columns, so that the sums over rows behind
// dweight and dbias stay in its registers. The *_wide kernels take what does not fit: long rows, and in forward unaligned ones.
#pragma once

#include "reduce.cuh"
#include "vec.cuh"

namespace gptfast::cuda {

constexpr int kLane = 8;                    // columns a lane holds of a span
constexpr int kSpan = 32 * kLane;           // columns a warp takes in one step
constexpr int kMaxSpans = 8;                // 64 registers of row in forward
constexpr int kForwardWarps = 8;            // rows a block works on at a time
constexpr int kWideThreads = 256;           // a block of the *_wide kernels
constexpr int kBackwardRows = 4;            // rows a block of the backward works on at a time
constexpr int kMaxBackwardThreads = 512;    // of backward: leaves each thread 128 registers
constexpr int kReduceLanes = 32;            // threads that share one column when partial sums are added up

// ---------------------------------------------------------------------------------------------------------------------- forward

// Where the mean is large beside the deviations, its rounding is the largest error of all. So the deviations from the rounded mean
// m are summed too, and their mean, `rest`, is taken off again.
struct Statistics {
  float mean, rest, rstd;
};

// deviations, squares: sums of x - m and of (x - m)^2 over the row
__device__ __forceinline__ Statistics statistics(float m, float deviations, float squares, int64_t columns, float eps) {
  const float rest = deviations / columns, variance = squares / columns - rest * rest;
  return {m + rest, rest, 1.0f / sqrtf((variance < 0.0f ? 0.0f : variance) + eps)};
}

// The column of the 4 neighbours number `quad` (0 or 1) of a lane in its span. Loads are 128 bits wide and neighbouring lanes read
// neighbouring addresses, so a lane's 8 columns are one run of 16-bit numbers or two runs of fp32.
template <class T>
__device__ __forceinline__ int quad_column(int span, int quad, int lane) {
  return span * kSpan + (kVectorWidth<T> == kLane ? lane * kLane + quad * 4 : quad * kSpan / 2 + lane * 4);
}

template <class T>
__device__ __forceinline__ void load_span(float (&v)[kLane], const T* row, int span, int lane, int columns, bool full) {
  constexpr int E = kVectorWidth<T>;
#pragma unroll
  for (int i = 0; i < kLane; i += E) {
    const int column = quad_column<T>(span, i / 4, lane);
    const auto vec = full || column < columns ? Vec<T, E>::load(row + column) : Vec<T, E>::zero();
    vec.unpack(v + i);
  }
}

// Grid: any number of blocks of kForwardWarps warps. Rows 16-byte aligned, (SPANS - 1) * kSpan < columns <= SPANS * kSpan.
template <class T, int SPANS>
__global__ void __launch_bounds__(kForwardWarps * 32)
    layer_norm_forward(const T* __restrict__ x, Array weight, Array bias, float eps, int64_t rows, int columns, T* __restrict__ y,
                       float* __restrict__ mean, float* __restrict__ rstd) {
  constexpr int E = kVectorWidth<T>;
  // in the order in which lanes read them, 4 neighbours at a time: no bank conflicts
  __shared__ float4 scale[SPANS * 2 * 32], shift[SPANS * 2 * 32];
  for (int i = threadIdx.x; i < SPANS * 2 * 32; i += kForwardWarps * 32) {
    const int column = quad_column<T>(i / 64, i / 32 % 2, i % 32);
    if (column < columns) {
      scale[i] = {parameter(weight, column, 1.0f), parameter(weight, column + 1, 1.0f), parameter(weight, column + 2, 1.0f),
                  parameter(weight, column + 3, 1.0f)};
      shift[i] = {parameter(bias, column, 0.0f), parameter(bias, column + 1, 0.0f), parameter(bias, column + 2, 0.0f),
                  parameter(bias, column + 3, 0.0f)};
    }
  }
  __syncthreads();

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kForwardWarps + warp; row < rows;
       row += static_cast<int64_t>(gridDim.x) * kForwardWarps) {
    float v[SPANS][kLane];
    float sum = 0.0f;
#pragma unroll
    for (int span = 0; span < SPANS; ++span) {
      load_span<T>(v[span], x + row * columns, span, lane, columns, span + 1 < SPANS);
#pragma unroll
      for (int i = 0; i < kLane; ++i) sum += v[span][i];
    }
    const float m = warp_sum(sum) / columns;

    float rest = 0.0f, squares = 0.0f;
#pragma unroll
    for (int span = 0; span < SPANS; ++span) {
#pragma unroll
      for (int i = 0; i < kLane; ++i) {
        v[span][i] = span + 1 < SPANS || quad_column<T>(span, i / 4, lane) < columns ? v[span][i] - m : 0.0f;
        rest += v[span][i];
        squares += v[span][i] * v[span][i];
      }
    }
    const Statistics stat = statistics(m, warp_sum(rest), warp_sum(squares), columns, eps);

#pragma unroll
    for (int span = 0; span < SPANS; ++span) {
#pragma unroll
      for (int i = 0; i < kLane; i += E) {
        const int column = quad_column<T>(span, i / 4, lane);
        if (span + 1 < SPANS || column < columns) {
          float out[E];
#pragma unroll
          for (int e = 0; e < E; e += 4) {
            const float4 a = scale[(span * 2 + (i + e) / 4) * 32 + lane], b = shift[(span * 2 + (i + e) / 4) * 32 + lane];
            out[e] = (v[span][i + e] - stat.rest) * stat.rstd * a.x + b.x;
            out[e + 1] = (v[span][i + e + 1] - stat.rest) * stat.rstd * a.y + b.y;
            out[e + 2] = (v[span][i + e + 2] - stat.rest) * stat.rstd * a.z + b.z;
            out[e + 3] = (v[span][i + e + 3] - stat.rest) * stat.rstd * a.w + b.w;
          }
          Vec<T, E>::pack(out).store(y + row * columns + column);
        }
      }
    }
    if (lane == 0) {
      mean[row] = stat.mean;
      rstd[row] = stat.rstd;
    }
  }
}

// Grid: any number of blocks of kWideThreads. A block takes a row and reads it three times. E = 1 takes any alignment.
template <class T, int E>
__global__ void __launch_bounds__(kWideThreads, 4)
    layer_norm_forward_wide(const T* __restrict__ x, Array weight, Array bias, float eps, int64_t rows, int64_t columns,
                            T* __restrict__ y, float* __restrict__ mean, float* __restrict__ rstd) {
  __shared__ float scratch[kWideThreads / 32 * 2];
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* from = x + row * columns;
    float v[E], sum[1] = {0.0f}, sums[2] = {0.0f, 0.0f};
    for (int64_t column = threadIdx.x * E; column < columns; column += kWideThreads * E) {
      Vec<T, E>::load(from + column).unpack(v);
#pragma unroll
      for (int e = 0; e < E; ++e) sum[0] += v[e];
    }
    block_sums<kWideThreads / 32>(sum, scratch);
    const float m = sum[0] / columns;
    for (int64_t column = threadIdx.x * E; column < columns; column += kWideThreads * E) {
      Vec<T, E>::load(from + column).unpack(v);
#pragma unroll
      for (int e = 0; e < E; ++e) {
        sums[0] += v[e] - m;
        sums[1] += (v[e] - m) * (v[e] - m);
      }
    }
    block_sums<kWideThreads / 32>(sums, scratch);
    const Statistics stat = statistics(m, sums[0], sums[1], columns, eps);
    for (int64_t column = threadIdx.x * E; column < columns; column += kWideThreads * E) {
      Vec<T, E>::load(from + column).unpack(v);
#pragma unroll
      for (int e = 0; e < E; ++e) {
        v[e] = (v[e] - m - stat.rest) * stat.rstd * parameter(weight, column + e, 1.0f) + parameter(bias, column + e, 0.0f);
      }
      Vec<T, E>::pack(v).store(y + row * columns + column);
    }
    if (threadIdx.x == 0) {
      mean[row] = stat.mean;
      rstd[row] = stat.rstd;
    }
  }
}

// --------------------------------------------------------------------------------------------------------------------- backward

// Grid: any number of blocks of at least columns / E threads, whole warps. Thread t owns columns t E .. t E + E - 1 of
// kBackwardRows rows at a time. partial [gridDim.x, 2, columns]: this block's sums for dweight, then for dbias.
template <class T, int E>
__global__ void __launch_bounds__(kMaxBackwardThreads)
    layer_norm_backward(const T* __restrict__ dy, const T* __restrict__ x, Array weight, const float* __restrict__ mean,
                        const float* __restrict__ rstd, int64_t rows, int columns, T* __restrict__ dx,
                        float* __restrict__ partial) {
  constexpr int R = kBackwardRows;
  // two halves in turn, so that one barrier a tile is enough: who writes a half has passed the barrier after everybody read it
  __shared__ float scratch[2][kMaxBackwardThreads / 32][2 * R];
  const int column = threadIdx.x * E, warps = blockDim.x / 32, lane = threadIdx.x % 32;
  const bool active = column < columns;
  float w[E], dweight[E], dbias[E];
#pragma unroll
  for (int e = 0; e < E; ++e) {
    w[e] = active ? parameter(weight, column + e, 1.0f) : 0.0f;
    dweight[e] = dbias[e] = 0.0f;
  }
  const int64_t step = static_cast<int64_t>(gridDim.x) * R;
  int half = 0;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * R; first < rows; first += step, half ^= 1) {
    Vec<T, E> grads[R], inputs[R];
    float m[R], s[R], sums[2 * R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const bool there = first + r < rows;
      const int64_t offset = (first + r) * columns + column;
      grads[r] = there && active ? Vec<T, E>::load(dy + offset) : Vec<T, E>::zero();
      inputs[r] = there && active ? Vec<T, E>::load(x + offset) : Vec<T, E>::zero();
      m[r] = there ? mean[first + r] : 0.0f;
      s[r] = there ? rstd[first + r] : 0.0f;
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      float g[E], v[E];
      grads[r].unpack(g);
      inputs[r].unpack(v);
      sums[2 * r] = sums[2 * r + 1] = 0.0f;
#pragma unroll
      for (int e = 0; e < E; ++e) {
        sums[2 * r] += g[e] * w[e];
        sums[2 * r + 1] += g[e] * w[e] * ((v[e] - m[r]) * s[r]);
      }
    }
    warp_sums(sums);
    if (lane % (32 / (2 * R)) == 0) scratch[half][threadIdx.x / 32][lane / (32 / (2 * R))] = sums[0];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2 * R; ++i) sums[i] = 0.0f;
    for (int warp = 0; warp < warps; ++warp) {
#pragma unroll
      for (int i = 0; i < 2 * R; ++i) sums[i] += scratch[half][warp][i];
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (!active || first + r >= rows) continue;
      const float mean_g = sums[2 * r] / columns, mean_gx = sums[2 * r + 1] / columns;
      float g[E], v[E];
      grads[r].unpack(g);
      inputs[r].unpack(v);
#pragma unroll
      for (int e = 0; e < E; ++e) {
        const float xhat = (v[e] - m[r]) * s[r];
        dweight[e] += g[e] * xhat;
        dbias[e] += g[e];
        v[e] = s[r] * (g[e] * w[e] - mean_g - xhat * mean_gx);
      }
      Vec<T, E>::pack(v).store(dx + (first + r) * columns + column);
    }
  }
  if (active) {
    float* mine = partial + static_cast<int64_t>(blockIdx.x) * 2 * columns + column;
#pragma unroll
    for (int e = 0; e < E; ++e) {
      mine[e] = dweight[e];
      mine[columns + e] = dbias[e];
    }
  }
}

// As layer_norm_backward for any number of columns: kWideThreads threads, a row at a time, read twice. The block's sums live in its
// rows of `partial`, of which each thread touches its own columns only. E = 1 takes any alignment.
template <class T, int E>
__global__ void __launch_bounds__(kWideThreads, 4)
    layer_norm_backward_wide(const T* __restrict__ dy, const T* __restrict__ x, Array weight, const float* __restrict__ mean,
                             const float* __restrict__ rstd, int64_t rows, int64_t columns, T* __restrict__ dx,
                             float* __restrict__ partial) {
  __shared__ float scratch[kWideThreads / 32 * 2];
  float* dweight = partial + static_cast<int64_t>(blockIdx.x) * 2 * columns;
  float* dbias = dweight + columns;
  for (int64_t column = threadIdx.x * E; column < columns; column += kWideThreads * E) {
#pragma unroll
    for (int e = 0; e < E; ++e) dweight[column + e] = dbias[column + e] = 0.0f;
  }
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const float m = mean[row], s = rstd[row];
    float g[E], v[E], sums[2] = {0.0f, 0.0f};
    for (int64_t column = threadIdx.x * E; column < columns; column += kWideThreads * E) {
      Vec<T, E>::load(dy + row * columns + column).unpack(g);
      Vec<T, E>::load(x + row * columns + column).unpack(v);
#pragma unroll
      for (int e = 0; e < E; ++e) {
        const float gw = g[e] * parameter(weight, column + e, 1.0f);
        sums[0] += gw;
        sums[1] += gw * ((v[e] - m) * s);
      }
    }
    block_sums<kWideThreads / 32>(sums, scratch);
    const float mean_g = sums[0] / columns, mean_gx = sums[1] / columns;
    for (int64_t column = threadIdx.x * E; column < columns; column += kWideThreads * E) {
      Vec<T, E>::load(dy + row * columns + column).unpack(g);
      Vec<T, E>::load(x + row * columns + column).unpack(v);
#pragma unroll
      for (int e = 0; e < E; ++e) {
        const float xhat = (v[e] - m) * s;
        dweight[column + e] += g[e] * xhat;
        dbias[column + e] += g[e];
        v[e] = s * (g[e] * parameter(weight, column + e, 1.0f) - mean_g - xhat * mean_gx);
      }
      Vec<T, E>::pack(v).store(dx + row * columns + column);
    }
  }
}

// dweight (blockIdx.y 0) and dbias (1) from partial [parts, 2, columns]. Block (32, kReduceLanes), grid (columns / 32, 2): thread
// (i, j) adds parts j, j + kReduceLanes, ... of column i, then warp i adds the lanes of column i.
__global__ void __launch_bounds__(32 * kReduceLanes)
    layer_norm_reduce(const float* __restrict__ partial, int64_t parts, int64_t columns, Array dweight, Array dbias) {
  __shared__ float sums[kReduceLanes][33];  // 33: a column's entries lie in different banks
  const int64_t first = static_cast<int64_t>(blockIdx.x) * 32, column = first + threadIdx.x;
  float sum = 0.0f;
  if (column < columns) {
    for (int64_t part = threadIdx.y; part < parts; part += kReduceLanes) sum += partial[(part * 2 + blockIdx.y) * columns + column];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  const float total = warp_sum(sums[threadIdx.x][threadIdx.y]);
  if (threadIdx.x == 0 && first + threadIdx.y < columns) {
    if (blockIdx.y == 0) {
      set(dweight, first + threadIdx.y, total);
    } else {
      set(dbias, first + threadIdx.y, total);
    }
  }
}

}  // namespace gptfast::cuda
