// Self-test of the head curvature kernels: the formulas written naively in double, and central differences for the
// backward.
#pragma once

#include "check.h"
#include "transfuse/head_curvature.h"

namespace selftest {

// One call in double, and naive results for it.
struct HeadProblem {
  transfuse::HeadKind kind;
  int64_t samples, columns, classes, width;
  std::vector<int64_t> offsets;
  bool bias, shared;
  std::vector<double> x, weight, offset, targets, vectors;

  double input(int64_t n, int64_t k) const { return k == columns ? 1.0 : x[(size_t)(n * columns + k)]; }

  // J u, p (1 - p) or p - y of a sample.
  std::vector<double> factor(int64_t n, int64_t domain) const {
    std::vector<double> p((size_t)classes), u((size_t)classes), left((size_t)classes);
    double largest = -1e300, total = 0.0, mean = 0.0;
    for (int64_t c = 0; c < classes; ++c) {
      double z = bias ? offset[(size_t)c] : 0.0;
      for (int64_t k = 0; k < columns; ++k) z += weight[(size_t)(c * columns + k)] * input(n, k);
      p[(size_t)c] = z;
      largest = std::max(largest, z);
      if (kind == transfuse::HeadKind::product)
        for (int64_t k = 0; k < width; ++k)
          u[(size_t)c] += vectors[(size_t)(((shared ? 0 : domain) * classes + c) * width + k)] * input(n, k);
    }
    for (double& z : p) total += z = std::exp(z - largest);
    for (double& z : p) z = classes == 1 ? 1.0 / (1.0 + std::exp(-largest)) : z / total;
    for (int64_t c = 0; c < classes; ++c) mean += p[(size_t)c] * u[(size_t)c];
    for (size_t c = 0; c < (size_t)classes; ++c) {
      if (kind == transfuse::HeadKind::diagonal) left[c] = p[c] * (1.0 - p[c]);
      if (kind == transfuse::HeadKind::gradient) left[c] = p[c] - targets[(size_t)n * (size_t)classes + c];
      if (kind == transfuse::HeadKind::product) left[c] = p[c] * (u[c] - mean);
    }
    return left;
  }

