// Reductions of the CUDA saliency maps over lines of numbers, across lines and along them, with the parts that few
// locations are spread over.
#pragma once

#include <algorithm>

#include "saliency_stats.h"
#include "transfuse/saliency.h"

namespace transfuse {
namespace saliency {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAll = 0xffffffffu;
constexpr int64_t kFill = 512;       // thread blocks that keep a GPU busy
constexpr int64_t kLeastLines = 32;  // lines that are worth a thread block of their own
template <int P>
constexpr int kTogether = P > 4 ? 2 : 4;  // lines whose numbers are on their way at once

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

// ---- host -----------------------------------------------------------------------------------------------------------

inline bool channels_last(const SaliencyTensor& t, int64_t channels, int64_t locations) {
  return t.channel == 1 && channels > 1 && (t.location != 1 || locations == 1);
}

inline Lines lines_of(const SaliencyTensor& t, bool last) {
  return {t.ptr, t.batch, last ? t.location : t.channel, last ? t.channel : t.location};
}

template <class M>
bool packs(const Lines& t, int64_t length) {
  constexpr int P = Pack<M>::kSize;
  return t.inner == 1 && length % P == 0 && t.line % P == 0 && t.batch % P == 0 &&
         pack_aligned(static_cast<const M*>(t.ptr));
}

// Parts that the lines of a sample are cut in, so that small calls fill the GPU; by the shape alone.
inline int64_t splits_of(int64_t batch, int64_t lines, int64_t length) {
  const int64_t blocks = batch * ((length + kWarp - 1) / kWarp);
  return std::max<int64_t>(1, std::min(kFill / std::max<int64_t>(blocks, 1), lines / kLeastLines));
}

// Numbers of a working memory of parts: of the statistic with most of them.
inline int64_t parts_of(int64_t batch, int64_t lines, int64_t length) {
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

}  // namespace saliency
}  // namespace transfuse
