// adain on CUDA (see adain.h for the algebra, adain_layout.h for the geometry). Free of torch, so that nvcc, which
// reads every header once per architecture, has little to read; adain.cpp beside it registers the ops.
//
// One block takes one content plane, or 32 neighbouring ones where they lie side by side (channels_last): moments of
// the style plane, moments of the content plane, factors, result. A plane is read from memory once; its second and
// third reading (centred products, writing) come from the caches. Contiguous planes are read and written 16 bytes at a
// time. Sums are trees of fixed shape over the threads of a block, without atomics, so the same bits come out every
// time.
#include "device.h"
#include "transfuse/adain_layout.h"

namespace transfuse {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 2;      // per multiprocessor at least: registers enough that nothing spills
constexpr int kTile = 32;       // neighbouring planes per block
constexpr int kMinColumns = 8;  // fewer are taken one by one

// The planes of one block: column `column` of the slab, rows shared out over `lanes` threads each.
struct Place {
  int tile, lanes, column, lane;
  bool live;  // this thread's column exists
};

__device__ inline Place place_of(const AdainLayout& g, const AdainSlab& s) {
  Place p;
  p.tile = g.columns > 1 ? kTile : 1;
  p.lanes = kThreads / p.tile;
  p.column = (int)threadIdx.x % p.tile;
  p.lane = (int)threadIdx.x / p.tile;
  p.live = p.column < s.width;
  return p;
}

// Sum over the lanes of a column, in every thread of it. `memory` holds kThreads numbers.
__device__ inline double lane_sum(double x, const Place& p, double* memory) {
  __syncthreads();
  memory[threadIdx.x] = x;
  for (int step = p.lanes / 2; step > 0; step /= 2) {
    __syncthreads();
    if (p.lane < step) memory[threadIdx.x] += memory[threadIdx.x + step * p.tile];
  }
  __syncthreads();
  return memory[p.column];
}

template <class M>
__device__ inline bool packed(const AdainOperand& o, int64_t base, int64_t rows) {
  constexpr int kSize = Pack<M>::kSize;
  return o.axis_count == 1 && o.axes[0].stride == 1 && rows % kSize == 0 &&
         (reinterpret_cast<uintptr_t>(o.ptr) + (uintptr_t)base * sizeof(M)) % kPackBytes == 0;
}

// Calls body(values, r, count) for the elements of this thread: `values[k][i]` is element r + i of input k.
template <class M, int N, class F>
__device__ inline void for_elements(const AdainLayout& g, const AdainSlab& s, const Place& p, bool packs,
                                    const F& body) {
  using A = typename Arithmetic<M>::A;
  constexpr int kSize = Pack<M>::kSize;
  A values[N][kSize];
  if (packs) {
    for (int64_t r = (int64_t)p.lane * kSize; r < g.rows; r += (int64_t)p.lanes * kSize) {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const Pack<M> pack = *reinterpret_cast<const Pack<M>*>(reinterpret_cast<const M*>(g.in[k].ptr) + s.in[k] + r);
#pragma unroll
        for (int i = 0; i < kSize; ++i) values[k][i] = widen(pack.v[i]);
      }
      body(values, r, kSize);
    }
    return;
  }
  if (!p.live) return;
  for (int64_t r = p.lane; r < g.rows; r += p.lanes) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      int64_t run;
      const int64_t at = s.in[k] + p.column * g.in[k].column_stride + adain_row(g.in[k], r, &run);
      values[k][0] = widen(reinterpret_cast<const M*>(g.in[k].ptr)[at]);
    }
    body(values, r, 1);
  }
}

