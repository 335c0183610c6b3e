// Products of the head curvature ops on CUDA: over the columns of a sample, over the samples of a domain, and over the
// classes, which gives the gradient by x.
#pragma once

#include "head_curvature_table.h"

namespace transfuse {
namespace head {

constexpr int kMoveClasses = 32;  // classes whose factors lie in shared memory meanwhile
constexpr int kSumSamples = 64;   // samples whose factors lie in shared memory

// A matrix (classes x columns) for each domain, and a further column beside it.
template <class T>
struct Matrix {
  const T* at;
  int64_t stride, domain_stride;
  const T* ones;  // or nullptr
  int64_t ones_stride, ones_domain;
};

// ---- over the columns -----------------------------------------------------------------------------------------------

template <class T>
struct Dots {
  Stretches parts;  // of kDotSamples
  int64_t columns, classes;
  const T* x;
  int products;  // 1 or 2
  Matrix<T> with[2];
  T* out[2];  // (samples, classes)
};

// Halves the numbers a lane has: it keeps those of its half of the lanes and gives the others away. Numbers have to be
// in registers, so every index is known when this is compiled.
template <int Step, class T>
__device__ inline void transpose(T (&v)[kWarp]) {
  const bool upper = (threadIdx.x & Step) != 0;
#pragma unroll
  for (int i = 0; i < Step; ++i) {
    const T kept = upper ? v[i + Step] : v[i], given = upper ? v[i] : v[i + Step];
    v[i] = kept + __shfl_xor_sync(kAll, given, Step);
  }
  if constexpr (Step > 1) transpose<Step / 2>(v);
}

// Of 32 numbers in each lane of a warp, lane l gets the sum over lanes of number l.
template <class T>
__device__ inline T transposed_sum(T (&v)[kWarp]) {
  transpose<kWarp / 2>(v);
  return v[0];
}

template <class T, int P, bool Squared>
__global__ void __launch_bounds__(kThreads) dots_kernel(const Dots<T> d) {
  static_assert(kDotSamples * kClasses == kWarp, "a lane for each product");
  using Q = Pack<T, P>;
  __shared__ T memory[kWarps][kWarp];
  const int64_t tiles = (d.classes + kClasses - 1) / kClasses, many = d.products * tiles;
  for (int64_t item = blockIdx.x; item < d.parts.count * many; item += gridDim.x) {
    const Rows rows = find_rows(d.parts, item / many);
    const int which = (int)(item % many / tiles);
    const int64_t first = item % tiles * kClasses;
    const Matrix<T>& m = d.with[which];
    const T *x[kDotSamples], *w[kClasses];
    // Beyond the last, the last again.
#pragma unroll
    for (int s = 0; s < kDotSamples; ++s)
      x[s] = d.x + (rows.first + s < rows.last ? rows.first + s : rows.last - 1) * d.columns;
#pragma unroll
    for (int c = 0; c < kClasses; ++c)
      w[c] = m.at + rows.domain * m.domain_stride + (first + c < d.classes ? first + c : d.classes - 1) * m.stride;
    T sum[kWarp] = {};
    for (int64_t k = (int64_t)threadIdx.x * P; k < d.columns; k += kThreads * P) {
      Q a[kDotSamples], b[kClasses];
#pragma unroll
      for (int s = 0; s < kDotSamples; ++s) a[s] = load_pack<Q>(x[s] + k);
#pragma unroll
      for (int c = 0; c < kClasses; ++c) b[c] = load_pack<Q>(w[c] + k);
#pragma unroll
      for (int i = 0; i < P; ++i)
#pragma unroll
        for (int s = 0; s < kDotSamples; ++s) {
          const T v = Squared ? a[s].v[i] * a[s].v[i] : a[s].v[i];
#pragma unroll
          for (int c = 0; c < kClasses; ++c) sum[s * kClasses + c] += v * b[c].v[i];
        }
    }
    const T own = transposed_sum(sum);
    __syncthreads();
    memory[threadIdx.x / kWarp][threadIdx.x % kWarp] = own;
    __syncthreads();
    if (threadIdx.x >= kWarp) continue;
    const int64_t sample = rows.first + threadIdx.x / kClasses, c = first + threadIdx.x % kClasses;
    if (sample >= rows.last || c >= d.classes) continue;
    T total = m.ones == nullptr ? T(0) : m.ones[rows.domain * m.ones_domain + c * m.ones_stride];
    for (int g = 0; g < kWarps; ++g) total += memory[g][threadIdx.x];
    d.out[which][sample * d.classes + c] = total;
  }
}

// ---- products over the samples --------------------------------------------------------------------------------------

// Results (domains, classes, columns), and a further column beside them.
template <class T>
struct Result {
  T* at;
  int64_t stride, domain_stride;
  T* ones;  // or nullptr
  int64_t ones_stride, ones_domain;
};

template <class T>
struct Sums {
  Stretches parts;
  int64_t columns, width, classes;  // width: with the column of ones, if that is wanted
  const T* x;
  const T* left;  // (samples, classes)
  T* partial;     // (stretches, classes, width); nullptr: one stretch for each domain
  Result<T> to;
};

template <class T>
__device__ inline void put_result(const Result<T>& to, int64_t domain, int64_t c, int64_t k, int64_t columns, T x) {
  if (k < columns)
    to.at[domain * to.domain_stride + c * to.stride + k] = x;
  else
    to.ones[domain * to.ones_domain + c * to.ones_stride] = x;
}

template <class T, int P, bool Squared>
__global__ void __launch_bounds__(kThreads, 1) sums_kernel(const Sums<T> s) {
  using Q = Pack<T, P>;
  constexpr int kWide = kWarp * P;  // columns of a thread block; its warps share the samples
  __shared__ T factor[kSumSamples][kClasses];
  __shared__ T memory[kWarps][kClasses][kWide];
  const int64_t tiles = (s.classes + kClasses - 1) / kClasses, blocks = (s.width + kWide - 1) / kWide;
  const int lane = (int)(threadIdx.x % kWarp), warp = (int)(threadIdx.x / kWarp);
  for (int64_t item = blockIdx.x; item < s.parts.count * tiles * blocks; item += gridDim.x) {
    const int64_t part = item / (tiles * blocks), first = item / blocks % tiles * kClasses;
    const int64_t k = item % blocks * kWide + lane * P;
    const Rows rows = find_rows(s.parts, part);
    T sum[kClasses][P] = {};
    for (int64_t begin = rows.first; begin < rows.last; begin += kSumSamples) {
      const int count = rows.last - begin < kSumSamples ? (int)(rows.last - begin) : kSumSamples;
      __syncthreads();
      for (int i = (int)threadIdx.x; i < count * kClasses; i += kThreads) {
        const int64_t c = first + i % kClasses;
        factor[i / kClasses][i % kClasses] = c < s.classes ? s.left[(begin + i / kClasses) * s.classes + c] : T(0);
      }
      __syncthreads();
      T own[kClasses][P] = {};  // a sum over many samples is one of short sums
#pragma unroll(sizeof(T) == 8 ? 2 : 4)
      for (int n = warp; n < count; n += kWarps) {
        Q x = {};
        if (k < s.columns) x = load_pack<Q>(s.x + (begin + n) * s.columns + k);
        // The column of ones; a pack does not reach from the others into it.
        if (k == s.columns) x.v[0] = T(1);
#pragma unroll
        for (int i = 0; i < P; ++i) {
          const T v = Squared ? x.v[i] * x.v[i] : x.v[i];
#pragma unroll
          for (int c = 0; c < kClasses; ++c) own[c][i] += factor[n][c] * v;
        }
      }
#pragma unroll
      for (int c = 0; c < kClasses; ++c)
#pragma unroll
        for (int i = 0; i < P; ++i) sum[c][i] += own[c][i];
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kClasses; ++c)
#pragma unroll
      for (int i = 0; i < P; ++i) memory[warp][c][lane * P + i] = sum[c][i];
    __syncthreads();
    for (int t = (int)threadIdx.x; t < kClasses * kWide; t += kThreads) {
      const int64_t c = first + t / kWide, column = item % blocks * kWide + t % kWide;
      if (c >= s.classes || column >= s.width) continue;
      T total = memory[0][t / kWide][t % kWide];
      for (int w = 1; w < kWarps; ++w) total += memory[w][t / kWide][t % kWide];
      if (s.partial != nullptr)
        s.partial[(part * s.classes + c) * s.width + column] = total;
      else
        put_result(s.to, rows.domain, c, column, s.columns, total);
    }
  }
}

// Adds the stretches of each domain in order.
template <class T>
__global__ void __launch_bounds__(kThreads) fold_kernel(const Sums<T> s) {
  const int64_t plane = s.classes * s.width;
  for (int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x; i < s.parts.domains * plane;
       i += (int64_t)gridDim.x * kThreads) {
    const int64_t domain = i / plane, at = i % plane;
    T total = T(0);
#pragma unroll 4
    for (int64_t part = s.parts.start[domain]; part < s.parts.start[domain + 1]; ++part)
      total += s.partial[part * plane + at];
    put_result(s.to, domain, at / s.width, at % s.width, s.columns, total);
  }
}

// ---- the gradient by x ----------------------------------------------------------------------------------------------

template <class T>
struct Moves {
  Stretches parts;  // of kMoveSamples
  int64_t columns, classes;
  const T* x;
  int products;        // 2, or 3 with turn
  const T* factor[3];  // left, slope, turn: (samples, classes)
  Matrix<T> with[3];   // the cotangent, the weight, the vectors
  T* out;
};

// out = (2 x *) left G + slope W + turn V
template <class T, int P, bool Squared>
__global__ void __launch_bounds__(kThreads) moves_kernel(const Moves<T> m) {
  using Q = Pack<T, P>;
  constexpr int kWide = kThreads * P;
  __shared__ T factor[3][kMoveClasses][kMoveSamples];
  const int64_t blocks = (m.columns + kWide - 1) / kWide;
  for (int64_t item = blockIdx.x; item < m.parts.count * blocks; item += gridDim.x) {
    const Rows rows = find_rows(m.parts, item / blocks);
    const int64_t k = item % blocks * kWide + (int64_t)threadIdx.x * P;
    const int count = (int)(rows.last - rows.first);
    T sum[kMoveSamples][P] = {}, moved[Squared ? kMoveSamples : 1][P] = {};
    for (int64_t first = 0; first < m.classes; first += kMoveClasses) {
      const int classes = m.classes - first < kMoveClasses ? (int)(m.classes - first) : kMoveClasses;
      __syncthreads();
      for (int i = (int)threadIdx.x; i < m.products * kMoveClasses * kMoveSamples; i += kThreads) {
        const int j = i / (kMoveClasses * kMoveSamples), rest = i % (kMoveClasses * kMoveSamples);
        const int n = rest / kMoveClasses, c = rest % kMoveClasses;
        factor[j][c][n] = n < count && c < classes ? m.factor[j][(rows.first + n) * m.classes + first + c] : T(0);
      }
      __syncthreads();
      if (k >= m.columns) continue;
      for (int j = 0; j < m.products; ++j) {
        const Matrix<T>& with = m.with[j];
        const T* from = with.at + rows.domain * with.domain_stride + first * with.stride + k;
#pragma unroll 2
        for (int c = 0; c < classes; ++c) {
          const Q w = load_pack<Q>(from + c * with.stride);
#pragma unroll
          for (int n = 0; n < kMoveSamples; ++n)
#pragma unroll
            for (int i = 0; i < P; ++i) {
              if (Squared && j == 0)
                moved[Squared ? n : 0][i] += factor[j][c][n] * w.v[i];
              else
                sum[n][i] += factor[j][c][n] * w.v[i];
            }
        }
      }
    }
    if (k >= m.columns) continue;
#pragma unroll
    for (int n = 0; n < kMoveSamples; ++n) {
      if (n >= count) continue;
      const int64_t at = (rows.first + n) * m.columns + k;
      Q y;
      if constexpr (Squared) {
        const Q x = load_pack<Q>(m.x + at);
#pragma unroll
        for (int i = 0; i < P; ++i) sum[n][i] += T(2) * x.v[i] * moved[n][i];
      }
#pragma unroll
      for (int i = 0; i < P; ++i) y.v[i] = sum[n][i];
      *reinterpret_cast<Q*>(m.out + at) = y;
    }
  }
}

}  // namespace head
}  // namespace transfuse
