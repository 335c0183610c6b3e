// Self-test of the saliency kernels: loops over entries of the outer products, in double, against the kernels.
#pragma once

#include <algorithm>

#include "check.h"
#include "transfuse/saliency.h"

namespace selftest {

inline transfuse::SaliencyTensor saliency_view(const Array& x) {
  // Locations are rows of the last axis: they merge, since nothing lies between rows.
  return {x.data(), x.stride(0), x.stride(1), x.stride(3)};
}

// (batch, channels, 1, locations), contiguous or with channels innermost.
inline Array saliency_array(Random& r, DType dtype, int64_t batch, int64_t channels, int64_t locations, bool last,
                            transfuse::SaliencyTensor* view) {
  Array x = last ? Array(dtype, {batch, 1, locations, channels}) : Array(dtype, {batch, channels, 1, locations});
  x.randomize(r);
  *view = last ? transfuse::SaliencyTensor{x.data(), x.stride(0), x.stride(3), x.stride(2)} : saliency_view(x);
  return x;
}

inline double saliency_get(const Array& x, bool last, int64_t b, int64_t c, int64_t l) {
  return last ? x.get(b, 0, l, c) : x.get(b, c, 0, l);
}

// Kernels of other devices than the CPU run in another order where another number of threads is asked for.
inline void check_normgrad(const transfuse::SaliencyKernels& kernels, uint64_t number) {
  using transfuse::Phase1;
  using transfuse::Phase2;
  Random r(number);
  const DType dtype = r.pick(std::vector<DType>{DType::f32, DType::f64, DType::bf16, DType::f16});
  transfuse::NormGradArgs args;
  args.dtype = dtype;
  args.phase1 = (Phase1)r.below(4);
  args.phase2 = (Phase2)r.below(4);
  args.batch = 1 + r.below(3);
  args.act_channels = args.grad_channels = 1 + r.below(r.chance(20) ? 140 : 9);
  const bool conv = args.phase1 == Phase1::conv, deep = r.chance(30);
  if (conv) args.grad_channels = 1 + r.below(5);
  for (int d = deep ? 0 : 1; d < 3; ++d) {
    args.grid[d] = 1 + r.below(d == 2 ? 21 : 6);
    if (args.phase1 == Phase1::depthwise) {
      args.padding[d] = r.below(2);
      args.kernel[d] = 1 + 2 * args.padding[d];
    }
    if (!conv) continue;
    args.kernel[d] = 1 + r.below(3);
    args.step[d] = 1 + r.below(3);
    args.padding[d] = r.below(2);
    args.dilation[d] = 1 + r.below(2);
    args.grid[d] = std::max(args.grid[d], args.dilation[d] * (args.kernel[d] - 1) + 1);
  }
  int64_t in = 1, out = 1;
  for (int d = 0; d < 3; ++d) {
    args.out_grid[d] =
        (args.grid[d] + 2 * args.padding[d] - args.dilation[d] * (args.kernel[d] - 1) - 1) / args.step[d] + 1;
    in *= args.grid[d];
    out *= args.out_grid[d];
  }
  const bool last[2] = {r.chance(40), r.chance(40)};
  const Array act = saliency_array(r, dtype, args.batch, args.act_channels, in, last[0], &args.act);
  const Array grad = saliency_array(r, dtype, args.batch, args.grad_channels, out, last[1], &args.grad);
  const DType kind = statistics_of(dtype);
  Array got(kind, {args.batch, 1, 1, out}), got3 = got, want(DType::f64, {args.batch, 1, 1, out});
  args.out = got.data();
  kernels.normgrad(args, transfuse::serial_parallel());
  args.out = got3.data();
  kernels.normgrad(args, transfuse::std_thread_parallel(3));

  for (int64_t b = 0; b < args.batch; ++b)
    for (int64_t l = 0; l < out; ++l) {
      double squares = 0.0, sum = 0.0, top = -std::numeric_limits<double>::infinity();
      const auto entry = [&](double x) {
        squares += args.phase2 == Phase2::filter_norm && x < 0 ? 0.0 : x * x;
        sum += x;
        top = std::max(top, x);
      };
      const auto a_at = [&](int64_t c, int64_t place) { return saliency_get(act, last[0], b, c, place); };
      for (int64_t c = 0; c < args.grad_channels; ++c) {
        const double g = saliency_get(grad, last[1], b, c, l);
        if (args.phase1 == Phase1::bias) entry(g);
        if (args.phase1 == Phase1::scaling) entry(g * a_at(c, l));
        if (args.phase1 == Phase1::bias || args.phase1 == Phase1::scaling) continue;
        for (int64_t tap = 0; tap < args.kernel[0] * args.kernel[1] * args.kernel[2]; ++tap) {
          const int64_t of_tap[3] = {tap / (args.kernel[1] * args.kernel[2]), tap / args.kernel[2] % args.kernel[1],
                                     tap % args.kernel[2]};
          const int64_t of_out[3] = {l / (args.out_grid[1] * args.out_grid[2]), l / args.out_grid[2] % args.out_grid[1],
                                     l % args.out_grid[2]};
          int64_t place = 0;
          bool inside = true;
          for (int d = 0; d < 3; ++d) {
            const int64_t at = of_out[d] * args.step[d] - args.padding[d] + of_tap[d] * args.dilation[d];
            inside = inside && at >= 0 && at < args.grid[d];
            place = place * args.grid[d] + at;
          }
          if (args.phase1 == Phase1::depthwise) {
            entry(inside ? g * a_at(c, place) : 0.0);
          } else {
            for (int64_t k = 0; k < args.act_channels; ++k) entry(inside ? g * a_at(k, place) : 0.0);
          }
        }
      }
      want.set(b, 0, 0, l, args.phase2 == Phase2::max ? top : args.phase2 == Phase2::sum ? sum : std::sqrt(squares));
    }
  const std::string name = std::string("normgrad ") + name_of(dtype) + ", case " + std::to_string(number);
  // Sums of both signs are smaller than their terms.
  check_close(got, want, 64.0, epsilon(kind), name);
  check(got3.same_bytes(got), name + ": 3 threads give other bits");
}

inline void check_grad_map(const transfuse::SaliencyKernels& kernels, uint64_t number) {
  using transfuse::MapMethod;
  Random r(number);
  const DType dtype = r.pick(std::vector<DType>{DType::f32, DType::f64, DType::bf16, DType::f16});
  transfuse::GradMapArgs args;
  args.dtype = dtype;
  args.method = (MapMethod)r.below(6);
  args.batch = 1 + r.below(8);
  args.channels = 1 + r.below(r.chance(30) ? 300 : 9);
  args.locations = 1 + r.below(r.chance(10) ? 2500 : 40);
  const bool last[2] = {r.chance(40), r.chance(40)};
  Array act = saliency_array(r, dtype, args.batch, args.channels, args.locations, last[0], &args.act);
  // Positive, so that weights divided by sums of activations are as well conditioned as after a ReLU.
  act.each(
      [&](int64_t a, int64_t b, int64_t c, int64_t d) { act.set(a, b, c, d, 0.1 + std::fabs(act.get(a, b, c, d))); });
  const Array grad = saliency_array(r, dtype, args.batch, args.channels, args.locations, last[1], &args.grad);
  const DType kind = statistics_of(dtype);
  Array got(kind, {args.batch, 1, 1, args.locations}), got3 = got, want(DType::f64, {args.batch, 1, 1, args.locations});
  args.out = got.data();
  kernels.grad_map(args, transfuse::serial_parallel());
  args.out = got3.data();
  kernels.grad_map(args, transfuse::std_thread_parallel(3));

  want.fill(0.0);
  for (int64_t b = 0; b < args.batch; ++b)
    for (int64_t c = 0; c < args.channels; ++c) {
      const auto a_at = [&](int64_t l) { return saliency_get(act, last[0], b, c, l); };
      const auto g_at = [&](int64_t l) { return saliency_get(grad, last[1], b, c, l); };
      double sum_a = 0.0, sum_g = 0.0, sum_ag = 0.0, plus = 0.0;
      for (int64_t l = 0; l < args.locations; ++l) {
        sum_a += a_at(l);
        sum_g += g_at(l);
        sum_ag += a_at(l) * g_at(l);
      }
      for (int64_t l = 0; l < args.locations; ++l) {
        const double g = g_at(l);
        if (g > 0) plus += g * g * g / (2 * g * g + sum_a * g * g * g + 1e-6);
      }
      for (int64_t l = 0; l < args.locations; ++l) {
        const double a = a_at(l), g = g_at(l);
        double term = 0.0;
        switch (args.method) {
          case MapMethod::gradcam: term = sum_g / (double)args.locations * a; break;
          case MapMethod::gradcam_pp: term = plus * a; break;
          case MapMethod::xgradcam: term = sum_ag / (sum_a + 1e-7) * a; break;
          case MapMethod::layercam: term = std::max(g, 0.0) * a; break;
          case MapMethod::hirescam: term = g * a; break;
          case MapMethod::elementwise: term = std::max(g * a, 0.0); break;
        }
        want.add(b, 0, 0, l, term);
      }
    }
  const std::string name = std::string("grad map ") + name_of(dtype) + ", case " + std::to_string(number);
  check_close(got, want, 64.0, epsilon(kind), name);
  check(got3.same_bytes(got), name + ": 3 threads give other bits");
}

inline void saliency_selftest(int cases) {
  for (int i = 0; i < 3 * cases; ++i) {
    check_normgrad(transfuse::saliency_kernels(), 80000 + (uint64_t)i);
    check_grad_map(transfuse::saliency_kernels(), 90000 + (uint64_t)i);
  }
}

}  // namespace selftest