// Moments of this thread's column, the same in all its threads. Two passes: means about the first element, then
// products about the means, corrected for the rounding of the latter.
template <class M, int N>
__device__ AdainMoments block_moments(const AdainLayout& g, const AdainSlab& s, const Place& p, double* memory) {
  using A = typename Arithmetic<M>::A;
  constexpr int P = N == 1 ? 1 : N == 2 ? 2 : 4;
  bool packs = p.tile == 1;
  for (int k = 0; k < N; ++k) packs = packs && packed<M>(g.in[k], s.in[k], g.rows);
  A centre[N], sum[N] = {}, second[P] = {};
  for (int k = 0; k < N; ++k)
    centre[k] =
        p.live ? widen(reinterpret_cast<const M*>(g.in[k].ptr)[s.in[k] + p.column * g.in[k].column_stride]) : A(0);
  for_elements<M, N>(g, s, p, packs, [&](const auto& values, int64_t, int count) {
#pragma unroll
    for (int i = 0; i < Pack<M>::kSize; ++i)
      if (i < count)
        for (int k = 0; k < N; ++k) sum[k] += values[k][i] - centre[k];
  });
  AdainMoments m;
  m.count = (double)g.rows;
  for (int k = 0; k < N; ++k) {
    centre[k] += (A)(lane_sum((double)sum[k], p, memory) / m.count);
    sum[k] = A(0);
  }
  for_elements<M, N>(g, s, p, packs, [&](const auto& values, int64_t, int count) {
#pragma unroll
    for (int i = 0; i < Pack<M>::kSize; ++i) {
      if (i >= count) break;
      A d[N];
      for (int k = 0; k < N; ++k) {
        d[k] = values[k][i] - centre[k];
        sum[k] += d[k];
      }
      second[0] += d[0] * d[0];
      if constexpr (N > 1) second[1] += d[0] * d[1];
      if constexpr (N > 2) {
        second[2] += d[0] * d[2];
        second[3] += d[1] * d[2];
      }
    }
  });
  double rest[N];
  for (int k = 0; k < N; ++k) {
    rest[k] = lane_sum((double)sum[k], p, memory);
    m.mean[k] = (double)centre[k] + rest[k] / m.count;
  }
  for (int q = 0; q < P; ++q) m.second[q] = lane_sum((double)second[q], p, memory);
  m.second[0] -= rest[0] * rest[0] / m.count;
  if (m.second[0] < 0.0) m.second[0] = 0.0;
  if constexpr (N > 1) m.second[1] -= rest[0] * rest[1] / m.count;
  if constexpr (N > 2) {
    m.second[2] -= rest[0] * rest[2] / m.count;
    m.second[3] -= rest[1] * rest[2] / m.count;
  }
  return m;
}

template <class M, int N>
__device__ void block_write(const AdainLayout& g, const AdainSlab& s, const Place& p, const AdainCoefficients& c,
                            const AdainMoments& m) {
  using A = typename Arithmetic<M>::A;
  A factor[N], centre[N];
  double exact = c.offset;
  bool packs = p.tile == 1 && packed<M>(g.out, s.out, g.rows);
  for (int k = 0; k < N; ++k) {
    factor[k] = (A)c.factor[k];
    centre[k] = (A)m.mean[k];
    exact -= c.factor[k] * (m.mean[k] - (double)centre[k]);
    packs = packs && packed<M>(g.in[k], s.in[k], g.rows);
  }
  const A offset = (A)exact;
  M* const out = reinterpret_cast<M*>(g.out.ptr);
  for_elements<M, N>(g, s, p, packs, [&](const auto& values, int64_t r, int count) {
    Pack<M> pack;
#pragma unroll
    for (int i = 0; i < Pack<M>::kSize; ++i) {
      if (i >= count) break;
      A v = offset;
      for (int k = 0; k < N; ++k) v += factor[k] * (values[k][i] - centre[k]);
      narrow(v, &pack.v[i]);
    }
    if (packs) {
      *reinterpret_cast<Pack<M>*>(out + s.out + r) = pack;
    } else {
      int64_t run;
      out[s.out + p.column * g.out.column_stride + adain_row(g.out, r, &run)] = pack.v[0];
    }
  });
}

struct Launch {
  AdainLayout layout;
  AdainDirection direction;
  double eps;
  AdainShare* shares;  // one per content plane, or nullptr
};

// Moments of all style planes, by index.
template <class M, int N>
__global__ void __launch_bounds__(kThreads, kBlocks) moments_kernel(const AdainLayout g, AdainMoments* out) {
  __shared__ double memory[kThreads];
  for (int64_t i = blockIdx.x; i < g.slabs; i += gridDim.x) {
    const AdainSlab s = adain_slab(g, i);
    const Place p = place_of(g, s);
    const AdainMoments m = block_moments<M, N>(g, s, p, memory);
    if (p.live && p.lane == 0) out[s.index + p.column * g.column_index_step] = m;
  }
}

template <class M, int N>
__global__ void __launch_bounds__(kThreads, kBlocks) content_kernel(const Launch launch, const AdainMoments* style) {
  __shared__ double memory[kThreads];
  __shared__ AdainCoefficients rules[kTile];
  const AdainLayout& g = launch.layout;
  for (int64_t i = blockIdx.x; i < g.slabs; i += gridDim.x) {
    const AdainSlab s = adain_slab(g, i);
    const Place p = place_of(g, s);
    const AdainMoments m = block_moments<M, N>(g, s, p, memory);
    if (p.live && p.lane == 0) {
      AdainCoefficients c;
      AdainShare share;
      adain_content_rule(launch.direction, launch.eps, m, style[s.style + p.column * g.column_style_step], &c, &share);
      if (launch.shares != nullptr) launch.shares[s.index + p.column * g.column_index_step] = share;
      rules[p.column] = c;
    }
    __syncthreads();
    if (g.out.ptr != nullptr) block_write<M, N>(g, s, p, rules[p.column], m);
    __syncthreads();
  }
}

