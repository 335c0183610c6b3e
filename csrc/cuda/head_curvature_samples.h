// The arithmetic of a sample of the head curvature ops on CUDA, a warp for each: probabilities, the factor of the
// sample in the result, and slopes.
#pragma once

#include "head_curvature_table.h"

namespace transfuse {
namespace head {

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float magnitude(float x) { return fabsf(x); }
__device__ inline double magnitude(double x) { return fabs(x); }

template <class T>
__device__ inline T warp_sum(T x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAll, x, step);
  return x;
}

template <class T>
struct Samples {
  HeadKind kind;
  bool backward;
  int64_t samples, classes;
  Stretches parts;  // for its domains
  T *p, *rest;      // p holds the logits where probabilities are made
  const T* targets;
  const T* u;
  T* left;   // the factor of the sample in the result
  T* slope;  // the gradient by it, then that by the logits
  T* turn;   // that by u
};

// The number of the largest of p, the first of equal ones, and its value; the same in all lanes.
template <class T>
__device__ inline int64_t largest(int64_t classes, const T* p, T& peak) {
  const int64_t lane = threadIdx.x % kWarp;
  int64_t top = lane < classes ? lane : 0;
  for (int64_t c = lane + kWarp; c < classes; c += kWarp)
    if (p[c] > p[top]) top = c;
  peak = p[top];
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(kAll, peak, step);
    const int64_t index = __shfl_xor_sync(kAll, top, step);
    if (other > peak || (other == peak && index < top)) peak = other, top = index;
  }
  // NaN compares with nothing: lanes may hold different ones, and must agree.
  peak = __shfl_sync(kAll, peak, 0);
  return __shfl_sync(kAll, top, 0);
}

// z -> p and 1 - p, both with all their digits: 1 - p of the largest is the sum of the others.
template <class T>
__device__ inline void probabilities(int64_t classes, T* p, T* rest) {
  const int64_t lane = threadIdx.x % kWarp;
  if (classes == 1) {
    if (lane != 0) return;
    const T z = p[0], small = exponential(-magnitude(z)), total = T(1) + small;
    p[0] = (z >= T(0) ? T(1) : small) / total;
    rest[0] = (z >= T(0) ? small : T(1)) / total;
    if (!(z == z)) p[0] = rest[0] = z;
    return;
  }
  T peak;
  const int64_t top = largest(classes, p, peak);
  T others = T(0);
  for (int64_t c = lane; c < classes; c += kWarp) {
    const T power = exponential(p[c] - peak);
    p[c] = power;
    if (c != top) others += power;
  }
  others = warp_sum(others);
  const T total = exponential(peak - peak) + others, inverse = T(1) / total;
  for (int64_t c = lane; c < classes; c += kWarp) {
    rest[c] = (c == top ? others : total - p[c]) * inverse;
    p[c] *= inverse;
  }
}

// g -> J g = p * (g - p.g), for one output p (1 - p) g, at c = lane, lane + 32, ... Returns p.g.
template <class T, class G>
__device__ inline T jacobian(int64_t classes, const T* p, const T* rest, const G& g, T* out) {
  const int64_t lane = threadIdx.x % kWarp;
  if (classes == 1) {
    const T own = g(0), along = p[0] * own;
    __syncwarp();
    if (lane == 0) out[0] = own * (p[0] * rest[0]);
    return along;
  }
  T peak;
  const int64_t top = largest(classes, p, peak);
  T others = T(0);
  for (int64_t c = lane; c < classes; c += kWarp)
    if (c != top) others += p[c] * g(c);
  others = warp_sum(others);
  const T along = others + peak * g(top);
  __syncwarp();  // g may be where `out` is
  for (int64_t c = lane; c < classes; c += kWarp) {
    const T own = g(c);
    // For the largest class in a form that keeps its digits when p is near 1.
    out[c] = p[c] * (c == top ? own * rest[c] - others : own - along);
  }
  return along;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) samples_kernel(const Samples<T> s) {
  const int64_t lane = threadIdx.x % kWarp, classes = s.classes;
  const int64_t warps = (int64_t)gridDim.x * kWarps;
  for (int64_t n = (int64_t)blockIdx.x * kWarps + threadIdx.x / kWarp; n < s.samples; n += warps) {
    const int64_t domain = find_segment(s.parts.offset, s.parts.domains, n), at = n * classes;
    const T scale = T(1) / (T)(s.parts.offset[domain + 1] - s.parts.offset[domain]);
    T *p = s.p + at, *rest = s.rest + at, *left = s.left + at;
    if (!s.backward) {
      probabilities(classes, p, rest);
      __syncwarp();
    }
    if (s.kind == HeadKind::product) {
      const T* u = s.u + at;
      jacobian(classes, p, rest, [&](int64_t c) { return scale * u[c]; }, left);
    } else {
      for (int64_t c = lane; c < classes; c += kWarp)
        left[c] = scale * (s.kind == HeadKind::diagonal ? p[c] * rest[c] : p[c] - s.targets[at + c]);
    }
    if (!s.backward) continue;
    T* g = s.slope + at;
    if (s.kind == HeadKind::diagonal)
      for (int64_t c = lane; c < classes; c += kWarp) g[c] = scale * g[c] * (rest[c] - p[c]);
    if (s.kind == HeadKind::gradient)
      for (int64_t c = lane; c < classes; c += kWarp) g[c] *= scale;
    if (s.kind == HeadKind::product) {
      // By p: g * (u - p.u) - u * p.g.
      const T* u = s.u + at;
      const T along = jacobian(classes, p, rest, [&](int64_t c) { return scale * g[c]; }, s.turn + at);
      T mean = T(0);
      for (int64_t c = lane; c < classes; c += kWarp) mean += p[c] * u[c];
      mean = warp_sum(mean);
      for (int64_t c = lane; c < classes; c += kWarp) {
        const T own = scale * g[c];
        g[c] = own * (u[c] - mean) - u[c] * along;
      }
    }
    __syncwarp();
    jacobian(classes, p, rest, [&](int64_t c) { return g[c]; }, g);
  }
}

}  // namespace head
}  // namespace transfuse
