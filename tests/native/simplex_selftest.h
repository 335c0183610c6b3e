// Self-test of the small programmes: optimality conditions, brute force over a grid, and threads.
#pragma once

#include "check.h"
#include "transfuse/simplex.h"

namespace selftest {

// Inner products of n vectors of `rank` entries, for each of some problems; memory ends with the last number.
inline std::vector<double> gramians(Random& r, int64_t problems, int64_t n, int64_t rank) {
  std::vector<double> c((size_t)(problems * n * n));
  for (int64_t p = 0; p < problems; ++p) {
    std::vector<double> g((size_t)(n * rank));
    for (double& x : g) x = r.uniform();
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) {
        double sum = 0;
        for (int64_t k = 0; k < rank; ++k) sum += g[(size_t)(i * rank + k)] * g[(size_t)(j * rank + k)];
        c[(size_t)((p * n + i) * n + j)] = sum;
      }
  }
  return c;
}

inline double quadratic(const double* c, const double* w, int64_t n, double* slope) {
  double value = 0;
  for (int64_t i = 0; i < n; ++i) {
    slope[i] = 0;
    for (int64_t j = 0; j < n; ++j) slope[i] += c[i * n + j] * w[j];
    value += w[i] * slope[i];
  }
  return value;
}

inline void check_simplex(uint64_t number, int64_t problems, int64_t n, int64_t rank) {
  Random r(number);
  const std::string name =
      "simplex " + std::to_string(problems) + " x " + std::to_string(n) + ", rank " + std::to_string(rank);
  const std::vector<double> c = gramians(r, problems, n, rank);
  const size_t numbers = (size_t)(problems * n);
  std::vector<double> w(numbers), w3(numbers), x(numbers), x3(numbers), left((size_t)problems), a(numbers);
  for (double& v : a) v = r.uniform();
  for (const bool threads : {false, true}) {
    const auto parallel = threads ? transfuse::std_thread_parallel(3) : transfuse::serial_parallel();
    transfuse::MinNormArgs least;
    least.problems = problems, least.n = n, least.c = c.data(), least.w = (threads ? w3 : w).data();
    transfuse::simplex_kernels().min_norm(least, parallel);
    transfuse::NonnegativeArgs args;
    args.problems = problems, args.n = n, args.g = c.data(), args.q = a.data(), args.iterations = 10 * n;
    args.tolerance = 1e-12, args.x = (threads ? x3 : x).data(), args.residual = left.data();
    transfuse::simplex_kernels().nonnegative(args, parallel);
  }
  check(w == w3 && x == x3, name + ": 3 threads give other bits");
  std::vector<double> slope((size_t)n);
  bool optimal = true, sums = true, solved = true;
  for (int64_t p = 0; p < problems; ++p) {
    const double *own = w.data() + p * n, *matrix = c.data() + p * n * n;
    const double value = quadratic(matrix, own, n, slope.data());
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      sums = sums && own[i] >= 0;
      sum += own[i];
      optimal = optimal && slope[(size_t)i] >= value - 1e-10;
    }
    sums = sums && std::fabs(sum - 1) < 1e-12;
    // Unbounded where the rank is short; otherwise the conditions of optimality hold.
    if (rank >= n) solved = solved && left[(size_t)p] < 1e-8;
    if (!std::isfinite(left[(size_t)p])) continue;
    quadratic(matrix, x.data() + p * n, n, slope.data());
    for (int64_t i = 0; i < n; ++i) {
      const double s = slope[(size_t)i] + a[(size_t)(p * n + i)];
      solved = solved && x[(size_t)(p * n + i)] >= 0 && s > -1e-8 && (x[(size_t)(p * n + i)] == 0 || s < 1e-8);
    }
  }
  check(sums, name + ": weights off the simplex");
  check(optimal, name + ": a better point exists");
  check(solved, name + ": non-negative programme not solved");
}

inline void check_pareto(uint64_t number, int64_t n, bool guide) {
  Random r(number);
  const int64_t problems = 7;
  const std::string name = std::string("pareto ") + (guide ? "guide " : "descent ") + std::to_string(n);
  const std::vector<double> c = gramians(r, problems, n, n + 1);
  std::vector<double> a((size_t)(problems * n)), w(a.size()), slope((size_t)n);
  std::vector<int64_t> status((size_t)problems);
  for (double& v : a) v = r.uniform();
  transfuse::ParetoArgs args;
  args.problems = problems, args.n = n, args.c = c.data(), args.a = a.data(), args.guide = guide;
  args.w = w.data(), args.status = status.data();
  transfuse::simplex_kernels().pareto(args, transfuse::serial_parallel());
  for (int64_t p = 0; p < problems; ++p) {
    const double *matrix = c.data() + p * n * n, *own = a.data() + p * n;
    double most = own[0];
    for (int64_t i = 1; i < n; ++i) most = std::fmax(most, own[i]);
    // Whether a point meets the constraints (with a margin), and its objective.
    const auto judge = [&](const double* v, double margin, double* objective) {
      double along = 0, total = 0;
      quadratic(matrix, v, n, slope.data());
      bool fine = true;
      for (int64_t j = 0; j < n; ++j) {
        along += own[j] * v[j];
        total += slope[(size_t)j];
        const bool free = guide && most > 0 && own[j] > 0 && own[j] < most;
        const double bound = guide && most > 0 && own[j] <= 0 ? own[j] : 0.0;
        fine = fine && (free || slope[(size_t)j] >= bound - margin);
      }
      *objective = guide ? along : total;
      return fine && (guide || along >= std::fmin(most, 0.0) - margin);
    };
    double best = 0, other = 0;
    const bool fine = judge(w.data() + p * n, 1e-9, &best);
    if (status[(size_t)p] == 0) check(fine, name + ": a constraint is not met");
    for (int trial = 0; trial < 400; ++trial) {
      std::vector<double> v((size_t)n);
      double sum = 0;
      for (double& x : v) sum += x = r.chance(30) ? 0.0 : std::fabs(r.uniform());
      if (sum == 0) continue;
      for (double& x : v) x /= sum;
      if (!judge(v.data(), 0, &other)) continue;
      check(status[(size_t)p] == 0 && other <= best + 1e-9, name + ": a random point is better");
    }
  }
}

inline void simplex_selftest() {
  uint64_t number = 120000;
  for (const int64_t n : {1, 2, 3, 5, 8, 17, 64})
    for (const int64_t rank : {n / 2 + 1, n, 2 * n}) check_simplex(++number, n > 8 ? 3 : 40, n, rank);
  for (int64_t n = 1; n <= transfuse::kParetoMost; ++n)
    for (const bool guide : {false, true}) check_pareto(++number, n, guide);
}

}  // namespace selftest
