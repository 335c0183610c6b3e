// Self-test of the CUDA kernels of mix, emulated: the naive loops of mix_selftest.h.
#pragma once

#include <memory>

#include "cuda_emulation/fibers.h"
#include "mix_selftest.h"

namespace selftest {

inline void run_mix_on_cuda(const transfuse::MixArgs& args, bool again, bool numbers) {
  emulation::set_order(again ? emulation::Order::shuffled : emulation::Order::forward);
  const size_t count = (size_t)transfuse::mix_cuda_partials(args);
  std::unique_ptr<double[]> partials(new double[count]);
  for (size_t i = 0; i < count; ++i) partials[i] = std::numeric_limits<double>::quiet_NaN();
  const char* error = transfuse::mix_cuda(args, numbers, partials.get(), nullptr);
  check(error == nullptr, std::string("cuda mix: ") + (error == nullptr ? "" : error));
}

inline void mix_cuda_selftest() {
  const MixRun table = [](const transfuse::MixArgs& a, bool again) { run_mix_on_cuda(a, again, false); };
  const MixRun numbers = [](const transfuse::MixArgs& a, bool again) { run_mix_on_cuda(a, again, true); };
  uint64_t seed = 0;
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f64}) {
    const auto run = [&](int64_t batch, int64_t count, int inputs, int outputs, int pairs) {
      ++seed;
      check_mix(seed, dtype, batch, count, inputs, outputs, pairs, seed % 2 == 0 ? table : numbers, "cuda ");
    };
    for (const int64_t count : {1, 8, 255, 2049, 4100}) run(1 + count % 2, count, 2, 1, 5);
    // Every number of inputs in registers, then more; outputs for one launch and for several.
    for (int inputs = 1; inputs <= 9; ++inputs) run(2, 77, inputs, inputs % 3, inputs % 4);
    run(2, 300, 3, 9, 6);
    run(2, 128, 5, 10, 3);
    run(1, 70, 48, 5, 2);
    run(3, 64, 2, 0, 9);
  }
}

}  // namespace selftest
