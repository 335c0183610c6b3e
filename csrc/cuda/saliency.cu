// Gradient-weighted and NormGrad maps on CUDA (see saliency.h).
//
// As on the CPU, every map is made of two reductions over lines of contiguous numbers: *across* lines, into as many
// sums as a line is long (the lanes of a thread block side by side on a line, its warps and further thread blocks on
// different lines), and *along* a line, into one sum for each (a warp for each line). Lines are channels where
// locations are contiguous, and locations where channels are. Few locations in all are spread over more thread blocks,
// whose sums another kernel merges in order; there are no atomics.
#include "transfuse/saliency.h"

#include <algorithm>

#include "device.h"

namespace transfuse {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAll = 0xffffffffu;
constexpr int64_t kFill = 512;       // thread blocks that keep a GPU busy
constexpr int64_t kLeastLines = 32;  // lines that are worth a thread block of their own
template <int P>
constexpr int kTogether = P > 4 ? 2 : 4;  // lines whose numbers are on their way at once
constexpr double kPooledEps = 1e-7, kPlusEps = 1e-6;

// What is accumulated of an activation a, a gradient g and a weight. One tensor alone is given as the activation.
enum class Stat : int {
  product,
  positive_product,
  positive_gradient,
  product_square,
  positive_product_square,
  product_max,
  weighted,
  square,
  positive_square,
  sum,
  largest,
  signed_squares,
  extremes
};

__host__ __device__ inline bool reads_gradient(Stat s) { return s <= Stat::product_max; }
__host__ __device__ inline int numbers_of(Stat s) { return s >= Stat::signed_squares ? 2 : 1; }
__device__ inline bool is_largest(Stat s, int k) {
  return s == Stat::product_max || s == Stat::largest || (s == Stat::extremes && k == 0);
}
__device__ inline bool is_smallest(Stat s, int k) { return s == Stat::extremes && k == 1; }

// NaN must survive, so a comparison decides what is left out, never what stays.
template <class A>
__device__ inline A positive(A x) {
  return x < A(0) ? A(0) : x;
}
template <class A>
__device__ inline A negative(A x) {
  return x > A(0) ? A(0) : x;
}
template <class A>
__device__ inline A larger(A a, A b) {
  return a > b || a != a ? a : b;
}
template <class A>
__device__ inline A smaller(A a, A b) {
  return a < b || a != a ? a : b;
}
__device__ inline float infinity_of(float) { return __int_as_float(0x7f800000); }
__device__ inline double infinity_of(double) { return (double)__int_as_float(0x7f800000); }

template <class A>
__device__ inline A start_of(Stat s, int k) {
  return is_largest(s, k) ? -infinity_of(A()) : is_smallest(s, k) ? infinity_of(A()) : A(0);
}
template <class A>
__device__ inline A merged(Stat s, int k, A total, A part) {
  return is_largest(s, k) ? larger(part, total) : is_smallest(s, k) ? smaller(part, total) : total + part;
}

// The statistic is the same for all threads of a launch: one branch for a pack of numbers.
template <class A, int P>
__device__ inline void step(Stat stat, const A (&a)[P], const A (&g)[P], const A (&e)[P], A (&s)[2][P]) {
  const auto each = [&](auto body) {
#pragma unroll
    for (int i = 0; i < P; ++i) body(a[i], g[i], e[i], s[0][i], s[1][i]);
  };
  switch (stat) {
    case Stat::product: return each([](A x, A y, A, A& s0, A&) { s0 += x * y; });
    case Stat::positive_product: return each([](A x, A y, A, A& s0, A&) { s0 += positive(x * y); });
    case Stat::positive_gradient: return each([](A x, A y, A, A& s0, A&) { s0 += positive(y) * x; });
    case Stat::product_square: return each([](A x, A y, A, A& s0, A&) { s0 += x * y * (x * y); });
    case Stat::positive_product_square:
      return each([](A x, A y, A, A& s0, A&) {
        const A t = positive(x * y);
        s0 += t * t;
      });
    case Stat::product_max: return each([](A x, A y, A, A& s0, A&) { s0 = larger(A(x * y), s0); });
    case Stat::weighted: return each([](A x, A, A w, A& s0, A&) { s0 += x * w; });
    case Stat::square: return each([](A x, A, A, A& s0, A&) { s0 += x * x; });
    case Stat::positive_square:
      return each([](A x, A, A, A& s0, A&) {
        const A t = positive(x);
        s0 += t * t;
      });
    case Stat::sum: return each([](A x, A, A, A& s0, A&) { s0 += x; });
    case Stat::largest: return each([](A x, A, A, A& s0, A&) { s0 = larger(x, s0); });
    case Stat::signed_squares:
      return each([](A x, A, A, A& s0, A& s1) {
        const A p = positive(x), m = negative(x);
        s0 += p * p;
        s1 += m * m;
      });
    case Stat::extremes:
      return each([](A x, A, A, A& s0, A& s1) {
        s0 = larger(x, s0);
        s1 = smaller(x, s1);
      });
  }
}

// One tensor as lines; strides count elements.
struct Lines {
  const void* ptr;
  int64_t batch, line, inner;
};

template <class M, int P>
__device__ inline void read(const Lines& t, int64_t b, int64_t line, int64_t i, typename Arithmetic<M>::A (&to)[P]) {
  const M* from = static_cast<const M*>(t.ptr) + b * t.batch + line * t.line + i * t.inner;
  const Pack<M, P> pack = load_pack<Pack<M, P>>(from);  // inner is 1 where P is not
#pragma unroll
  for (int k = 0; k < P; ++k) to[k] = widen(pack.v[k]);
}

struct Reduction {
  Stat stat;
  bool root;                     // of the sums, where this launch is the last
  int64_t batch, lines, length;  // lines of one sample, numbers of one line
  int64_t splits;                // parts that the lines of a sample are cut in
  Lines act, grad;
  const void* weight;  // (batch, channels), for Stat::weighted
  void* out;           // (batch, splits, numbers, length) across, (batch, numbers, lines) along
};

template <class A>
__device__ inline A finished(const Reduction& r, A x) {
  return r.root ? (A)sqrt((double)x) : x;
}

// What the warps of a thread block have, one after the other: numbers k of 32 P neighbours, written from `to` on.
template <class A, int P>
__device__ inline void leave_columns(const Reduction& r, const A (&s)[2][P], A (*memory)[2][kWarp * P], int64_t first,
                                     A* to) {
  constexpr int kWide = kWarp * P;
  const int lane = (int)(threadIdx.x % kWarp), warp = (int)(threadIdx.x / kWarp), numbers = numbers_of(r.stat);
  __syncthreads();
#pragma unroll
  for (int k = 0; k < 2; ++k)
#pragma unroll
    for (int i = 0; i < P; ++i) memory[warp][k][lane * P + i] = s[k][i];
  __syncthreads();
  for (int t = (int)threadIdx.x; t < numbers * kWide; t += kThreads) {
    const int k = t / kWide, at = t % kWide;
    if (first + at >= r.length) continue;
    A total = memory[0][k][at];
    for (int w = 1; w < kWarps; ++w) total = merged(r.stat, k, total, memory[w][k][at]);
    to[k * r.length + first + at] = finished(r, total);
  }
}

template <class M, int P>
__global__ void __launch_bounds__(kThreads) across_kernel(const Reduction r) {
  using A = typename Arithmetic<M>::A;
  constexpr int kWide = kWarp * P;
  __shared__ A memory[kWarps][2][kWide];
  const int64_t blocks = (r.length + kWide - 1) / kWide;
  const int warp = (int)(threadIdx.x / kWarp);
  for (int64_t item = blockIdx.x; item < r.batch * r.splits * blocks; item += gridDim.x) {
    const int64_t b = item / (r.splits * blocks), split = item / blocks % r.splits, first = item % blocks * kWide;
    const int64_t i = first + (int64_t)(threadIdx.x % kWarp) * P;
    const int64_t begin = r.lines * split / r.splits, end = r.lines * (split + 1) / r.splits;
    A s[2][P];
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
      for (int p = 0; p < P; ++p) s[k][p] = start_of<A>(r.stat, k);
    if (i < r.length) {
      for (int64_t line = begin + warp; line < end; line += kWarps * kTogether<P>) {
        A a[kTogether<P>][P] = {}, g[kTogether<P>][P] = {}, e[kTogether<P>][P] = {};
#pragma unroll
        for (int u = 0; u < kTogether<P>; ++u) {
          const int64_t own = line + u * kWarps;
          if (own >= end) continue;
          read<M, P>(r.act, b, own, i, a[u]);
          if (reads_gradient(r.stat)) read<M, P>(r.grad, b, own, i, g[u]);
          if (r.stat != Stat::weighted) continue;
          const A w = static_cast<const A*>(r.weight)[b * r.lines + own];
#pragma unroll
          for (int p = 0; p < P; ++p) e[u][p] = w;
        }
#pragma unroll
        for (int u = 0; u < kTogether<P>; ++u)
          if (line + u * kWarps < end) step(r.stat, a[u], g[u], e[u], s);
      }
    }
    A* to = static_cast<A*>(r.out) + (b * r.splits + split) * numbers_of(r.stat) * r.length;
    leave_columns<A, P>(r, s, memory, first, to);
  }
}

template <class M, int P>
__global__ void __launch_bounds__(kThreads) along_kernel(const Reduction r) {
  using A = typename Arithmetic<M>::A;
  const int64_t lane = threadIdx.x % kWarp;
  for (int64_t item = (int64_t)blockIdx.x * kWarps + threadIdx.x / kWarp; item < r.batch * r.lines;
       item += (int64_t)gridDim.x * kWarps) {
    const int64_t b = item / r.lines, line = item % r.lines;
    A s[2][P];
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
      for (int p = 0; p < P; ++p) s[k][p] = start_of<A>(r.stat, k);
    for (int64_t i = lane * P; i < r.length; i += kWarp * P) {
      A a[P], g[P] = {}, e[P] = {};
      read<M, P>(r.act, b, line, i, a);
      if (reads_gradient(r.stat)) read<M, P>(r.grad, b, line, i, g);
      if (r.stat == Stat::weighted) {
#pragma unroll
        for (int p = 0; p < P; ++p) e[p] = static_cast<const A*>(r.weight)[b * r.length + i + p];
      }
      step(r.stat, a, g, e, s);
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (k >= numbers_of(r.stat)) continue;
      A total = s[k][0];
#pragma unroll
      for (int p = 1; p < P; ++p) total = merged(r.stat, k, total, s[k][p]);
      for (int to = kWarp / 2; to > 0; to /= 2) total = merged(r.stat, k, total, __shfl_xor_sync(kAll, total, to));
      if (lane == 0) static_cast<A*>(r.out)[(b * numbers_of(r.stat) + k) * r.lines + line] = finished(r, total);
    }
  }
}

// Merges the parts of every sample in order.
template <class A>
__global__ void __launch_bounds__(kThreads) merge_kernel(const Reduction r, const A* parts) {
  const int64_t plane = numbers_of(r.stat) * r.length;
  for (int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x; i < r.batch * plane;
       i += (int64_t)gridDim.x * kThreads) {
    const int64_t b = i / plane, at = i % plane;
    const int k = (int)(at / r.length);
    const A* from = parts + b * r.splits * plane + at;
    A total = from[0];
    for (int64_t split = 1; split < r.splits; ++split) total = merged(r.stat, k, total, from[split * plane]);
    static_cast<A*>(r.out)[i] = finished(r, total);
  }
}

// ---- weights of channels
// ----------------------------------------------------------------------------------------------

struct Pool {
  MapMethod method;
  int64_t batch, channels, locations;
  Lines act, grad;
  void* weight;  // (batch, channels)
};

__device__ inline double away_from_zero(double x, double eps) { return x < 0 ? x - eps : x + eps; }

__device__ inline double weight_of(const Pool& p, double first, double second) {
  if (p.method == MapMethod::gradcam) return first / (double)p.locations;
  return p.method == MapMethod::xgradcam ? first / away_from_zero(second, kPooledEps) : first;
}

template <class A>
__device__ inline A plus_term(A g, A sum) {
  const A square = g * g, below = square * (A(2) + sum * g);
  return positive(g) * (square / (below < A(0) ? below - (A)kPlusEps : below + (A)kPlusEps));
}

// One reading of the two pooled sums: of activations first (`sums`), and what the method adds with them.
template <class M, int P>
__device__ inline void pool_step(const Pool& p, bool sums, int64_t b, int64_t line, int64_t i,
                                 const typename Arithmetic<M>::A (&of_act)[P], typename Arithmetic<M>::A (&s)[2][P]) {
  using A = typename Arithmetic<M>::A;
  A a[P] = {}, g[P] = {};
  if (sums || p.method == MapMethod::xgradcam) read<M, P>(p.act, b, line, i, a);
  if (!sums) read<M, P>(p.grad, b, line, i, g);
#pragma unroll
  for (int k = 0; k < P; ++k) {
    if (sums) {
      s[0][k] += a[k];
    } else if (p.method == MapMethod::gradcam) {
      s[0][k] += g[k];
    } else if (p.method == MapMethod::xgradcam) {
      s[0][k] += a[k] * g[k];
      s[1][k] += a[k];
    } else {
      s[0][k] += plus_term(g[k], of_act[k]);
    }
  }
}

constexpr int64_t kPoolRun = 64;  // numbers of a thread that are added in A, before their sum is added in double

// Lines are channels: a warp for each.
template <class M, int P>
__global__ void __launch_bounds__(kThreads, 1) pool_along_kernel(const Pool p) {
  using A = typename Arithmetic<M>::A;
  const int64_t lane = threadIdx.x % kWarp;
  for (int64_t item = (int64_t)blockIdx.x * kWarps + threadIdx.x / kWarp; item < p.batch * p.channels;
       item += (int64_t)gridDim.x * kWarps) {
    const int64_t b = item / p.channels, channel = item % p.channels;
    double total[2] = {};
    A of_act[P] = {};
    for (int pass = p.method == MapMethod::gradcam_pp ? 0 : 1; pass < 2; ++pass) {
      total[0] = total[1] = 0.0;
      for (int64_t begin = lane * P; begin < p.locations; begin += kPoolRun * kWarp * P) {
        const int64_t limit = begin + kPoolRun * kWarp * P, end = limit < p.locations ? limit : p.locations;
        A s[2][P] = {};
#pragma unroll 4
        for (int64_t i = begin; i < end; i += kWarp * P) pool_step<M, P>(p, pass == 0, b, channel, i, of_act, s);
#pragma unroll
        for (int k = 0; k < 2; ++k)
#pragma unroll
          for (int j = 0; j < P; ++j) total[k] += (double)s[k][j];
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        for (int to = kWarp / 2; to > 0; to /= 2) total[k] += __shfl_xor_sync(kAll, total[k], to);
      }
#pragma unroll
      for (int j = 0; j < P; ++j) of_act[j] = (A)total[0];
    }
    if (lane == 0) static_cast<A*>(p.weight)[item] = (A)weight_of(p, total[0], total[1]);
  }
}

// Lines are locations: the lanes of a thread block on channels, its warps on locations.
template <class M, int P>
__global__ void __launch_bounds__(kThreads, 1) pool_across_kernel(const Pool p) {
  using A = typename Arithmetic<M>::A;
  constexpr int kWide = kWarp * P;
  __shared__ double memory[kWarps][2][kWide];
  const int64_t blocks = (p.channels + kWide - 1) / kWide;
  const int lane = (int)(threadIdx.x % kWarp), warp = (int)(threadIdx.x / kWarp);
  for (int64_t item = blockIdx.x; item < p.batch * blocks; item += gridDim.x) {
    const int64_t b = item / blocks, i = item % blocks * kWide + lane * P;
    A of_act[P] = {};
    for (int pass = p.method == MapMethod::gradcam_pp ? 0 : 1; pass < 2; ++pass) {
      __syncthreads();  // the pass before has been read
#pragma unroll
      for (int k = 0; k < 2; ++k)
#pragma unroll
        for (int j = 0; j < P; ++j) memory[warp][k][lane * P + j] = 0.0;
      for (int64_t begin = warp; i < p.channels && begin < p.locations; begin += kPoolRun * kWarps) {
        const int64_t limit = begin + kPoolRun * kWarps, end = limit < p.locations ? limit : p.locations;
        A s[2][P] = {};
#pragma unroll 4
        for (int64_t l = begin; l < end; l += kWarps) pool_step<M, P>(p, pass == 0, b, l, i, of_act, s);
#pragma unroll
        for (int k = 0; k < 2; ++k)
#pragma unroll
          for (int j = 0; j < P; ++j) memory[warp][k][lane * P + j] += (double)s[k][j];
      }
      __syncthreads();
#pragma unroll
      for (int j = 0; j < P; ++j) {
        double total[2] = {};
        for (int w = 0; w < kWarps; ++w)
          for (int k = 0; k < 2; ++k) total[k] += memory[w][k][lane * P + j];
        of_act[j] = (A)total[0];
        if (pass == 1 && warp == 0 && i + j < p.channels)
          static_cast<A*>(p.weight)[b * p.channels + i + j] = (A)weight_of(p, total[0], total[1]);
      }
    }
  }
}

// ---- neighbourhoods -------------------------------------------------------------------------------------------------

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

// ---- host -----------------------------------------------------------------------------------------------------------

int64_t volume(const int64_t* grid) { return grid[0] * grid[1] * grid[2]; }

bool channels_last(const SaliencyTensor& t, int64_t channels, int64_t locations) {
  return t.channel == 1 && channels > 1 && (t.location != 1 || locations == 1);
}

Lines lines_of(const SaliencyTensor& t, bool last) {
  return {t.ptr, t.batch, last ? t.location : t.channel, last ? t.channel : t.location};
}

template <class M>
bool packs(const Lines& t, int64_t length) {
  constexpr int P = Pack<M>::kSize;
  return t.inner == 1 && length % P == 0 && t.line % P == 0 && t.batch % P == 0 &&
         pack_aligned(static_cast<const M*>(t.ptr));
}

// Parts that the lines of a sample are cut in, so that small calls fill the GPU; by the shape alone.
int64_t splits_of(int64_t batch, int64_t lines, int64_t length) {
  const int64_t blocks = batch * ((length + kWarp - 1) / kWarp);
  return std::max<int64_t>(1, std::min(kFill / std::max<int64_t>(blocks, 1), lines / kLeastLines));
}

// Numbers of a working memory of parts: of the statistic with most of them.
int64_t parts_of(int64_t batch, int64_t lines, int64_t length) {
  const int64_t splits = splits_of(batch, lines, length);
  return splits == 1 ? 0 : batch * splits * 2 * length;
}

template <class A>
cudaError_t merge(Reduction r, A* parts, void* out, bool root, cudaStream_t stream) {
  r.out = out;
  r.root = root;
  return launch(merge_kernel<A>, (r.batch * numbers_of(r.stat) * r.length + kThreads - 1) / kThreads, kThreads, stream,
                r, (const A*)parts);
}

// A statistic of every location over the channels, (batch, numbers, locations).
template <class M>
cudaError_t over_channels(Stat stat, bool root, int64_t batch, int64_t channels, int64_t locations,
                          const SaliencyTensor& act, const SaliencyTensor& grad, const void* weight, void* parts,
                          void* out, cudaStream_t stream) {
  using A = typename Arithmetic<M>::A;
  constexpr int P = Pack<M>::kSize;
  const bool last = channels_last(act, channels, locations);
  Reduction r = {};
  r.stat = stat;
  r.root = root;
  r.batch = batch;
  r.lines = last ? locations : channels;
  r.length = last ? channels : locations;
  r.splits = last ? 1 : splits_of(batch, r.lines, r.length);
  r.act = lines_of(act, last);
  r.grad = lines_of(grad, last);
  r.weight = weight;
  r.out = out;
  const bool wide = packs<M>(r.act, r.length) && (!reads_gradient(stat) || packs<M>(r.grad, r.length));
  if (last) {
    const int64_t blocks = (batch * locations + kWarps - 1) / kWarps;
    return wide ? launch(along_kernel<M, P>, blocks, kThreads, stream, r)
                : launch(along_kernel<M, 1>, blocks, kThreads, stream, r);
  }
  if (r.splits > 1) {
    r.root = false;
    r.out = parts;
  }
  const int64_t rows = batch * r.splits;
  cudaError_t error =
      wide ? launch(across_kernel<M, P>, rows * ((r.length + kWarp * P - 1) / (kWarp * P)), kThreads, stream, r)
           : launch(across_kernel<M, 1>, rows * ((r.length + kWarp - 1) / kWarp), kThreads, stream, r);
  if (error == cudaSuccess && r.splits > 1) error = merge(r, static_cast<A*>(parts), out, root, stream);
  return error;
}

template <class M>
cudaError_t pooled(const GradMapArgs& args, void* weight, cudaStream_t stream) {
  constexpr int P = Pack<M>::kSize;
  const bool last = channels_last(args.act, args.channels, args.locations);
  const Pool p{
      args.method, args.batch, args.channels, args.locations, lines_of(args.act, last), lines_of(args.grad, last),
      weight};
  const int64_t length = last ? args.channels : args.locations;
  const bool wide = (args.method == MapMethod::gradcam || packs<M>(p.act, length)) && packs<M>(p.grad, length);
  if (last)
    return wide ? launch(pool_across_kernel<M, P>, args.batch * ((length + kWarp * P - 1) / (kWarp * P)), kThreads,
                         stream, p)
                : launch(pool_across_kernel<M, 1>, args.batch * ((length + kWarp - 1) / kWarp), kThreads, stream, p);
  const int64_t blocks = (args.batch * args.channels + kWarps - 1) / kWarps;
  return wide ? launch(pool_along_kernel<M, P>, blocks, kThreads, stream, p)
              : launch(pool_along_kernel<M, 1>, blocks, kThreads, stream, p);
}

template <class M>
cudaError_t grad_map(const GradMapArgs& args, void* memory, cudaStream_t stream) {
  using A = typename Arithmetic<M>::A;
  A* weight = static_cast<A*>(memory);
  A* parts = weight + args.batch * args.channels;
  Stat stat = Stat::weighted;
  if (args.method == MapMethod::layercam) stat = Stat::positive_gradient;
  if (args.method == MapMethod::hirescam) stat = Stat::product;
  if (args.method == MapMethod::elementwise) stat = Stat::positive_product;
  if (stat == Stat::weighted) {
    const cudaError_t error = pooled<M>(args, weight, stream);
    if (error != cudaSuccess) return error;
  }
  return over_channels<M>(stat, false, args.batch, args.channels, args.locations, args.act, args.grad, weight, parts,
                          args.out, stream);
}

bool is_norm(Phase2 phase2) { return phase2 == Phase2::norm || phase2 == Phase2::filter_norm; }

template <class M>
cudaError_t depthwise(const NormGradArgs& args, void* parts, cudaStream_t stream) {
  using A = typename Arithmetic<M>::A;
  Depthwise d = {};
  Reduction& r = d.r;
  r.stat = args.phase2 == Phase2::max ? Stat::largest : Stat::sum;
  r.batch = args.batch;
  r.lines = args.act_channels;
  r.length = volume(args.grid);
  r.splits = splits_of(r.batch, r.lines, r.length);
  r.act = lines_of(args.act, false);
  r.grad = lines_of(args.grad, false);
  r.root = is_norm(args.phase2) && r.splits == 1;
  r.out = r.splits == 1 ? args.out : parts;
  d.phase2 = args.phase2;
  for (int k = 0; k < 3; ++k) {
    d.grid[k] = args.grid[k];
    d.padding[k] = args.padding[k];
  }
  cudaError_t error =
      launch(depthwise_kernel<M>, r.batch * r.splits * ((r.length + kWarp - 1) / kWarp), kThreads, stream, d);
  if (error == cudaSuccess && r.splits > 1)
    error = merge(r, static_cast<A*>(parts), args.out, is_norm(args.phase2), stream);
  return error;
}

// The statistics that a phase 2 needs, of one tensor.
Stat statistic(Phase2 phase2, bool alone) {
  switch (phase2) {
    case Phase2::norm: return Stat::square;
    case Phase2::filter_norm: return alone ? Stat::positive_square : Stat::signed_squares;
    case Phase2::sum: return Stat::sum;
    case Phase2::max: return alone ? Stat::largest : Stat::extremes;
  }
  return Stat::sum;
}

template <class M>
cudaError_t normgrad(const NormGradArgs& args, void* memory, cudaStream_t stream) {
  using A = typename Arithmetic<M>::A;
  const int64_t in = volume(args.grid), out = volume(args.out_grid);
  A* parts = static_cast<A*>(memory);
  const auto over = [&](Stat stat, bool root, int64_t channels, int64_t locations, const SaliencyTensor& act,
                        void* to) {
    return over_channels<M>(stat, root, args.batch, channels, locations, act, args.grad, nullptr, parts, to, stream);
  };
  switch (args.phase1) {
    case Phase1::scaling: {
      const Stat stats[4] = {Stat::product_square, Stat::positive_product_square, Stat::product, Stat::product_max};
      return over(stats[(int)args.phase2], is_norm(args.phase2), args.act_channels, in, args.act, args.out);
    }
    case Phase1::bias:
      return over(statistic(args.phase2, true), is_norm(args.phase2), args.grad_channels, out, args.grad, args.out);
    case Phase1::depthwise: return depthwise<M>(args, parts, stream);
    case Phase1::conv: break;
  }
  A* of_act =
      parts + std::max(parts_of(args.batch, args.act_channels, in), parts_of(args.batch, args.grad_channels, out));
  A* of_grad = of_act + args.batch * 2 * in;
  const Stat stat = statistic(args.phase2, false);
  cudaError_t error = over(stat, false, args.act_channels, in, args.act, of_act);
  if (error == cudaSuccess) error = over(stat, false, args.grad_channels, out, args.grad, of_grad);
  if (error != cudaSuccess) return error;
  Near n = {};
  n.phase2 = args.phase2;
  n.batch = args.batch;
  n.in = in;
  n.out = out;
  for (int d = 0; d < 3; ++d) {
    n.grid[d] = args.grid[d], n.out_grid[d] = args.out_grid[d], n.kernel[d] = args.kernel[d];
    n.step[d] = args.step[d], n.padding[d] = args.padding[d], n.dilation[d] = args.dilation[d];
  }
  n.act = of_act;
  n.grad = of_grad;
  n.to = args.out;
  return launch(near_kernel<A>, (args.batch * out + kThreads - 1) / kThreads, kThreads, stream, n);
}

}  // namespace

int64_t grad_map_cuda_memory(const GradMapArgs& args) {
  return args.batch * args.channels + parts_of(args.batch, args.channels, args.locations);
}

const char* grad_map_cuda(const GradMapArgs& args, void* memory, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  return message_of(with_storage(args.dtype, [&](auto x) { return grad_map<decltype(x)>(args, memory, on); }));
}

int64_t normgrad_cuda_memory(const NormGradArgs& args) {
  const int64_t in = volume(args.grid), out = volume(args.out_grid);
  return std::max(parts_of(args.batch, args.act_channels, in), parts_of(args.batch, args.grad_channels, out)) +
         (args.phase1 == Phase1::conv ? args.batch * 2 * (in + out) : 0);
}

const char* normgrad_cuda(const NormGradArgs& args, void* memory, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  return message_of(with_storage(args.dtype, [&](auto x) { return normgrad<decltype(x)>(args, memory, on); }));
}

}  // namespace transfuse
