// Self-test of the CUDA kernels of saliency maps, emulated: the loops of saliency_selftest.h over random calls.
#pragma once

#include <memory>

#include "cuda_emulation/fibers.h"
#include "saliency_selftest.h"

namespace selftest {

template <class Args, int64_t (*kMemory)(const Args&), const char* (*kStart)(const Args&, void*, void*)>
inline void run_saliency_on_cuda(const Args& args, const transfuse::Parallel& parallel) {
  emulation::set_order(parallel.threads > 1 ? emulation::Order::shuffled : emulation::Order::forward);
  const size_t numbers = (size_t)kMemory(args);
  const size_t bytes = numbers * (size_t)transfuse::item_size(statistics_of(args.dtype));
  std::unique_ptr<char[]> memory(new char[bytes]);
  std::memset(memory.get(), 0xff, bytes);  // NaN
  const char* error = kStart(args, memory.get(), nullptr);
  check(error == nullptr, std::string("cuda saliency: ") + (error == nullptr ? "" : error));
}

// NaN stays at its location, and in the largest entry too.
inline void check_saliency_nan(const transfuse::SaliencyKernels& kernels, transfuse::Phase1 phase1) {
  for (const bool last : {false, true})
    for (const auto phase2 : {transfuse::Phase2::filter_norm, transfuse::Phase2::max}) {
      Random r(11);
      transfuse::NormGradArgs args;
      args.phase1 = phase1, args.phase2 = phase2, args.batch = 1, args.act_channels = args.grad_channels = 70;
      args.grid[2] = args.out_grid[2] = 5;
      Array act = saliency_array(r, DType::f32, 1, 70, 5, last, &args.act);
      Array grad = saliency_array(r, DType::f32, 1, 70, 5, last, &args.grad), out(DType::f32, {1, 1, 1, 5});
      grad.set(0, last ? 0 : 41, last ? 2 : 0, last ? 41 : 2, std::numeric_limits<double>::quiet_NaN());
      args.out = out.data();
      kernels.normgrad(args, transfuse::serial_parallel());
      bool good = true;
      for (int64_t l = 0; l < 5; ++l) good = good && std::isnan(out.get(0, 0, 0, l)) == (l == 2);
      check(good, "cuda saliency: NaN, phase 1 " + std::to_string((int)phase1));
    }
}

// The mean of many equal numbers is that number, to single precision: rounding errors do not pile up.
inline void check_saliency_mean(const transfuse::SaliencyKernels& kernels) {
  constexpr int64_t kLocations = 512 * 512, kChannels = 3;
  for (const bool last : {false, true}) {
    Random r(13);
    transfuse::GradMapArgs args;
    args.batch = 1, args.channels = kChannels, args.locations = kLocations;
    Array act = saliency_array(r, DType::f32, 1, kChannels, kLocations, last, &args.act);
    Array grad = saliency_array(r, DType::f32, 1, kChannels, kLocations, last, &args.grad);
    act.fill(1.0), grad.fill((double)0.1f);
    Array out(DType::f32, {1, 1, 1, kLocations});
    args.out = out.data();
    kernels.grad_map(args, transfuse::serial_parallel());
    const double want = kChannels * (double)0.1f, error = std::fabs(out.get(0, 0, 0, 7) - want) / want;
    check(error < 1e-6, "cuda saliency: mean of equal numbers, error " + std::to_string(error));
  }
}

inline void saliency_cuda_selftest() {
  using namespace transfuse;
  const SaliencyKernels kernels{run_saliency_on_cuda<GradMapArgs, grad_map_cuda_memory, grad_map_cuda>,
                                run_saliency_on_cuda<NormGradArgs, normgrad_cuda_memory, normgrad_cuda>};
  for (uint64_t i = 0; i < 60; ++i) {
    check_normgrad(kernels, 81000 + i);
    check_grad_map(kernels, 91000 + i);
  }
  for (const auto phase1 : {Phase1::scaling, Phase1::bias, Phase1::conv, Phase1::depthwise})
    check_saliency_nan(kernels, phase1);
  check_saliency_mean(kernels);
}

}  // namespace selftest
