// Small dense programmes, one problem per task: quadratic programmes over non-negative numbers and over the simplex,
// and the linear programmes of Pareto descent. Everything is float64 and contiguous; a problem is solved by one thread
// in a fixed order, so results do not depend on the number of threads.
#pragma once

#include "transfuse/parallel.h"

namespace transfuse {

constexpr int64_t kProgrammeMost = 256;  // unknowns of a quadratic programme
constexpr int64_t kParetoMost = 6;       // unknowns of a linear programme

// min_{x >= 0} x' G x / 2 + q' x, G symmetric and positive semidefinite.
struct NonnegativeArgs {
  int64_t problems = 0, n = 0;
  const double* g = nullptr;   // (problems, n, n)
  const double* q = nullptr;   // (problems, n)
  int64_t iterations = 0;      // at most, per problem
  double tolerance = 0.0;      // of a slope, relative to the largest entry of q (after scaling the diagonal of G to 1)
  double* x = nullptr;         // (problems, n)
  double* residual = nullptr;  // (problems): violation of the optimality conditions, inf where unbounded
};

// min_{w >= 0, sum w = 1} w' C w; of all that attain it, the one of the smallest norm.
struct MinNormArgs {
  int64_t problems = 0, n = 0;
  const double* c = nullptr;  // (problems, n, n)
  double* w = nullptr;        // (problems, n)
};

// The programmes of Pareto descent over the simplex, see pareto_lp in Python.
struct ParetoArgs {
  int64_t problems = 0, n = 0;
  const double* c = nullptr;  // (problems, n, n)
  const double* a = nullptr;  // (problems, n)
  bool guide = true;
  double* w = nullptr;        // (problems, n)
  int64_t* status = nullptr;  // (problems): 0 solved, 1 infeasible (w = 1/n), 2 not finite (w = NaN)
};

struct SimplexKernels {
  void (*nonnegative)(const NonnegativeArgs&, const Parallel&);
  void (*min_norm)(const MinNormArgs&, const Parallel&);
  void (*pareto)(const ParetoArgs&, const Parallel&);
};

const SimplexKernels& simplex_kernels();

}  // namespace transfuse
