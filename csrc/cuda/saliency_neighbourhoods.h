// Neighbourhoods of locations on CUDA: what a convolution sees, of all channels together and of each by itself.
#pragma once

#include "saliency_reductions.h"

namespace transfuse {
namespace saliency {

struct Near {
  Phase2 phase2;
  int64_t batch, in, out;  // locations
  int64_t grid[3], out_grid[3], kernel[3], step[3], padding[3], dilation[3];
  const void *act, *grad;  // statistics, (batch, numbers, locations)
  void* to;                // (batch, out)
};

// What a convolution sees: statistics of activations over the neighbourhood of each output, in double: products of
// squares leave the range of single precision.
template <class A>
__global__ void __launch_bounds__(kThreads) near_kernel(const Near r) {
  const bool two = r.phase2 == Phase2::filter_norm || r.phase2 == Phase2::max;
  const int numbers = two ? 2 : 1;
  for (int64_t item = (int64_t)blockIdx.x * kThreads + threadIdx.x; item < r.batch * r.out;
       item += (int64_t)gridDim.x * kThreads) {
    const int64_t b = item / r.out, i = item % r.out;
    const A* a = static_cast<const A*>(r.act) + b * numbers * r.in;
    const A* g = static_cast<const A*>(r.grad) + b * numbers * r.out;
    const int64_t z0 = i / (r.out_grid[1] * r.out_grid[2]) * r.step[0] - r.padding[0];
    const int64_t y0 = i / r.out_grid[2] % r.out_grid[1] * r.step[1] - r.padding[1];
    const int64_t x0 = i % r.out_grid[2] * r.step[2] - r.padding[2];
    const bool extremes = r.phase2 == Phase2::max;
    double first = extremes ? -infinity_of(double()) : 0.0, second = extremes ? infinity_of(double()) : 0.0;
    for (int64_t dz = 0; dz < r.kernel[0]; ++dz)
      for (int64_t dy = 0; dy < r.kernel[1]; ++dy)
        for (int64_t dx = 0; dx < r.kernel[2]; ++dx) {
          const int64_t z = z0 + dz * r.dilation[0], y = y0 + dy * r.dilation[1], x = x0 + dx * r.dilation[2];
          const bool inside = z >= 0 && z < r.grid[0] && y >= 0 && y < r.grid[1] && x >= 0 && x < r.grid[2];
          const int64_t place = (z * r.grid[1] + y) * r.grid[2] + x;
          const double own = inside ? (double)a[place] : 0.0;
          const double other = inside && two ? (double)a[r.in + place] : 0.0;
          first = extremes ? larger(own, first) : first + own;
          second = extremes ? smaller(other, second) : second + other;
        }
    const double top = (double)g[i], bottom = two ? (double)g[r.out + i] : 0.0;
    double value = 0.0;
    switch (r.phase2) {
      case Phase2::norm: value = sqrt(first * top); break;
      case Phase2::filter_norm: value = sqrt(first * top + second * bottom); break;
      case Phase2::sum: value = first * top; break;
      case Phase2::max:
        value = larger(larger(first * top, first * bottom), larger(second * top, second * bottom));
        break;
    }
    static_cast<A*>(r.to)[item] = (A)value;
  }
}

struct Depthwise {
  Reduction r;  // locations are lines' numbers, channels are lines
  Phase2 phase2;
  int64_t grid[3], padding[3];
};

// The neighbourhoods of every channel by itself, 3 wide where there is padding: a lane for each location, which reads
// its neighbours from the cache.
template <class M>
__global__ void __launch_bounds__(kThreads) depthwise_kernel(const Depthwise d) {
  using A = typename Arithmetic<M>::A;
  __shared__ A memory[kWarps][2][kWarp];
  const Reduction& r = d.r;
  const int64_t blocks = (r.length + kWarp - 1) / kWarp;
  const int warp = (int)(threadIdx.x / kWarp);
  for (int64_t item = blockIdx.x; item < r.batch * r.splits * blocks; item += gridDim.x) {
    const int64_t b = item / (r.splits * blocks), split = item / blocks % r.splits, first = item % blocks * kWarp;
    const int64_t i = first + threadIdx.x % kWarp;
    const int64_t begin = r.lines * split / r.splits, end = r.lines * (split + 1) / r.splits;
    const int64_t z0 = i / (d.grid[1] * d.grid[2]), y0 = i / d.grid[2] % d.grid[1], x0 = i % d.grid[2];
    A s[2][1] = {{start_of<A>(r.stat, 0)}, {A(0)}};
    if (i < r.length) {
      for (int64_t line = begin + warp; line < end; line += kWarps) {
        const M* a = static_cast<const M*>(r.act.ptr) + b * r.act.batch + line * r.act.line;
        A g[1];
        read<M, 1>(r.grad, b, line, i, g);
        A one = d.phase2 == Phase2::max ? -infinity_of(A()) : A(0),
          two = d.phase2 == Phase2::max ? infinity_of(A()) : A(0);
        for (int64_t z = z0 - d.padding[0]; z <= z0 + d.padding[0]; ++z)
          for (int64_t y = y0 - d.padding[1]; y <= y0 + d.padding[1]; ++y)
            for (int64_t x = x0 - d.padding[2]; x <= x0 + d.padding[2]; ++x) {
              const bool inside = z >= 0 && z < d.grid[0] && y >= 0 && y < d.grid[1] && x >= 0 && x < d.grid[2];
              const A v = inside ? (A)widen(a[((z * d.grid[1] + y) * d.grid[2] + x) * r.act.inner]) : A(0);
              switch (d.phase2) {
                case Phase2::norm: one += v * v; break;
                case Phase2::filter_norm: one += positive(v) * positive(v), two += negative(v) * negative(v); break;
                case Phase2::sum: one += v; break;
                case Phase2::max: one = larger(v, one), two = smaller(v, two); break;
              }
            }
        const A up = positive(g[0]), down = negative(g[0]);
        switch (d.phase2) {
          case Phase2::norm: s[0][0] += g[0] * g[0] * one; break;
          case Phase2::filter_norm: s[0][0] += up * up * one + down * down * two; break;
          case Phase2::sum: s[0][0] += g[0] * one; break;
          case Phase2::max: s[0][0] = larger(A(g[0] * one), larger(A(g[0] * two), s[0][0])); break;
        }
      }
    }
    leave_columns<A, 1>(r, s, memory, first, static_cast<A*>(r.out) + (b * r.splits + split) * r.length);
  }
}

}  // namespace saliency
}  // namespace transfuse
