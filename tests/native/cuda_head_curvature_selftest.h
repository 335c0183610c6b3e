// Self-test of the CUDA kernels of head curvature, emulated: the formulas and differences of head_curvature_selftest.h.
#pragma once

#include <memory>

#include "cuda_emulation/fibers.h"
#include "head_curvature_selftest.h"

namespace selftest {

template <bool kBackward>
inline void run_head_on_cuda(const transfuse::HeadArgs& args, const transfuse::Parallel& parallel) {
  emulation::set_order(parallel.threads > 1 ? emulation::Order::shuffled : emulation::Order::forward);
  const size_t words = (size_t)transfuse::head_cuda_memory(args, kBackward);
  std::unique_ptr<double[]> memory(new double[words]);
  for (size_t i = 0; i < words; ++i) memory[i] = std::numeric_limits<double>::quiet_NaN();
  const char* error = kBackward ? transfuse::head_backward_cuda(args, memory.get(), nullptr)
                                : transfuse::head_forward_cuda(args, memory.get(), nullptr);
  check(error == nullptr, std::string("cuda head: ") + (error == nullptr ? "" : error));
}

// A sample that is not finite makes its own domain NaN, whatever its lanes hold; a class that is certain leaves the
// others their digits.
inline void check_head_specials(const transfuse::HeadKernels& kernels) {
  const int64_t classes = 40, columns = 1;
  const std::vector<int64_t> offsets = {0, 1, 2, 3};
  for (const int64_t bad : {0, 7, 39}) {
    std::vector<float> x = {1.0f, 1.0f, 1.0f}, weight((size_t)classes, 0.0f);
    std::vector<float> p((size_t)(3 * classes)), rest = p, u, out((size_t)(3 * classes), -7.0f);
    weight[3] = 30.0f;
    x[1] = std::numeric_limits<float>::quiet_NaN();
    x[2] = bad == 7 ? std::numeric_limits<float>::infinity() : 0.0f;
    if (bad != 7) weight[(size_t)bad] = -1.0f;
    transfuse::HeadArgs a;
    a.samples = 3, a.columns = columns, a.classes = classes, a.domains = 3, a.offsets = offsets.data();
    a.x = x.data(), a.weight = weight.data(), a.out = out.data(), a.p = p.data(), a.rest = rest.data();
    kernels.forward(a, transfuse::serial_parallel());
    bool nan = true, finite = true, last = true;
    for (int64_t c = 0; c < classes; ++c) {
      nan = nan && std::isnan(out[(size_t)(classes + c)]);
      finite = finite && std::isfinite(out[(size_t)c]);
      const float q = p[(size_t)(2 * classes + c)];
      last = last && (bad == 7 ? std::isnan(q) : q == 1.0f / 40.0f);
    }
    const double others = (bad == 7 ? 39.0 : 38.0 + std::exp(-1.0)) * std::exp(-30.0);
    check(nan && finite, "cuda head: NaN stays in its domain, " + std::to_string(bad));
    check(std::fabs(rest[3] - others) <= 1e-5 * others, "cuda head: 1 - p has lost its digits");
    check(last, "cuda head: an infinite logit among NaN, or equal ones, " + std::to_string(bad));
  }
}

inline void head_curvature_cuda_selftest() {
  const transfuse::HeadKernels kernels{run_head_on_cuda<false>, run_head_on_cuda<true>};
  uint64_t number = 90000;
  // One sample; several domains, one of them with more stretches than one; long ones in stretches everywhere.
  const std::vector<std::vector<int64_t>> divisions = {{0, 1}, {0, 3, 4, 9}, {0, 65, 70}};
  for (const auto kind : {transfuse::HeadKind::gradient, transfuse::HeadKind::diagonal, transfuse::HeadKind::product})
    for (const auto& offsets : divisions)
      for (const int64_t columns : {0, 1, 17, 48, 132}) {
        const std::vector<int64_t> sizes = {1, 2, 5, 9, 41};
        const int64_t classes = sizes[number % sizes.size()];
        const bool bias = ++number % 2 == 0 || columns == 0, shared = number % 3 == 0;
        if (number % 4 < 2)
          check_head<float>(kernels, number, kind, offsets, columns, classes, bias, shared);
        else
          check_head<double>(kernels, number, kind, offsets, columns, classes, bias, shared);
      }
  check_head_specials(kernels);
}

}  // namespace selftest
