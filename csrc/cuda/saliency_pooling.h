// Weights of channels on CUDA: gradients pooled over the locations.
#pragma once

#include "saliency_reductions.h"

namespace transfuse {
namespace saliency {

constexpr double kPooledEps = 1e-7, kPlusEps = 1e-6;

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

}  // namespace saliency
}  // namespace transfuse