// Where the content planes of one style plane are: axes of the content along which the style has extent 1.
struct Repeats {
  int count = 0;
  int64_t size[kAdainMaxRank], step[kAdainMaxRank];  // in the index of content planes
  int axes = 0;
  int64_t style_size[kAdainMaxRank], style_step[kAdainMaxRank], content_step[kAdainMaxRank];
};

template <class M, int N>
__global__ void __launch_bounds__(kThreads, kBlocks)
    style_kernel(const Launch launch, const AdainMoments* moments, const Repeats repeats) {
  const AdainLayout& g = launch.layout;
  __shared__ AdainCoefficients rules[kTile];
  for (int64_t i = blockIdx.x; i < g.slabs; i += gridDim.x) {
    const AdainSlab s = adain_slab(g, i);
    const Place p = place_of(g, s);
    const int64_t index = p.live ? s.index + p.column * g.column_index_step : 0;
    if (p.live && p.lane == 0) {
      int64_t first = 0, total = 1;
      for (int a = 0; a < repeats.axes; ++a)
        first += index / repeats.style_step[a] % repeats.style_size[a] * repeats.content_step[a];
      for (int a = 0; a < repeats.count; ++a) total *= repeats.size[a];
      AdainShare sum;
      for (int64_t n = 0; n < total; ++n) {  // in order
        int64_t at = first, rest = n;
        for (int a = 0; a < repeats.count; ++a) {
          at += rest % repeats.size[a] * repeats.step[a];
          rest /= repeats.size[a];
        }
        sum.mean += launch.shares[at].mean;
        sum.std += launch.shares[at].std;
        sum.std_tangent += launch.shares[at].std_tangent;
      }
      AdainCoefficients c;
      adain_style_rule(launch.direction, moments[index], sum, &c);
      rules[p.column] = c;
    }
    __syncthreads();
    block_write<M, N>(g, s, p, rules[p.column], moments[index]);
    __syncthreads();
  }
}

Repeats find_repeats(const AdainArgs& args) {
  Repeats r;
  int64_t content_step = 1, style_step = 1;
  for (int d = args.rank - 1; d >= 0; --d) {
    if (args.reduced[d]) continue;
    if (args.style_size[d] == 1 && args.content_size[d] != 1) {
      r.size[r.count] = args.content_size[d];
      r.step[r.count++] = content_step;
    } else if (args.style_size[d] != 1) {
      r.style_size[r.axes] = args.style_size[d];
      r.style_step[r.axes] = style_step;
      r.content_step[r.axes++] = content_step;
    }
    content_step *= args.content_size[d];
    style_step *= args.style_size[d];
  }
  return r;
}

template <class M, int NX, int NY>
cudaError_t launch_typed(AdainDirection direction, const AdainArgs& args, AdainMoments* moments, AdainShare* shares,
                         cudaStream_t stream) {
  const AdainLayout content = adain_layout(args, true, direction, kMinColumns, kTile);
  const AdainLayout style = adain_layout(args, false, direction, kMinColumns, kTile);
  cudaError_t error = launch(moments_kernel<M, NY>, style.slabs, kThreads, stream, style, moments);
  if (error == cudaSuccess)
    error = launch(content_kernel<M, NX>, content.slabs, kThreads, stream, Launch{content, direction, args.eps, shares},
                   moments);
  if (error == cudaSuccess && shares != nullptr)
    error = launch(style_kernel<M, NY>, style.slabs, kThreads, stream, Launch{style, direction, args.eps, shares},
                   moments, find_repeats(args));
  return error;
}

template <class M>
cudaError_t launch_direction(AdainDirection direction, const AdainArgs& args, AdainMoments* moments, AdainShare* shares,
                             cudaStream_t stream) {
  switch (direction) {
    case AdainDirection::forward: return launch_typed<M, 1, 1>(direction, args, moments, shares, stream);
    case AdainDirection::backward: return launch_typed<M, 2, 1>(direction, args, moments, shares, stream);
    case AdainDirection::jvp: return launch_typed<M, 2, 2>(direction, args, moments, shares, stream);
    case AdainDirection::jvp_backward: return launch_typed<M, 3, 2>(direction, args, moments, shares, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

const char* adain_cuda(AdainDirection direction, const AdainArgs& args, void* moments, void* shares, void* stream) {
  auto* m = static_cast<AdainMoments*>(moments);
  auto* s = static_cast<AdainShare*>(shares);
  const auto on = static_cast<cudaStream_t>(stream);
  return message_of(with_storage(
      args.dtype, [&](auto number) { return launch_direction<decltype(number)>(direction, args, m, s, on); }));
}

}  // namespace transfuse
