// Self-test of kernel_sums: sums and gradients over all pairs, one at a time in double, against the kernels.
#pragma once

#include <algorithm>

#include "check.h"
#include "transfuse/kernel_sums.h"

namespace selftest {

struct KernelSumsCase {
  transfuse::KernelSumsArgs args;
  std::vector<Array> points;
  std::vector<double> bandwidths, weights, grads;

  double distance(int s, int64_t i, int64_t j) const {
    const Array &x = points[(size_t)args.row_points[s]], &y = points[(size_t)args.column_points[s]];
    double sum = 0.0;
    for (int64_t d = 0; d < args.point[args.row_points[s]].width; ++d)
      sum += (x.get(0, i, d) - y.get(0, j, d)) * (x.get(0, i, d) - y.get(0, j, d));
    return sum;
  }
  double kernel(int f, int64_t i, int64_t j) const {
    if (args.exclude && i == j) return 0.0;
    const double d = distance(args.distance_of[f], i, j) / (bandwidths[(size_t)f] * bandwidths[(size_t)f]);
    return args.inverse ? 1.0 / (1.0 + d) : std::exp(-0.5 * d);
  }
  double product(int p, int64_t i, int64_t j, int without = -1) const {
    double k = 1.0;
    for (int f = 0; f < args.kernels; ++f)
      if ((args.mask[p] >> f & 1) && f != without) k *= kernel(f, i, j);
    return k;
  }
};

inline void check_kernel_sums(uint64_t number) {
  Random r(number);
  KernelSumsCase c;
  transfuse::KernelSumsArgs& a = c.args;
  const DType dtype = r.pick(std::vector<DType>{DType::f32, DType::f64, DType::bf16, DType::f16});
  const std::vector<int64_t> sizes{1, 2, 5, 47, 49, 97, 193};
  a.dtype = dtype;
  a.groups = 1;
  a.inverse = r.chance(30);
  const bool symmetric = r.chance(50);
  a.rows = r.pick(sizes);
  a.columns = symmetric || r.chance(30) ? a.rows : r.pick(sizes);
  a.exclude = a.rows == a.columns && r.chance(30);
  a.distances = 1 + (int)r.below(2);
  for (int s = 0; s < a.distances; ++s) {
    const int64_t width = 1 + r.below(9);
    const Layout layout = r.pick(std::vector<Layout>{Layout::heads_first, Layout::spread, Layout::channels_strided});
    for (int side = 0; side < (symmetric ? 1 : 2); ++side) {
      const int64_t count = side == 0 ? a.rows : a.columns;
      Array x(dtype, {1, count, width}, layout);
      x.randomize(r, 2.0);
      c.points.push_back(x);
      a.point[a.points].count = count;
      a.point[a.points].width = width;
      (side == 0 ? a.row_points : a.column_points)[s] = a.points++;
    }
    if (symmetric) a.column_points[s] = a.row_points[s];
  }
  for (int p = 0; p < a.points; ++p) {
    a.point[p].data = c.points[(size_t)p].data();
    for (int d = 0; d < 3; ++d) a.point[p].stride[d] = c.points[(size_t)p].stride(d);
  }
  a.kernels = a.distances + (int)r.below(2);
  for (int f = 0; f < a.kernels; ++f) {
    a.distance_of[f] = f % a.distances;
    c.bandwidths.push_back(0.8 + (double)r.below(20) / 10.0);
  }
  a.products = 1 + (int)r.below(3);
  for (int p = 0; p < a.products; ++p) a.mask[p] = 1 + (uint32_t)r.below((1 << a.kernels) - 1);
  if (r.chance(50))
    for (int64_t j = 0; j < a.columns; ++j) c.weights.push_back(r.uniform());
  a.bandwidths = c.bandwidths.data();
  a.weights = c.weights.empty() ? nullptr : c.weights.data();
  const auto weight = [&](int64_t j) { return c.weights.empty() ? 1.0 : c.weights[(size_t)j]; };

  const std::string name = std::string("kernel_sums ") + name_of(dtype) + ", case " + std::to_string(number);
  const double unit = epsilon(statistics_of(dtype));
  Array sums(DType::f64, {1, 1, a.products, a.rows}), sums3 = sums, want = sums;
  a.sums = static_cast<double*>(sums.data());
  transfuse::kernel_sums_kernels().forward(a, transfuse::serial_parallel());
  a.sums = static_cast<double*>(sums3.data());
  transfuse::kernel_sums_kernels().forward(a, transfuse::std_thread_parallel(3));
  for (int p = 0; p < a.products; ++p)
    for (int64_t i = 0; i < a.rows; ++i) {
      double sum = 0.0;
      for (int64_t j = 0; j < a.columns; ++j) sum += weight(j) * c.product(p, i, j);
      want.set(0, 0, p, i, sum);
      c.grads.push_back(r.uniform());
    }
  check_close(sums, want, 64.0, unit, name);
  check(sums3.same_bytes(sums), name + ": 3 threads give other bits");

  a.grads = c.grads.data();
  std::vector<Array> found, found3, wanted;
  for (int p = 0; p < a.points; ++p) {
    found.emplace_back(statistics_of(dtype), std::vector<int64_t>{1, 1, a.point[p].count, a.point[p].width});
    wanted.emplace_back(DType::f64, std::vector<int64_t>{1, 1, a.point[p].count, a.point[p].width});
    wanted.back().fill(0.0);
  }
  found3 = found;
  Array slopes(DType::f64, {1, 1, 1, a.kernels}), slopes3 = slopes, want_slopes = slopes;
  want_slopes.fill(0.0);
  for (int threads : {1, 3}) {
    std::vector<Array>& to = threads == 1 ? found : found3;
    for (int p = 0; p < a.points; ++p) a.point_grads[p] = to[(size_t)p].data();
    a.bandwidth_grads = static_cast<double*>((threads == 1 ? slopes : slopes3).data());
    transfuse::kernel_sums_kernels().backward(
        a, threads == 1 ? transfuse::serial_parallel() : transfuse::std_thread_parallel(3));
  }
  for (int p = 0; p < a.products; ++p)
    for (int f = 0; f < a.kernels; ++f) {
      if (!(a.mask[p] >> f & 1)) continue;
      const int s = a.distance_of[f], x = a.row_points[s], y = a.column_points[s];
      for (int64_t i = 0; i < a.rows; ++i)
        for (int64_t j = 0; j < a.columns; ++j) {
          const double h = c.bandwidths[(size_t)f], k = c.kernel(f, i, j);
          const double slope = a.inverse ? -k * k / (h * h) : -0.5 * k / (h * h);
          const double e = c.grads[(size_t)(p * a.rows + i)] * weight(j) * c.product(p, i, j, f) * slope;
          want_slopes.add(0, 0, 0, f, -2.0 * e * c.distance(s, i, j) / h);
          for (int64_t d = 0; d < a.point[x].width; ++d) {
            const double step = 2.0 * e * (c.points[(size_t)x].get(0, i, d) - c.points[(size_t)y].get(0, j, d));
            wanted[(size_t)x].add(0, 0, i, d, step);
            wanted[(size_t)y].add(0, 0, j, d, -step);
          }
        }
    }
  check_close(slopes, want_slopes, 256.0, unit, name + ", bandwidths");
  check(slopes3.same_bytes(slopes), name + ", bandwidths: 3 threads give other bits");
  for (int p = 0; p < a.points; ++p) {
    check_close(found[(size_t)p], wanted[(size_t)p], 256.0, unit, name + ", gradient");
    check(found3[(size_t)p].same_bytes(found[(size_t)p]), name + ", gradient: 3 threads give other bits");
  }
}

inline void kernel_sums_selftest(int cases) {
  for (int i = 0; i < 2 * cases; ++i) check_kernel_sums(90000 + (uint64_t)i);
}

}  // namespace selftest