  std::vector<double> result() const {
    std::vector<double> out((offsets.size() - 1) * (size_t)(classes * width), 0.0);
    for (size_t e = 0; e + 1 < offsets.size(); ++e)
      for (int64_t n = offsets[e]; n < offsets[e + 1]; ++n) {
        const std::vector<double> left = factor(n, (int64_t)e);
        const double scale = 1.0 / (double)(offsets[e + 1] - offsets[e]);
        for (int64_t c = 0; c < classes; ++c)
          for (int64_t k = 0; k < width; ++k) {
            const double v = input(n, k);
            out[(e * (size_t)classes + (size_t)c) * (size_t)width + (size_t)k] +=
                scale * left[(size_t)c] * (kind == transfuse::HeadKind::diagonal ? v * v : v);
          }
      }
    return out;
  }
};

template <class T>
std::vector<T> narrowed(const std::vector<double>& from) {
  return std::vector<T>(from.begin(), from.end());
}

// Kernels of other devices than the CPU run in another order where another number of threads is asked for.
template <class T>
void check_head(const transfuse::HeadKernels& kernels, uint64_t number, transfuse::HeadKind kind,
                const std::vector<int64_t>& offsets, int64_t columns, int64_t classes, bool bias, bool shared) {
  Random r(number);
  HeadProblem problem{
      kind, offsets.back(), columns, classes, columns + (bias ? 1 : 0), offsets, bias, shared, {}, {}, {}, {}, {}};
  const auto draw = [&](std::vector<double>* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to->push_back((double)(T)r.uniform());
  };
  const int64_t domains = (int64_t)offsets.size() - 1, width = problem.width;
  draw(&problem.x, problem.samples * columns);
  draw(&problem.weight, classes * columns);
  draw(&problem.offset, classes);
  draw(&problem.targets, problem.samples * classes);
  draw(&problem.vectors, (shared ? 1 : domains) * classes * width);
  std::vector<double> cotangent;
  draw(&cotangent, domains * classes * width);
  const std::string name = "head kind " + std::to_string((int)kind) + " " + std::to_string(problem.samples) + " x " +
                           std::to_string(columns) + " x " + std::to_string(classes) + (bias ? " bias" : "") +
                           (shared ? " shared" : "") + (sizeof(T) == 8 ? " f64" : " f32");

  const std::vector<T> x = narrowed<T>(problem.x), weight = narrowed<T>(problem.weight);
  const std::vector<T> offset = narrowed<T>(problem.offset), targets = narrowed<T>(problem.targets);
  const std::vector<T> vectors = narrowed<T>(problem.vectors), grad = narrowed<T>(cotangent);
  std::vector<T> out[2], to_x[2], to_weight[2], to_bias[2], to_vectors[2];
  for (const int run : {0, 1}) {
    std::vector<T> p((size_t)(problem.samples * classes)), rest = p, u = p;
    out[run].assign(grad.size(), T(-7));
    to_x[run].assign(x.size(), T(-7));
    to_weight[run].assign(weight.size(), T(-7));
    to_bias[run].assign(offset.size(), T(-7));
    to_vectors[run].assign(vectors.size(), T(-7));
    transfuse::HeadArgs args;
    args.kind = kind;
    args.f64 = sizeof(T) == 8;
    args.samples = problem.samples, args.columns = columns, args.classes = classes, args.domains = domains;
    args.offsets = offsets.data();
    args.x = x.data(), args.weight = weight.data();
    args.bias = bias ? offset.data() : nullptr;
    const bool product = kind == transfuse::HeadKind::product;
    args.targets = kind == transfuse::HeadKind::gradient ? targets.data() : nullptr;
    args.vectors = product ? vectors.data() : nullptr;
    args.shared = shared;
    args.out = out[run].data(), args.p = p.data(), args.rest = rest.data(), args.u = u.data();
    const auto parallel = run == 1 ? transfuse::std_thread_parallel(3) : transfuse::serial_parallel();
    kernels.forward(args, parallel);
    args.grad = grad.data();
    args.head_grad = true;
    args.x_grad = to_x[run].data(), args.weight_grad = to_weight[run].data();
    args.bias_grad = bias ? to_bias[run].data() : nullptr;
    args.vectors_grad = product ? to_vectors[run].data() : nullptr;
    kernels.backward(args, parallel);
  }
  check(out[0] == out[1] && to_x[0] == to_x[1] && to_weight[0] == to_weight[1] && to_bias[0] == to_bias[1] &&
            to_vectors[0] == to_vectors[1],
        name + ": 3 threads give other bits");

  const double eps = sizeof(T) == 8 ? 1e-12 : 4e-5;
  const std::vector<double> truth = problem.result();
  bool fine = true;
  for (size_t i = 0; i < truth.size(); ++i) fine = fine && std::fabs((double)out[0][i] - truth[i]) <= eps;
  check(fine, name + ": forward");

  // A few entries of every gradient by central differences of <cotangent, result>.
  const auto slope = [&](std::vector<double>* values, size_t at) {
    double ends[2];
    const double kept = (*values)[at], step = 1e-5;
    for (const int side : {0, 1}) {
      (*values)[at] = kept + (side == 1 ? step : -step);
      const std::vector<double> moved = problem.result();
      ends[side] = 0.0;
      for (size_t i = 0; i < moved.size(); ++i) ends[side] += moved[i] * cotangent[i];
    }
    (*values)[at] = kept;
    return (ends[1] - ends[0]) / (2.0 * step);
  };
  const auto compare = [&](std::vector<double>* values, const std::vector<T>& found, const char* what) {
    bool close = true;
    for (size_t at = 0; at < found.size(); at += 1 + found.size() / 3) {
      const double expected = slope(values, at);
      close = close &&
              std::fabs((double)found[at] - expected) <= (sizeof(T) == 8 ? 1e-7 : 1e-3) * (1 + std::fabs(expected));
    }
    check(close, name + ": gradient by " + what);
  };
  compare(&problem.x, to_x[0], "x");
  compare(&problem.weight, to_weight[0], "weight");
  if (bias) compare(&problem.offset, to_bias[0], "bias");
  if (kind == transfuse::HeadKind::product) compare(&problem.vectors, to_vectors[0], "vectors");
}

inline void head_curvature_selftest() {
  uint64_t number = 70000;
  const std::vector<std::vector<int64_t>> divisions = {{0, 1}, {0, 3, 4, 9}, {0, 65, 70}};
  for (const auto kind : {transfuse::HeadKind::gradient, transfuse::HeadKind::diagonal, transfuse::HeadKind::product})
    for (const auto& offsets : divisions)
      for (const int64_t columns : {0, 1, 15, 17, 48, 97})
        for (const int64_t classes : {1, 2, 5, 9}) {
          const bool bias = ++number % 2 == 0 || columns == 0, shared = number % 3 == 0;
          check_head<float>(transfuse::head_kernels(), number, kind, offsets, columns, classes, bias, shared);
          check_head<double>(transfuse::head_kernels(), number, kind, offsets, columns, classes, !bias || columns == 0,
                             shared);
        }
}

}  // namespace selftest
