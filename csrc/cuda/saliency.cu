// Gradient-weighted and NormGrad maps on CUDA (see saliency.h).
//
// As on the CPU, every map is made of two reductions over lines of contiguous numbers: *across* lines, into as many
// sums as a line is long (the lanes of a thread block side by side on a line, its warps and further thread blocks on
// different lines), and *along* a line, into one sum for each (a warp for each line). Lines are channels where
// locations are contiguous, and locations where channels are. Few locations in all are spread over more thread blocks,
// whose sums another kernel merges in order; there are no atomics.
#include "transfuse/saliency.h"

#include <algorithm>

#include "saliency_neighbourhoods.h"
#include "saliency_pooling.h"

namespace transfuse {
namespace {

using namespace saliency;

int64_t volume(const int64_t* grid) { return grid[0] * grid[1] * grid[2]; }

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
