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

// An input whose coefficient is 0 leaves no trace, whatever it holds; one that another output reads neither.
inline void check_mix_without_trace(DType dtype, int inputs) {
  const int64_t count = 300;
  std::vector<Array> in, out;
  for (int k = 0; k < inputs; ++k) in.emplace_back(dtype, std::vector<int64_t>{1, 1, 1, count});
  for (int j = 0; j < 2; ++j) out.emplace_back(dtype, std::vector<int64_t>{1, 1, 1, count});
  in[1].fill(1.5);  // the others hold NaN
  std::vector<double> coefficients((size_t)(2 * (inputs + 1)), 0.0);
  coefficients[1] = 2.0;
  coefficients[(size_t)inputs + 1] = 1.0;
  transfuse::MixArgs args;
  args.dtype = dtype;
  args.batch = 1;
  args.count = count;
  args.inputs = inputs;
  args.outputs = 2;
  for (int k = 0; k < inputs; ++k) args.in[k] = in[(size_t)k].data();
  for (int j = 0; j < 2; ++j) args.out[j] = out[(size_t)j].data();
  args.coefficients = coefficients.data();
  run_mix_on_cuda(args, false, true);
  bool good = true;
  out[0].each([&](int64_t a, int64_t b, int64_t c, int64_t d) {
    good = good && out[0].get(a, b, c, d) == 3.0 && std::isnan(out[1].get(a, b, c, d));
  });
  check(good, std::string("cuda mix ") + name_of(dtype) + ": an input with coefficient 0 leaves a trace");
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
    for (int i = 0; i < 4; ++i) run(7, 40, 3 + 6 * (i / 2), 1, i);  // more samples than blocks
    for (const int inputs : {2, 7, 9}) check_mix_without_trace(dtype, inputs);
  }
}

}  // namespace selftest
